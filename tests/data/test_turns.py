"""Conversations in every dialect, which of their turns are learned, and fields that would change what they mean."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from being_vl.data.options import LossOptions
from being_vl.data.records import Record, Records
from being_vl.data.sequences import SequenceBuilder
from being_vl.data.turns import Turn
from being_vl.errors import RecordError
from helpers import tiny

ASK, ANSWER = {"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}
TURNS = (Turn("user", "What?"), Turn("assistant", "A cat."))
SYSTEM = Turn("system", "Be brief.")


def read(folder: Path, *items: Any) -> list[Record | RecordError]:
    path = folder / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, items)))
    return list(Records(path).read())


def chat(*texts: Any, **fields: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)], **fields}


DIALECTS = {
    "LLaVA": ({"conversations": [ASK, ANSWER]}, TURNS),
    "roles of chat data": ({"conversations": [{"role": "user", "content": "What?"}, ANSWER]}, TURNS),
    "roles of LLaVA in messages": ({"messages": [ASK, {"role": "model", "content": "A cat."}]}, TURNS),
    "messages": (chat("What?", "A cat."), TURNS),
    "parts": (chat([{"type": "text", "text": "What?"}], [{"type": "text", "text": "A cat."}]), TURNS),
    "a field of its own": ({"conversations": [ASK, ANSWER], "system": " Be brief. "}, (SYSTEM, *TURNS)),
    "an empty field": (chat("What?", "A cat.", system=""), TURNS),
    "system in both places, equal": (
        {"conversations": [{"from": "system", "value": "Be brief."}, ASK, ANSWER], "system": "Be brief."},
        (SYSTEM, *TURNS),
    ),
    "the Cauldron": (
        {
            "texts": [{"user": "What?", "assistant": "A cat.", "source": "vqa"}] * 2,
            "images": ["a.png", "b.png"],
        },
        TURNS * 2,
    ),
    "the Cauldron with placeholders": (
        {"texts": [{"user": "<image>What?", "assistant": "A cat."}], "images": ["a.png"]},
        (Turn("user", "<image>What?"), TURNS[1]),
    ),
    "caption": ({"image": "a.png", "caption": "\ufeffA cat."}, (TURNS[1],)),
    "caption as a note": ({"conversations": [ASK, ANSWER], "caption": "A cat."}, TURNS),
    "other dialects empty": (
        {"conversations": [], "messages": None, "texts": [], **chat("What?", "A cat.")},
        TURNS,
    ),
    "image where it stands": (
        chat(
            [{"type": "text", "text": "Is"}, {"type": "image"}, {"type": "text", "text": "red?"}],
            "No.",
            image="a",
        ),
        (Turn("user", "Is\n<image>\nred?"), Turn("assistant", "No.")),
    ),
    "notes": (
        {
            "conversations": [ASK | {"id": 3}, ANSWER | {"tool_calls": None, "images": []}],
            "source": "web",
            "url": "https://example.org/a.png",
            "width": 3,
            "score": 0.5,
            "split": "train",
            "tools": "[]",
            "video": None,
            "videos": [],
            "objects": ["cat"],
            "mask": 0,
            "model": "gpt",
            "path": "a.md",
        },
        TURNS,
    ),
    "where its image came from": (
        {
            "image": "a.png",
            "conversations": [ASK | {"value": "<image>What?"}, ANSWER],
            "image_url": "https://e.org/b",
        },
        (Turn("user", "<image>What?"), TURNS[1]),
    ),
}


@pytest.mark.parametrize(("item", "turns"), DIALECTS.values(), ids=DIALECTS)
def test_dialects(tmp_path: Path, item: dict[str, Any], turns: tuple[Turn, ...]) -> None:
    (record,) = read(tmp_path, item)
    assert isinstance(record, Record), record
    assert record.turns == turns


LLAVA = {"conversations": [ASK, ANSWER]}
CALL = [{"function": {"name": "look"}}]
REFUSED = {
    **{
        name: (LLAVA | {name: value}, f"the field '{name}' cannot be learned from")
        for name, value in {
            "video": "a.mp4",
            "videos": ["a.mp4"],
            "audio": {"path": "a.wav"},
            "audios": ["a.wav"],
            "speech": "a",
            "img": "a.png",
            "imgs": ["a.png"],
            "image_path": "a.png",
            "image_url": "https://e.org/a.png",
            "file_name": "cats/a.JPG",
            "pixel_values": [[0, 1]],
            "jpg": {"bytes": "x"},
            "image_base64": "iVBO",
            "bbox": [0, 0, 4, 4],
            "objects": {"ref": ["cat"], "bbox": [[0, 0, 4, 4]]},
            "masks": ["a.png"],
            "tools": '[{"name": "look"}]',
            "functions": [{"name": "look"}],
            "tool_calls": CALL,
            "chosen": "A cat.",
            "rejected": [ANSWER],
            "rejected_response": "A dog.",
            "history": [["Hi", "Hi."]],
            "system_prompt": "Be brief.",
            "chat_template_kwargs": {"enable_thinking": True},
        }.items()
    },
    "two dialects": (LLAVA | chat("What?", "A cat."), "both 'conversations' and 'messages'"),
    "two others": (chat("a", "b", texts=[{"user": "a", "assistant": "b"}]), "both 'messages' and 'texts'"),
    "two system turns": (
        {"conversations": [{"from": "system", "value": "Be long."}, ASK, ANSWER], "system": "Be brief."},
        "two system turns, 'system' and 'conversations[0]'",
    ),
    "system that is no text": (LLAVA | {"system": ["Be brief."]}, "'system' is a JSON list"),
    "image in the system field": (LLAVA | {"system": "<image>"}, "<image> in its 'system'"),
    "tool": ({"messages": [ASK, {"role": "tool", "content": "{}"}]}, "'messages[1]' is from 'tool'"),
    "observation": ({"conversations": [ASK, {"from": "observation", "value": "x"}]}, "is from 'observation'"),
    "call": ({"messages": [ASK, ANSWER | {"tool_calls": CALL}]}, "'messages[1]' has the field 'tool_calls'"),
    "thought": (
        {"messages": [ASK, ANSWER | {"reasoning_content": "Hm."}]},
        "has the field 'reasoning_content'",
    ),
    "image of a turn": ({"messages": [ASK | {"images": ["a.png"]}, ANSWER]}, "has the field 'images'"),
    "two texts": ({"conversations": [ASK | {"content": "Why?"}, ANSWER]}, "has both 'value' and 'content'"),
    "text of the Cauldron": (
        {"texts": [{"user": "What?", "assistant": None}]},
        "'texts[0]' has a 'assistant' that is",
    ),
    "texts of OBELICS": ({"texts": ["A cat.", None]}, "'texts[0]' is a JSON string"),
    "instructions": ({"instruction": "Describe.", "output": "A cat."}, "(it has instruction, output)"),
    "share of loss": (
        {"messages": [ASK, ANSWER | {"weight": 0.5}]},
        "has a 'weight' of 0.5; expected true or false",
    ),
    "loss as a text": ({"messages": [ASK, ANSWER | {"loss": "no"}]}, "has a 'loss' of 'no'"),
    "loss on a question": (
        {"messages": [ASK | {"loss": True}, ANSWER]},
        "is no answer; the option sequences.loss",
    ),
    "loss_scale": ({"messages": [ASK, ANSWER | {"loss_scale": [0.1]}]}, "has the field 'loss_scale'"),
}


@pytest.mark.parametrize(("item", "message"), REFUSED.values(), ids=REFUSED)
def test_what_would_change_the_meaning_is_named(tmp_path: Path, item: dict[str, Any], message: str) -> None:
    (error,) = read(tmp_path, item)
    assert isinstance(error, RecordError), error
    assert message in str(error)


def learned_text(record: Record, **weights: float) -> str:
    builder = SequenceBuilder(tiny.tokenizer(), loss=LossOptions(**weights))
    (sequence,) = builder.build([record])
    return builder.tokenizer.decode(sequence.ids[sequence.weights > 0])


def test_answers_that_say_so_carry_no_loss(tmp_path: Path) -> None:
    losses: list[dict[str, Any]] = [
        {"loss": False},
        {"weight": 0},
        {"train": False},
        {"training": False, "loss": True},
    ]
    turns = [ASK, ANSWER, ASK, {"from": "gpt", "value": "A dog."}]
    items = [{"conversations": [*turns[:1], ANSWER | loss, *turns[2:]]} for loss in losses]
    items += [{"conversations": [*turns[:3], turns[3] | {"loss": True, "weight": 1.0, "train": None}]}]
    exchanges = [
        {"user": "What?", "assistant": "A cat.", "weight": 0},
        {"user": "What?", "assistant": "A dog."},
    ]
    *records, learned_wholly, exchange_record = read(tmp_path, *items, {"texts": exchanges})
    for record in [*records, exchange_record]:
        assert isinstance(record, Record)
        assert [turn.has_loss for turn in record.turns] == [True, False, True, True]
        assert learned_text(record).replace("<|end_of_text|>", "").strip() == "A dog."
        assert "What?" in learned_text(record, questions=1)
    assert isinstance(learned_wholly, Record)
    assert all(turn.has_loss for turn in learned_wholly.turns)
    assert "A cat." in learned_text(learned_wholly)


def test_questions_that_say_so_carry_no_loss_where_others_do(tmp_path: Path) -> None:
    turns = [ASK | {"value": "Who?", "weight": 0}, ANSWER, ASK, ANSWER]
    (record,) = read(tmp_path, {"conversations": turns})
    assert isinstance(record, Record)
    text = learned_text(record, questions=1)
    assert "What?" in text
    assert "Who?" not in text


def test_a_record_of_which_no_answer_is_learned_is_a_fault(tmp_path: Path) -> None:
    (record,) = read(tmp_path, {"conversations": [ASK, ANSWER | {"loss": False}]})
    assert isinstance(record, Record)
    with pytest.raises(RecordError, match="no answer to learn from"):
        SequenceBuilder(tiny.tokenizer()).build([record])


LONG = base64.b64encode(bytes(range(256)) * 270).decode()
PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(67_500)).decode()


@pytest.mark.parametrize(
    "text", [LONG, PNG, f"data:image/png;base64,{LONG}", "\n\x1b[31m\u202e\0" * 20_000], ids=len
)
def test_no_message_is_longer_than_a_few_lines(tmp_path: Path, text: str) -> None:
    values = [
        text,
        [text],
        [[text]],
        {text: text},
        {"url": text},
        {"type": text},
        [{"type": "image", "image": text}],
    ]
    names = [
        "id",
        "category",
        "image",
        "images",
        "conversations",
        "messages",
        "texts",
        "caption",
        "system",
        "img",
        text,
    ]
    items: list[Any] = [LLAVA | {name: value} for name in (*names, text) for value in values]
    items += [
        {"messages": [ASK, ANSWER | {key: value}]}
        for key in ("from", "value", "loss", text)
        for value in values
    ]
    items += [{"messages": [{"role": "user", "content": [value]}, ANSWER]} for value in values]
    items += [text, [text], {text: text, "x" + text: 3}]
    errors = [error for error in read(tmp_path, *items) if isinstance(error, RecordError)]
    assert len(errors) > 60
    for error in errors:
        assert len(str(error)) < 1000
        assert str(error).isprintable()
    records = [record for record in read(tmp_path, *items) if isinstance(record, Record)]
    assert all(len(record.location) < 1000 for record in records)
