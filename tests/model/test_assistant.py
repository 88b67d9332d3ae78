"""Asking: a tiny model that has learned a few images by heart, and says what it learned."""

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from being_vl import VisualBPE
from being_vl.cli import main
from being_vl.data.batches import collate
from being_vl.data.options import CATEGORIES
from being_vl.data.records import Record, Turn
from being_vl.data.sequences import SequenceBuilder
from being_vl.errors import ConfigError, GridError, ImageError, ModelError, QuantizerError, RecordError
from being_vl.model.assistant import Assistant, generate
from being_vl.model.expand import copy_companions
from being_vl.model.options import GenerateOptions
from helpers import tiny

COLOURS = ("red", "green", "blue", "yellow")
QUESTION = "What colour is it?"


class TrainedModel(NamedTuple):
    folder: Path
    images: Path
    records: list[Record]


def square_image(colour: str) -> Image.Image:
    image = Image.new("RGB", (48, 40), "white")
    image.paste(Image.new("RGB", (24, 20), colour), (12, 10))
    return image


@pytest.fixture(scope="module")
def trained_model(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    """Expand a tiny Llama and train it, in a plain loop, until it knows four images and a dialogue by heart."""
    folder = tmp_path_factory.mktemp("learned")
    expanded, _ = tiny.expanded(folder, ["any.png"], tied=False, hidden=64, layers=2, template=tiny.LLAMA3)
    images = folder / "images"
    images.mkdir()
    for colour in COLOURS:
        square_image(colour).save(images / f"{colour}.png")

    torch.manual_seed(0)
    assistant = Assistant.load(expanded)
    grids = assistant.quantizer.encode([square_image(colour) for colour in COLOURS])
    store = tiny.write_grids(folder / "seen", dict(zip(COLOURS, grids, strict=True)), assistant.quantizer)
    records = []
    for index, colour in enumerate(COLOURS):
        answer = f"It is {colour}."
        turns = [Turn("user", f"<image>\n{QUESTION}"), Turn("assistant", answer)]
        records.append(Record(colour, (colour,), tuple(turns), "perception", Path("x.json"), index))
        turns += [Turn("user", "Sure?"), Turn("assistant", f"Yes, {colour}" + "!" * (3 * index + 1))]
        records.append(Record(colour, (colour,), tuple(turns), "instruction", Path("x.json"), index))
    hello = (Turn("user", "Hello."), Turn("assistant", "Hi, I look at pictures."))
    records.append(Record("hello", (), hello, "instruction", Path("x.json"), 9))

    builder_of_model = assistant.builder
    builder = SequenceBuilder(
        builder_of_model.tokenizer, builder_of_model.layout, builder_of_model.bpe, store
    )
    batch = collate([[sequence] for sequence in builder.build(records)], builder.pad_id, CATEGORIES)
    del batch["weights"], batch["categories"]
    model = assistant.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 5e-3:
            break
    assert loss < 0.02
    trained_folder = folder / "trained"
    model.save_pretrained(trained_folder)
    copy_companions(expanded, trained_folder)
    return TrainedModel(trained_folder, images, records)


@pytest.fixture(scope="module")
def assistant(trained_model: TrainedModel) -> Assistant:
    return Assistant.load(trained_model.folder, device="cpu")


def test_it_says_what_it_learned_of_each_picture(assistant: Assistant) -> None:
    """Training, saving, quantising and prompting agree; and the answer follows the image."""
    prompts: list[Any] = [QUESTION, f"{QUESTION}\n<image>", f"<image>\n{QUESTION}", "Hello."]
    images_of_prompts = [[square_image("blue")], [square_image("red")], [square_image("green")], []]
    assert assistant.answer(prompts, images_of_prompts) == [
        "It is blue.",
        "It is red.",
        "It is green.",
        "Hi, I look at pictures.",
    ]
    dialogue = [Turn("user", QUESTION), Turn("assistant", "It is yellow."), Turn("user", "Sure?")]
    assert assistant.answer([dialogue], [[square_image("yellow")]]) == ["Yes, yellow" + "!" * 10]
    (grid,) = assistant.quantizer.encode([square_image("green")])
    assert assistant.answer([QUESTION], [[grid]]) == ["It is green."]


def questions(count: int) -> tuple[list[Any], list[list[Image.Image]]]:
    """Prompts of many lengths with no, one and two images."""
    prompts, images_of_prompts = [], []
    for n in range(count):
        prompts.append(
            ("Sure? " * (n % 5) + "What is it?", "Hello.", "Is <image> as large as <image>?")[n % 3]
        )
        images_of_prompts.append([square_image(COLOURS[(n + k) % 4]) for k in range((1, 0, 2)[n % 3])])
    return prompts, images_of_prompts


def test_the_answer_does_not_depend_on_the_batch(assistant: Assistant) -> None:
    prompts, images_of_prompts = questions(13)
    single_answers = assistant.answer(prompts, images_of_prompts, max_new_tokens=24, batch_size=1)
    assert len(set(single_answers)) > 4
    for batch_size in (2, 5, 16):
        assert (
            assistant.answer(prompts, images_of_prompts, max_new_tokens=24, batch_size=batch_size)
            == single_answers
        )


def test_the_cache_gives_what_a_full_pass_per_token_gives(assistant: Assistant) -> None:
    prompts, images_of_prompts = questions(6)
    answers = assistant.answer(prompts, images_of_prompts, max_new_tokens=24)
    builder = assistant.builder
    stops = set(builder.tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<|end_of_text|>"]))
    for prompt, images, answer in zip(prompts, images_of_prompts, answers, strict=True):
        tokens = [builder.bpe.encode(grid) for grid in assistant.quantizer.encode(images)]
        ids = builder.prompt([Turn("user", prompt)], tokens).tolist()
        start = len(ids)
        with torch.inference_mode():
            while len(ids) < start + 24:
                scores = assistant.model(torch.tensor([ids]), use_cache=False).logits[0, -1]
                ids.append(int(scores[: builder.layout.text_size - 5].argmax()))
                if ids[-1] in stops:
                    break
        assert builder.tokenizer.decode(ids[start:], skip_special_tokens=True).strip() == answer


def test_each_token_but_the_first_is_one_step_of_the_cache(assistant: Assistant) -> None:
    widths: list[int] = []
    hook = assistant.model.model.embed_tokens.register_forward_hook(
        lambda _, inputs, __: widths.append(inputs[0].shape[1])
    )
    assistant.answer([QUESTION, "Hello."], [[square_image("red")], []], max_new_tokens=6)
    hook.remove()
    assert widths[0] > 20
    assert widths[1:]
    assert set(widths[1:]) == {1}


def test_drawing_is_seeded_and_the_same_in_any_batch(assistant: Assistant) -> None:
    prompts, images_of_prompts = questions(9)
    sampling = {"max_new_tokens": 16, "temperature": 3.0, "seed": 5}
    answers = assistant.answer(prompts, images_of_prompts, **sampling)
    assert assistant.answer(prompts, images_of_prompts, **sampling) == answers
    assert assistant.answer(prompts, images_of_prompts, **sampling, batch_size=2) == answers
    assert assistant.answer(prompts, images_of_prompts, **sampling | {"seed": 6}) != answers
    sampling_without_seed = sampling | {"seed": None}
    assert assistant.answer(prompts, images_of_prompts, **sampling_without_seed) != assistant.answer(
        prompts, images_of_prompts, **sampling_without_seed
    )
    answers_to_one_question = assistant.answer([QUESTION] * 4, [[square_image("red")]] * 4, **sampling)
    assert len(set(answers_to_one_question)) == 4  # one question, four draws


def test_a_low_temperature_or_top_p_leaves_only_the_likeliest(assistant: Assistant) -> None:
    prompts, images_of_prompts = questions(9)
    greedy = assistant.answer(prompts, images_of_prompts, max_new_tokens=16)
    assert assistant.answer(prompts, images_of_prompts, 16, temperature=1e-4, seed=0) == greedy
    assert assistant.answer(prompts, images_of_prompts, 16, temperature=2.0, top_p=1e-6, seed=0) == greedy


def test_draws_follow_the_softmax_within_top_p(assistant: Assistant) -> None:
    """First tokens of 3000 draws against the model's own probabilities (chi-squared would do; 4 sigma does)."""
    prompt, count = "Is it?", 3000
    answers = assistant.answer(
        [prompt] * count, [[]] * count, max_new_tokens=1, temperature=1.5, top_p=0.8, seed=1, batch_size=count
    )
    builder = assistant.builder
    ids = builder.prompt([Turn("user", prompt)])[None]
    with torch.inference_mode():
        scores = assistant.model(torch.from_numpy(ids)).logits[0, -1, : builder.layout.text_size - 5]
    probabilities, tokens = (scores / 1.5).softmax(0).sort(descending=True)
    num_kept = int((probabilities.cumsum(0) < 0.8).sum()) + 1
    shares: dict[str, float] = {}
    for probability, token in zip(probabilities[:num_kept], tokens[:num_kept], strict=True):
        text = builder.tokenizer.decode([int(token)], skip_special_tokens=True).strip()
        shares[text] = shares.get(text, 0) + float(probability / probabilities[:num_kept].sum())
    assert num_kept > 3
    assert set(answers) <= set(shares)
    for text, share in shares.items():
        deviation = (share * (1 - share) / count) ** 0.5
        assert abs(answers.count(text) / count - share) < 4 * deviation + 1e-9, text


def test_image_ids_are_never_generated_however_likely(trained_model: TrainedModel) -> None:
    assistant = Assistant.load(trained_model.folder)
    layout = assistant.builder.layout
    ids: list[int] = []
    decode = assistant.builder.tokenizer.batch_decode
    assistant.builder.tokenizer.batch_decode = lambda rows, **options: (
        ids.extend(rows.flatten().tolist()),
        decode(rows, **options),
    )[1]
    with torch.no_grad():
        head = assistant.model.get_output_embeddings().weight
        # Whatever the hidden state, one of these two rows beats all text.
        head[layout.first_visual] = 1000 * head[5]
        head[layout.boi] = -1000 * head[5]
        head[layout.text_size - 1] = -1000 * head[5]  # a row of the LLM without a token
    assistant.answer([QUESTION] * 2, [[square_image("red")]] * 2, max_new_tokens=8)
    assistant.answer([QUESTION], [[square_image("red")]], max_new_tokens=8, temperature=1.0, seed=0)
    assert ids
    assert max(ids) < layout.text_size - 5


def test_what_cannot_be_asked_is_refused(assistant: Assistant) -> None:
    with pytest.raises(ConfigError, match="2 prompts, but lists of images for 1"):
        assistant.answer(["a", "b"], [[]])
    with pytest.raises(ConfigError, match=r"top_p 0\.0"):
        assistant.answer(["a"], [[]], top_p=0.0)
    with pytest.raises(RecordError, match="1 <image> for 0 images"):
        assistant.answer(["<image>"], [[]])
    with pytest.raises(GridError, match="16"):
        assistant.answer(["a"], [[np.full((4, 4), 16)]])
    with pytest.raises(ModelError, match=r"needs \d+ positions, the model has 512"):
        assistant.answer(["a"], [[]], max_new_tokens=510)
    assert assistant.answer([], []) == []


def test_folders_that_are_no_assistant_are_refused(trained_model: TrainedModel, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no being_vl.json"):
        Assistant.load(tiny.llm(tmp_path / "llm"))
    copy_companions(trained_model.folder, tmp_path / "llm")
    with pytest.raises(ModelError, match=r"the model has 405 rows, its layout \d+"):
        Assistant.load(tmp_path / "llm")
    mixed_folder = tmp_path / "mixed"
    shutil.copytree(trained_model.folder, mixed_folder)
    VisualBPE.train([np.zeros((2, 2), int)], base_vocab_size=9, num_merges=0).save(
        mixed_folder / "visual_vocabulary.json"
    )
    with pytest.raises(QuantizerError, match="a codebook of 9 and 0 merges, the model 16 and"):
        Assistant.load(mixed_folder)
    truncated_folder = tmp_path / "cut"
    shutil.copytree(trained_model.folder, truncated_folder)
    os.truncate(truncated_folder / "model.safetensors", 1000)
    with pytest.raises(ModelError, match=r"cut: cannot be loaded: "):
        Assistant.load(truncated_folder)


def test_the_command_line_answers(trained_model: TrainedModel, capsys: pytest.CaptureFixture[str]) -> None:
    image = str(trained_model.images / "blue.png")
    inputs = ["generate", "--model", str(trained_model.folder), "--prompt", QUESTION, "--image", image]
    assert main(inputs) == 0
    assert capsys.readouterr().out == "It is blue.\n"


def test_the_command_line_draws_in_batches(
    trained_model: TrainedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    def ask(*flags: str) -> list[str]:
        images = [str(trained_model.images / f"{colour}.png") for colour in COLOURS]
        inputs = ["generate", "--model", str(trained_model.folder), "--prompt", QUESTION, "--image", *images]
        assert main([*inputs, "--max_new_tokens", "8", *flags]) == 0
        return [json.loads(line)["answer"] for line in capsys.readouterr().out.splitlines()]

    drawing = ("--temperature", "3", "--seed", "1")
    drawn_answers = ask(*drawing)
    assert ask("--batch_size", "3") == [f"It is {colour}." for colour in COLOURS] != drawn_answers
    assert ask(*drawing, "--batch_size", "3") == drawn_answers
    assert ask(*drawing, "--top_p", "1e-6") == ask()


def test_several_images_and_questions_come_as_json_lines(trained_model: TrainedModel) -> None:
    images = [trained_model.images / f"{colour}.png" for colour in ("red", "green")]
    comparison = "Is <image> as <image>?"
    options = GenerateOptions(trained_model.folder, [QUESTION, comparison], images, device="cpu")
    lines = [json.loads(line) for line in generate(options)]
    assert [line["answer"] for line in lines[:2]] == ["It is red.", "It is green."]
    assert [(line["images"], line["prompt"]) for line in lines] == [
        ([str(images[0])], QUESTION),
        ([str(images[1])], QUESTION),
        ([str(image) for image in images], comparison),
    ]
    assert list(generate(GenerateOptions(trained_model.folder, ["Hello."]))) == ["Hi, I look at pictures."]


def test_a_bad_image_is_named_before_the_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ImageError, match=r"cut\.png: cannot be decoded \([^<>]+\)$"):
        list(generate(GenerateOptions(tmp_path / "no model", ["a"], [tmp_path / "cut.png"])))
    with pytest.raises(ImageError, match=r"gone\.png: cannot be read"):
        list(generate(GenerateOptions(tmp_path / "no model", ["a"], [tmp_path / "gone.png"])))
    with pytest.raises(ConfigError, match="no prompt"):
        list(generate(GenerateOptions(tmp_path / "no model", [])))


def test_the_folder_still_answers_as_a_plain_causal_lm(trained_model: TrainedModel) -> None:
    """Without being_vl: the Auto classes alone, given the ids."""
    builder = Assistant.load(trained_model.folder).builder
    ids = torch.from_numpy(builder.prompt([Turn("user", "Hello.")]))[None]
    model = AutoModelForCausalLM.from_pretrained(trained_model.folder)
    tokenizer = AutoTokenizer.from_pretrained(trained_model.folder)
    output = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=builder.chat.end_of_turn)
    assert (
        tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
        == "Hi, I look at pictures."
    )
