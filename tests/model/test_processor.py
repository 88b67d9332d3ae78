"""The processor: chats with images as ids, as the model was trained on them, and back."""

import base64
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from being_vl.data.records import Turn
from being_vl.errors import GridError, ImageError, ModelError, RecordError
from being_vl.images.decode import read_image
from being_vl.model.assistant import Assistant
from being_vl.model.processor import BeingVLProcessor
from helpers import tiny

TEMPLATES: dict[tiny.Family, str] = {"llama": tiny.LLAMA3, "qwen2": tiny.CHATML}


@pytest.fixture(scope="module", params=TEMPLATES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    family = request.param
    return tiny.expanded(path, ["any.png"], family=family, template=TEMPLATES[family], layers=2)[0]


@pytest.fixture(scope="module")
def processor(folder: Path) -> BeingVLProcessor:
    return AutoProcessor.from_pretrained(folder)


def square_image(colour: str) -> Image.Image:
    image = Image.new("RGB", (32, 32), "white")
    image.paste(Image.new("RGB", (16, 16), colour), (8, 8))
    return image


def ask(question: str, *images: object) -> list[dict[str, object]]:
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def test_a_chat_is_the_models_own_template_with_the_images_behind_bos(processor: BeingVLProcessor) -> None:
    chat = [
        *ask("What is it?", square_image("red"), square_image("blue")),
        {"role": "assistant", "content": "A square."},
        {"role": "user", "content": "Sure?"},
    ]
    text = [{"role": "user", "content": "What is it?"}, *chat[1:]]
    tokenizer = processor.tokenizer
    expected = tokenizer.apply_chat_template(text, tokenize=False, add_generation_prompt=True)
    text_of_ids = processor.decode(processor(chat).input_ids[0])
    bos = tokenizer.bos_token or ""
    images, rest = "", text_of_ids.removeprefix(bos)
    while rest.startswith("<|visual_start|>"):
        image, _, rest = rest.partition("<|visual_end|>")
        images += image
    assert text_of_ids.startswith(bos)
    assert images.count("<|visual_start|>") == 2
    assert bos + rest == expected
    ids = processor(chat).input_ids
    assert torch.equal(tokenizer(text_of_ids, add_special_tokens=False, return_tensors="pt").input_ids, ids)
    assert processor.batch_decode(ids, skip_special_tokens=True) == [
        tokenizer.decode(tokenizer(expected, add_special_tokens=False).input_ids, skip_special_tokens=True)
    ]


def test_an_image_between_texts_stays_there(processor: BeingVLProcessor) -> None:
    parts = [
        {"type": "text", "text": "Is "},
        {"type": "image", "image": square_image("red")},
        {"type": "text", "text": " red?"},
    ]
    text_of_ids = processor.decode(processor([{"role": "user", "content": parts}]).input_ids[0])
    assert "Is <|visual_start|>" in text_of_ids
    assert "<|visual_end|> red?" in text_of_ids


def test_a_system_message_stands_where_the_template_puts_it(processor: BeingVLProcessor) -> None:
    system = {"role": "system", "content": "Be kind."}
    text_of_ids = processor.decode(processor([system, *ask("What is it?", square_image("red"))]).input_ids[0])
    chat = [system, {"role": "user", "content": "What is it?"}]
    expected = processor.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert "Be kind." in expected
    assert text_of_ids.partition("<|visual_end|>")[2] == expected.removeprefix("<|begin_of_text|>")


def test_files_pictures_and_grids_are_the_same_images(processor: BeingVLProcessor, tmp_path: Path) -> None:
    square_image("green").save(tmp_path / "a.png")
    (grid,) = processor.quantizer.encode([square_image("green")])
    image_forms = [tmp_path / "a.png", str(tmp_path / "a.png"), square_image("green"), grid]
    ids = [processor(ask("What?", image)).input_ids for image in image_forms]
    assert all(torch.equal(ids[0], ids_of_other) for ids_of_other in ids)
    mixed_ids = processor(ask("What?", grid, square_image("red"), grid)).input_ids
    assert torch.equal(
        mixed_ids, processor(ask("What?", *[square_image(c) for c in ("green", "red", "green")])).input_ids
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_of_pil_is_turned_as_its_file_is(
    processor: BeingVLProcessor, folder: Path, tmp_path: Path, orientation: int
) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image = Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint32).reshape(32, 32, 3).astype(np.uint8) ^ 99)
    image.paste("red", (3, 5, 14, 29))
    path = tmp_path / "a.png"
    image.save(path, exif=exif)
    expected_grid = processor.quantizer.encode([read_image(path)])[0]
    if orientation > 1:
        assert not np.array_equal(expected_grid, processor.quantizer.encode([image])[0])
    upright_image = ImageOps.exif_transpose(Image.open(path))
    for pil_image in (Image.open(path), Image.open(path).convert("RGBA"), read_image(path), upright_image):
        np.testing.assert_array_equal(processor.quantizer.encode([pil_image])[0], expected_grid)
    expected_ids = processor(ask("What?", expected_grid)).input_ids
    for form in (Image.open(path), path, str(path), upright_image):
        assert torch.equal(processor(ask("What?", form)).input_ids, expected_ids)
        np.testing.assert_array_equal(
            processor.prompts(["What?"], [[form]])[0], processor.prompts(["What?"], [[expected_grid]])[0]
        )


