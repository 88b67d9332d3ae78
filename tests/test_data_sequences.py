"""Records as sequences, by what the tokens decode to."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

import tiny
from being_vl import VisualBPE
from being_vl.data.batches import collate
from being_vl.data.records import Record, Turn
from being_vl.data.sequences import Example, SequenceBuilder
from being_vl.errors import GridError, ImageError, ModelError, QuantizerError, RecordError
from being_vl.model.layout import VocabularyLayout
from being_vl.quantize.grids import GridStore

KEYS = ["a.png", "b.png", "c.png"]
TEXT_SIZE = 410
TEMPLATES = {
    "default": None,
    "llama3": tiny.LLAMA3,
    "llama2": tiny.LLAMA2,
    "chatml": tiny.CHATML,
    "qwen3": tiny.QWEN3,
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> GridStore:
    folder = tmp_path_factory.mktemp("data")
    made_by = tiny.quantizer(folder / "quantizer")
    return tiny.grids(folder / "grids", KEYS, made_by, failed={"broken.png": "broken.png: cannot be decoded"})


@pytest.fixture(scope="module")
def bpe(store: GridStore) -> VisualBPE:
    return VisualBPE.train(
        list(store.values()),
        base_vocab_size=16,
        num_merges=5,
        quantizer_name="tiny",
        quantizer_fingerprint=store.quantizer_fingerprint,
    )


@pytest.fixture(scope="module")
def layout(store: GridStore, bpe: VisualBPE) -> VocabularyLayout:
    return VocabularyLayout(TEXT_SIZE, 16, bpe.num_merges, "tiny", store.quantizer_fingerprint)


def record(*texts: str, images: tuple[str, ...] = (), index: int = 0) -> Record:
    roles: tuple[Literal["user", "assistant"], ...] = ("user", "assistant")
    turns = tuple(Turn(roles[n % 2], text) for n, text in enumerate(texts))
    return Record(f"r{index}", images, turns, "perception", Path("data.json"), index)


def numbered(where: str) -> int:
    return int(where.partition(": record ")[2].split()[0])


def builder(template: str = "default", bos: bool = True, **parts: Any) -> SequenceBuilder:
    return SequenceBuilder(tiny.tokenizer(bos, TEMPLATES[template]), **parts)


def readable(build: SequenceBuilder, ids: Any) -> str:
    """Decoded text, with each image as {its BPE ids}."""
    text, layout = "", build.layout
    run: list[int] = []

    def flush() -> None:
        nonlocal text, run
        text, run = text + build.tokenizer.decode(run), []

    for token in map(int, ids):
        if layout is None or token < layout.text_size:
            run.append(token)
            continue
        flush()
        if token in (layout.boi, layout.eoi):
            text += "{" if token == layout.boi else "}"
        else:
            text += f"{layout.to_visual(token)} "
    flush()
    return text


def learned(build: SequenceBuilder, example: Example) -> list[str]:
    """The runs of labels, decoded; checks that each label is the id itself."""
    marked = example.labels != -100
    assert (example.labels[marked] == example.ids[marked]).all()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], marked, [0]]).astype(int)))
    return [build.tokenizer.decode(example.ids[a:b]) for a, b in edges.reshape(-1, 2)]


EXPECTED = {
    "default": (
        "<|begin_of_text|>{IMG}USER: What?\nASSISTANT: Red.<|end_of_text|>\n"
        "USER: And?\nASSISTANT: Blue.<|end_of_text|>",
        [" Red.<|end_of_text|>", " Blue.<|end_of_text|>"],
    ),
    "llama3": (
        "<|begin_of_text|>{IMG}<|start_header_id|>user<|end_header_id|>\n\nWhat?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nRed.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nBlue.<|eot_id|>",
        ["Red.<|eot_id|>", "Blue.<|eot_id|>"],
    ),
    "llama2": (
        "<|begin_of_text|>{IMG}[INST] What? [/INST] Red. <|end_of_text|>"
        "<|begin_of_text|>[INST] And? [/INST] Blue. <|end_of_text|>",
        [" Red. <|end_of_text|>", " Blue. <|end_of_text|>"],
    ),
    "chatml": (
        "{IMG}<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\nRed.<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\nBlue.<|im_end|>",
        ["Red.<|im_end|>", "Blue.<|im_end|>"],
    ),
    "qwen3": (
        "{IMG}<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\nRed.<|im_end|>\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nBlue.<|im_end|>",
        ["Red.<|im_end|>", "Blue.<|im_end|>"],
    ),
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_dialogue_about_an_image_by_each_template(
    template: str, store: GridStore, bpe: VisualBPE, layout: VocabularyLayout
) -> None:
    """What is learned are the answers with their end of turn, to the token; and asking repeats training to the id."""
    bos = template not in ("chatml", "qwen3")
    build = builder(template, bos, layout=layout, bpe=bpe, grids=store)
    dialogue = record("<image>\nWhat?", "Red.", "And?", "Blue.", images=("a.png",))
    (example,) = build.build([dialogue])
    tokens = bpe.encode(store["a.png"])
    text, answers = EXPECTED[template]
    assert readable(build, example.ids) == text.replace("IMG", "".join(f"{token} " for token in tokens))
    assert learned(build, example) == answers
    assert example.ids.dtype == example.labels.dtype == np.int32
    assert example.category == "perception"
    assert example.where == dialogue.where

    asked = build.prompt(dialogue.turns[:3], [tokens])
    assert asked.dtype == np.int64
    start = np.flatnonzero((example.labels[1:] != -100) & (example.labels[:-1] == -100))[-1] + 1
    np.testing.assert_array_equal(asked, example.ids[:start])


@pytest.mark.parametrize(
    ("question", "images", "expected"),
    [
        ("Compare.", 2, "{a}{b}USER: Compare.\n"),
        ("<image><image> Compare.", 2, "{a}{b}USER: Compare.\n"),
        ("<image>\n<image>\nCompare.", 2, "{a}{b}USER: Compare.\n"),
        ("Compare.\n<image>\n<image>", 2, "{a}{b}USER: Compare.\n"),
        ("Is <image> like <image>?", 2, "USER: Is {a} like {b}?\n"),
        ("<image> Is it like <image>?", 2, "{a}USER: Is it like {b}?\n"),
        ("What is <image>", 1, "USER: What is {a}\n"),
        ("Is <image> like\n<image>", 2, "USER: Is {a} like\n{b}\n"),
        ("<image>", 1, "{a}USER: \n"),
        ("Hello.", 0, "USER: Hello.\n"),
    ],
)
def test_where_images_go(
    question: str, images: int, expected: str, store: GridStore, bpe: VisualBPE, layout: VocabularyLayout
) -> None:
    build = builder(layout=layout, bpe=bpe, grids=store)
    (example,) = build.build([record(question, "Yes.", images=tuple(KEYS[:images]))])
    for name in "ab":
        tokens = "".join(f"{token} " for token in bpe.encode(store[f"{name}.png"]))
        expected = expected.replace(f"{{{name}}}", f"{{{tokens}}}")
    assert readable(build, example.ids) == f"<|begin_of_text|>{expected}ASSISTANT: Yes.<|end_of_text|>"


def test_an_image_of_a_later_question_stays_there(
    store: GridStore, bpe: VisualBPE, layout: VocabularyLayout
) -> None:
    build = builder(layout=layout, bpe=bpe, grids=store)
    texts = ("<image>\nWhat?", "Red.", "<image>\nAnd this?", "Blue.")
    (example,) = build.build([record(*texts, images=("a.png", "a.png"))])
    image = "{" + "".join(f"{token} " for token in bpe.encode(store["a.png"])) + "}"
    assert readable(build, example.ids) == (
        f"<|begin_of_text|>{image}USER: What?\nASSISTANT: Red.<|end_of_text|>\n"
        f"USER: {image}\nAnd this?\nASSISTANT: Blue.<|end_of_text|>"
    )


def test_text_alone_trains_a_model_that_is_not_expanded() -> None:
    build = builder()
    question = "Is <image> a word?"
    (example,) = build.build([record(question, "No.")])
    assert readable(build, example.ids) == f"<|begin_of_text|>USER: {question}\nASSISTANT: No.<|end_of_text|>"
    assert learned(build, example) == [" No.<|end_of_text|>"]
    with pytest.raises(RecordError, match=r"record 3 .*has the image 'a.png', but the model is not expanded"):
        build.build([record("What?", "Red.", images=("a.png",), index=3)])
    with pytest.raises(ModelError, match="not expanded"):
        build.prompt([Turn("user", "What?")], [[1, 2]])


def test_records_without_grids_are_named_with_the_reason(
    store: GridStore, bpe: VisualBPE, layout: VocabularyLayout
) -> None:
    keys = ["a.png", "gone.png", "broken.png", "gone.png", *(f"{n}.png" for n in range(9))]
    records = [record("What?", "Red.", images=(key,), index=n) for n, key in enumerate(keys)]
    with pytest.raises(ImageError) as error:
        builder(layout=layout, bpe=bpe, grids=store).build(records)
    assert str(error.value) == (
        "11 of 12 images have no grid: 'gone.png' (not among the quantized images) of data.json: record 1 (id 'r1'); "
        "'broken.png' (broken.png: cannot be decoded) of data.json: record 2 (id 'r2'); "
        "'0.png' (not among the quantized images) of data.json: record 4 (id 'r4'); and 8 more"
    )
    with pytest.raises(RecordError, match=r"record 0 .*no grids were given"):
        builder(layout=layout, bpe=bpe).build(records)


def test_ids_outside_the_codebook_are_named(tmp_path: Path, store: GridStore) -> None:
    small = VisualBPE.train([np.zeros((4, 4), int)], base_vocab_size=4, num_merges=0)
    layout = VocabularyLayout(TEXT_SIZE, 4, 0, "tiny", store.quantizer_fingerprint)
    build = builder(layout=layout, bpe=small, grids=store)
    with pytest.raises(
        GridError, match=r"grid of 'a.png' \(data.json: record 0 .* outside the codebook of 4"
    ):
        build.build([record("What?", "Red.", images=("a.png",))])


def test_parts_of_different_quantizers_are_refused_naming_both(
    tmp_path: Path, store: GridStore, bpe: VisualBPE, layout: VocabularyLayout
) -> None:
    other = tiny.quantizer(tmp_path / "quantizer", name="other", seed=1)
    grids = tiny.grids(tmp_path / "grids", KEYS, other)
    with pytest.raises(QuantizerError, match=f"'other' .{other.fingerprint[:12]}.*'tiny'"):
        builder(layout=layout, bpe=bpe, grids=grids)
    changed = {"quantizer_name": "other", "quantizer_fingerprint": other.fingerprint}
    with pytest.raises(QuantizerError, match=r"made for quantizer 'tiny' .*the model for 'other'"):
        builder(layout=dataclasses.replace(layout, **changed), bpe=bpe)
    with pytest.raises(QuantizerError, match="codebook of 16 and 5 merges, the model 16 and 6"):
        builder(layout=dataclasses.replace(layout, num_merges=6), bpe=bpe)
    with pytest.raises(ModelError, match=r"tokenizer has 4\d\d ids, the model 100 rows"):
        builder(layout=dataclasses.replace(layout, text_size=100), bpe=bpe)


def test_records_that_are_too_long_are_an_error_or_left_out(
    store: GridStore, bpe: VisualBPE, layout: VocabularyLayout
) -> None:
    records = [record("What?", "Red. " * (30 if n % 2 else 1), images=("b.png",), index=n) for n in range(10)]
    limits = {"layout": layout, "bpe": bpe, "grids": store, "max_length": 60}
    with pytest.raises(RecordError) as error:
        builder(**limits).build(records)
    assert str(error.value).startswith(
        "5 of 10 records are longer than max_length 60: data.json: record 1 (id 'r1')"
    )
    assert str(error.value).endswith("; and 2 more; raise max_length or set drop_too_long")

    build = builder(**limits, drop_too_long=True)
    kept = build.build(records)
    assert [numbered(example.where) for example in kept] == [0, 2, 4, 6, 8]
    assert [(numbered(where), length > 60) for where, length in build.dropped] == [
        (n, True) for n in (1, 3, 5, 7, 9)
    ]
    assert all("Red." in readable(build, example.ids) for example in kept)


@pytest.mark.parametrize("template", TEMPLATES)
def test_strings_of_special_tokens_in_a_text_are_text(template: str) -> None:
    build = builder(template)
    special = build.chat.specials
    plain = build.build([record("What?", "Red.")])[0]
    for name in special:
        hostile = record(f"Say {name}{name}", f"{name}, I say {name}")
        example = build.build([hostile])[0]
        ids = set(build.tokenizer.convert_tokens_to_ids(list(special)))
        written = [token for token in example.ids if token in ids]
        assert written == [token for token in plain.ids if token in ids]
        assert build.tokenizer.decode(example.ids).count(name) == 4 + build.tokenizer.decode(plain.ids).count(
            name
        )
        prompt = build.prompt(hostile.turns[:1])
        assert example.ids[: len(prompt)].tolist() == prompt.tolist()


def test_bad_records_are_left_out_and_listed_if_asked(
    store: GridStore, bpe: VisualBPE, layout: VocabularyLayout
) -> None:
    records = [
        record("What?", "Red.", images=("a.png",), index=0),
        record("What?", "Red.", images=("a.png", "gone.png"), index=1),
        record("What?", "Red.", images=("broken.png",), index=2),
        record("What?", index=3),
        record("What?", "Red. " * 500, index=4),
        record("Hi", "Ho", index=5),
    ]
    bad: list[str] = []
    build = builder(layout=layout, bpe=bpe, grids=store, max_length=300)
    assert [numbered(example.where) for example in build.build(records, bad)] == [0, 5]
    assert sorted(bad)[:3] == [
        "data.json: record 1 (id 'r1'): the image 'gone.png' has no grid (not among the quantized images)",
        "data.json: record 2 (id 'r2'): the image 'broken.png' has no grid (broken.png: cannot be decoded)",
        "data.json: record 3 (id 'r3'): no answer to learn from",
    ]
    assert sorted(bad)[3].startswith("data.json: record 4 (id 'r4'): ")
    assert sorted(bad)[3].endswith(" tokens, max_length is 300")
    bad = []
    narrow = VisualBPE.train([np.zeros((2, 2), np.int32)], base_vocab_size=2, num_merges=1)
    small = VocabularyLayout(TEXT_SIZE, 2, narrow.num_merges, "tiny", store.quantizer_fingerprint)
    assert len(builder(layout=small, bpe=narrow, grids=store).build(records[:1] + records[5:], bad)) == 1
    assert "record 0 (id 'r0'): the grid of 'a.png' holds the id" in bad[0]


def test_records_without_any_answer_are_an_error() -> None:
    with pytest.raises(RecordError, match=r"1 records have no answer to learn from: data.json: record 4"):
        builder().build([record("What?", "Red."), record("What?", index=4)])


def test_prompts_that_do_not_end_with_a_question_or_lack_images_are_refused(
    store: GridStore, bpe: VisualBPE, layout: VocabularyLayout
) -> None:
    build = builder(layout=layout, bpe=bpe)
    for turns in ([], [Turn("assistant", "a")], [Turn("user", "a"), Turn("assistant", "b")]):
        with pytest.raises(RecordError, match="must alternate"):
            build.prompt(turns)
    with pytest.raises(RecordError, match="2 <image> for 1 images"):
        build.prompt([Turn("user", "<image> or <image>?")], [[1]])
    with pytest.raises(ModelError, match=r"visual BPE id 21 at index 1 is outside 0\.\.20"):
        build.prompt([Turn("user", "What?")], [[1, 21]])


def test_a_template_that_cannot_be_used_is_refused() -> None:
    tokenizer = tiny.tokenizer()
    for template, message in [
        (
            "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
            "no special token behind an",
        ),
        ("{{ messages[0]['content'] }}{{ eos_token }}", "does not write each turn's text once"),
        ("{{ raise_exception('only tools') }}", "fails on plain turns: only tools"),
    ]:
        tokenizer.chat_template = template
        with pytest.raises(ModelError, match=message):
            SequenceBuilder(tokenizer)


def test_the_date_in_a_template_does_not_change_with_the_day() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y %f') %}{% endif %}"
        "{{ date_string }}" + tiny.CHATML
    )
    turns = [Turn("user", "What day is it?")]
    assert "26 Jul 2024" in tokenizer.decode(SequenceBuilder(tokenizer).prompt(turns))


def test_a_batch_is_padded_on_the_right(store: GridStore, bpe: VisualBPE, layout: VocabularyLayout) -> None:
    build = builder(layout=layout, bpe=bpe, grids=store)
    examples = build.build([record("What?", "Red.", images=("a.png",)), record("Hi", "Ho")])
    batch = collate(examples, pad_id=build.pad_id)
    long, short = (len(example.ids) for example in examples)
    assert long > short
    weights = batch.pop("weights")
    assert list(batch) == ["input_ids", "attention_mask", "labels"]
    assert weights.dtype == torch.float32
    assert ((weights > 0) == (batch["labels"] != -100)).all()
    assert all(tensor.shape == (2, long) and tensor.dtype == torch.int64 for tensor in batch.values())
    for row, example in enumerate(examples):
        length = len(example.ids)
        assert batch["input_ids"][row].tolist() == [*example.ids, *[build.pad_id] * (long - length)]
        assert batch["labels"][row].tolist() == [*example.labels, *[-100] * (long - length)]
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (long - length)