def test_image_paths_are_those_of_regular_files(processor: BeingVLProcessor, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", tmp_path, Path("/dev/zero"), "a\0.png", "x" * 5000):
        with pytest.raises((ImageError, RecordError), match=r"cannot be read|expected a file name") as fault:
            processor(ask("What?", path))
        assert len(str(fault.value)) < 600
        with pytest.raises(ImageError, match="cannot be read"):
            processor.prompts(["What?"], [[path]])
    for image in (7, None, [square_image("red")], {"bytes": b""}):
        with pytest.raises(RecordError, match=r"message 0: .*expected"):
            processor(ask("What?", image))
        with pytest.raises(RecordError, match=r"an image is of the type .*; expected a PIL image, the path"):
            processor.prompts(["What?"], [[image]])


def test_parts_of_chats_hold_or_name_images_as_other_libraries_write_them(
    processor: BeingVLProcessor, tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    square_image("red").save(path)
    content = path.read_bytes()
    text = base64.b64encode(content).decode()
    uri = f"data:image/png;base64,{text}"
    expected_ids = processor(ask("What?", square_image("red"))).input_ids
    for part in (
        {"type": "image", "image": uri},
        {"type": "image", "image": text},
        {"type": "image", "image": f"file://{path}"},
        {"type": "image", "image": content},
        {"type": "image", "image": {"bytes": content, "path": "gone.png"}},
        {"type": "image", "path": str(path)},
        {"type": "image", "base64": text},
        {"type": "image", "url": str(path), "image": None},
        {"type": "image_url", "image_url": {"url": uri}},
        {"type": "image_url", "image_url": str(path)},
        {"type": "input_image", "image_url": uri},
    ):
        chat = [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]
        assert torch.equal(processor(chat).input_ids, expected_ids)
    for part, reason in (
        ({"type": "image", "url": "https://example.com/a.png"}, "message 0: .*download the images first"),
        ({"type": "image", "image": "data:image/png;base64," + "A" * 60_000}, "message 0: .*no image"),
        ({"type": "image_url", "image_url": {}}, "message 0: .*expected"),
        ({"type": "image", "image": [uri, uri]}, "message 0: .*expected"),
        ({"type": "image"}, "message 0: a part of type 'image'"),
    ):
        with pytest.raises(RecordError, match=reason) as fault:
            processor([{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}])
        assert len(str(fault.value)) < 500
    damaged_uri = "data:image/png;base64," + base64.b64encode(content[:60]).decode()
    with pytest.raises(ImageError, match="message 0: its image: cannot be decoded"):
        processor(ask("What?", damaged_uri))


def test_transformers_generates_from_a_batch_what_the_assistant_answers(
    processor: BeingVLProcessor, folder: Path
) -> None:
    batch = processor([ask("What is it?", square_image("red")), [{"role": "user", "content": "Hello."}]])
    assert batch.input_ids.shape == batch.attention_mask.shape
    assert batch.attention_mask.tolist() == [
        [1] * batch.input_ids.shape[1],
        sorted(batch.attention_mask[1].tolist()),
    ]
    assert batch.attention_mask[1].sum() == len(
        processor([{"role": "user", "content": "Hello."}]).input_ids[0]
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    assistant = Assistant.load(folder, "cpu")
    stops = {"eos_token_id": assistant._stop_ids, "pad_token_id": processor.builder.pad_id}
    output = model.generate(
        **batch, max_new_tokens=6, do_sample=False, **stops, suppress_tokens=list(range(400, 500))
    )
    answers = processor.batch_decode(output[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    expected = assistant.answer(["What is it?", "Hello."], [[square_image("red")], []], max_new_tokens=6)
    assert [answer.strip() for answer in answers] == expected
    turns = (Turn("user", "Hello."),)
    assert np.array_equal(processor.prompts([turns], [[]])[0], processor.prompts(["Hello."], [[]])[0])


def test_it_is_saved_and_found_by_the_auto_class(processor: BeingVLProcessor, tmp_path: Path) -> None:
    assert type(processor) is BeingVLProcessor
    processor.save_pretrained(tmp_path / "new" / "copy")
    copy = AutoProcessor.from_pretrained(tmp_path / "new" / "copy")
    assert type(copy) is BeingVLProcessor
    chat = ask("What is it?", square_image("red"))
    assert torch.equal(copy(chat).input_ids, processor(chat).input_ids)
    assert AutoTokenizer.from_pretrained(tmp_path / "new" / "copy").get_vocab() == copy.tokenizer.get_vocab()


def test_what_is_no_chat_is_refused(processor: BeingVLProcessor, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="message 0 is 'W'; expected an object with 'role' and 'content'"):
        processor("What?")
    with pytest.raises(RecordError, match="no messages"):
        processor([])
    with pytest.raises(
        RecordError, match="message 0: role is 'tool'; expected 'system', 'user' or 'assistant'"
    ):
        processor([{"role": "tool", "content": "Be kind."}])
    with pytest.raises(RecordError, match="user first and last"):
        processor([{"role": "system", "content": "Be kind."}])
    with pytest.raises(RecordError, match="user first and last"):
        processor([*ask("What?"), {"role": "assistant", "content": "It."}])
    with pytest.raises(RecordError, match="message 0: a part of type 'video' of the user's; expected 'text'"):
        processor([{"role": "user", "content": [{"type": "video"}]}])
    with pytest.raises(RecordError, match="'text' without <image>, or"):
        processor([{"role": "user", "content": "<image>"}])
    with pytest.raises(ImageError, match=r"gone.png: cannot be read"):
        processor(ask("What?", tmp_path / "gone.png"))
    with pytest.raises(GridError, match="16"):
        processor(ask("What?", np.full((2, 2), 16)))
    with pytest.raises(ModelError, match=r"no being_vl.json; expected a model that `being-vl expand`"):
        BeingVLProcessor.from_pretrained(tmp_path)
