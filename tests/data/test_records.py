"""LLaVA JSON as users have it, good and bad."""

import json
from pathlib import Path
from typing import Any

import pytest

from being_vl.data.records import Record, Records, Turn
from being_vl.errors import RecordError

ASK = {"from": "human", "value": "<image>\nWhat is it?"}
ANSWER = {"from": "gpt", "value": "A cat."}


def write(folder: Path, content: Any, name: str = "data.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_reads_one_image_several_images_text_only_and_many_turns(tmp_path: Path) -> None:
    first_path = write(
        tmp_path,
        [
            {"id": 7, "image": "a/x.png", "conversations": [ASK, ANSWER], "category": "perception"},
            {
                "image": ["a.png", "b.png"],
                "conversations": [
                    {"from": "human", "value": "Is <image> like <image>?"},
                    {"from": "gpt", "value": " Yes. \n"},
                    {"from": "human", "value": "Why?"},
                    {"from": "gpt", "value": "Both are cats."},
                ],
            },
        ],
    )
    second_path = write(
        tmp_path, [{"id": "t", "conversations": [{"from": "human", "value": "Hi"}, ANSWER]}], "b.json"
    )
    records = list(Records([first_path, second_path], default_category="instruction"))
    assert records == [
        Record(
            "7",
            ("a/x.png",),
            (Turn("user", "<image>\nWhat is it?"), Turn("assistant", "A cat.")),
            "perception",
            first_path,
            0,
        ),
        Record(
            "1",
            ("a.png", "b.png"),
            (
                Turn("user", "Is <image> like <image>?"),
                Turn("assistant", "Yes."),
                Turn("user", "Why?"),
                Turn("assistant", "Both are cats."),
            ),
            "instruction",
            first_path,
            1,
        ),
        Record("t", (), (Turn("user", "Hi"), Turn("assistant", "A cat.")), "instruction", second_path, 0),
    ]
    assert list(Records(str(first_path))) == list(Records([first_path]))


def test_utf8_with_bom_is_read(tmp_path: Path) -> None:
    path = tmp_path / "bom.json"
    turns = [{"from": "human", "value": "Was ist größer?"}, ANSWER]
    path.write_text(json.dumps([{"conversations": turns}]), encoding="utf-8-sig")
    assert next(iter(Records(path))).turns[0].text == "Was ist größer?"


def make_item(**changes: Any) -> dict[str, Any]:
    record = {"id": "x", "image": "a.png", "conversations": [ASK, ANSWER]} | changes
    return {key: value for key, value in record.items() if value is not ...}


FAULTS = {
    "field missing": (make_item(conversations=...), "no field 'conversations' or 'messages'"),
    "not an object": ("text", "a JSON string; expected an object"),
    "null": (None, "a JSON null; expected an object"),
    "category": (make_item(category="perceptoin"), "'category' is 'perceptoin'; expected one of foundation"),
    "image type": (make_item(image=3), "'image' holds 3"),
    "image empty": (make_item(image=""), "1 <image> in 'conversations' for 0 images"),
    "images type": (make_item(image=["a.png", None]), "'image' holds None"),
    "no turns": (make_item(conversations=[]), "'conversations' is empty"),
    "turns type": (make_item(conversations={}), "'conversations' is a JSON object"),
    "turn type": (make_item(conversations=["hi"]), "'conversations[0]' is a JSON string"),
    "no from": (make_item(conversations=[{"value": "x"}]), "'conversations[0]' has no 'from'"),
    "no value": (make_item(conversations=[ASK, {"from": "gpt"}]), "'conversations[1]' has no 'value'"),
    "value type": (
        make_item(conversations=[ASK, {"from": "gpt", "value": 3}]),
        "'value' that is a JSON number",
    ),
    "unknown from": (
        make_item(conversations=[{"from": "tool", "value": "Be nice."}, ASK, ANSWER]),
        "'conversations[0]' is from 'tool'; expected 'human' or 'gpt'",
    ),
    "gpt first": (
        make_item(conversations=[ANSWER, ASK]),
        "'conversations[0]' is from 'gpt'; expected 'human' first",
    ),
    "system later": (
        make_item(conversations=[ASK, ANSWER, {"from": "system", "value": "x"}, ASK, ANSWER]),
        "'conversations[2]' is from 'system'; expected 'human' first",
    ),
    "image in system": (
        make_item(conversations=[{"from": "system", "value": "<image>"}, ASK, ANSWER]),
        "'conversations[0]' has <image> in a system turn",
    ),
    "system alone": (make_item(conversations=[{"from": "system", "value": "x"}]), "ends with a question"),
    "caption without image": (
        make_item(conversations=..., image=..., caption="A cat."),
        "'caption' has no image",
    ),
    "empty caption": (make_item(conversations=..., caption=" "), "'caption' is empty"),
    "caption type": (make_item(conversations=..., caption=["A"]), "'caption' is a JSON list"),
    "image in caption": (make_item(conversations=..., caption="<image> A cat."), "<image> in its 'caption'"),
    "human twice": (make_item(conversations=[ASK, ASK, ANSWER]), "'conversations[1]' is from 'human'"),
    "gpt twice": (make_item(conversations=[ASK, ANSWER, ANSWER]), "'conversations[2]' is from 'gpt'"),
    "empty answer": (
        make_item(conversations=[ASK, {"from": "gpt", "value": " \n"}]),
        "'conversations[1]' is an empty",
    ),
    "image in answer": (
        make_item(conversations=[ASK, {"from": "gpt", "value": "<image>"}]),
        "'conversations[1]' has <image> in an answer",
    ),
    "half a character": (
        make_item(conversations=[ASK, {"from": "gpt", "value": "ok \ud83d"}]),
        "'conversations[1]' holds '\\ud83d', half of a character, at 3; expected Unicode text",
    ),
    "no answer": (make_item(conversations=[ASK]), "ends with a question"),
    "too few images": (make_item(image=...), "1 <image> in 'conversations' for 0 images"),
    "no marker": (
        make_item(conversations=[{"from": "human", "value": "What is it?"}, ANSWER]),
        "0 <image> in 'conversations' for 1 image; expected as many, unless images_in_front is set",
    ),
    "too many images": (make_item(image=["a", "b"]), "1 <image> in 'conversations' for 2 images"),
}


@pytest.mark.parametrize(("record", "message"), FAULTS.values(), ids=FAULTS)
def test_a_bad_record_is_named_with_its_file_and_what_is_wrong(
    tmp_path: Path, record: Any, message: str
) -> None:
    path = write(tmp_path, [make_item(), make_item(), record])
    with pytest.raises(RecordError) as error:
        list(Records(path))
    text = str(error.value)
    assert message in text
    assert text.startswith(f"{path}: record 2")
    assert "\n" not in text
    if isinstance(record, dict):
        assert "(id 'x')" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"id": 1},\n {"id": }]', "line 2, column 9: not JSON"),
        (
            '{"id": 1}\n{"id": 2}',
            "line 2, column 1: not JSON (Extra data; JSON lines go by the suffix .jsonl)",
        ),
        ("", "line 1, column 1: not JSON"),
        ('{"id": 1}', "a JSON object; expected a JSON list of records"),
        ("[]", "an empty list; expected a JSON list of records"),
    ],
)
def test_a_file_that_is_no_list_of_records_says_where(tmp_path: Path, content: str, message: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(RecordError) as error:
        list(Records([path]))
    assert str(error.value).startswith(f"{path}: {message}")


def test_a_missing_file_a_folder_and_a_binary_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"gone\.json: no such file"):
        list(Records(tmp_path / "gone.json"))
    with pytest.raises(RecordError, match=r"no file of records found in the folder; expected \.json"):
        list(Records(tmp_path))
    (tmp_path / "binary.json").write_bytes(b"[\xff\xfe]")
    with pytest.raises(RecordError, match=r"binary\.json: byte 1: not UTF-8"):
        list(Records(tmp_path / "binary.json"))


def test_a_wrong_default_category_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="default category is 'other'"):
        list(Records(write(tmp_path, [make_item()]), default_category="other"))


def test_bad_records_come_as_errors_in_their_places(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        [
            make_item(),
            make_item(category="x"),
            make_item(),
            make_item(image=...),
            make_item(conversations=[]),
        ],
    )
    results = list(Records(path).read())
    assert [record.index for record in results if isinstance(record, Record)] == [0, 2]
    assert [isinstance(record, RecordError) for record in results] == [
        False,
        True,
        False,
        True,
        True,
    ]
    for number in (1, 3, 4):
        assert str(results[number]).startswith(f"{path}: record {number} (id")


def test_a_system_turn_and_a_caption_are_read(tmp_path: Path) -> None:
    system = {"from": "system", "value": "Be nice."}
    path = write(
        tmp_path,
        [
            make_item(conversations=[system, ASK, ANSWER]),
            make_item(conversations=[{"from": "system", "value": ""}, ASK, ANSWER]),
            make_item(conversations=..., caption=" A cat. "),
        ],
    )
    first_record, second_record, caption = list(Records(path))
    assert first_record.turns == (Turn("system", "Be nice."), *second_record.turns)
    assert [turn.role for turn in second_record.turns] == ["user", "assistant"]
    assert caption.turns == (Turn("assistant", "A cat."),)


def test_categories_are_those_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path, [make_item(), make_item(category="charts")])
    with pytest.raises(
        RecordError,
        match=r"'category' is 'charts'; expected one of foundation, perception, reasoning, instruction$",
    ):
        list(Records(path))
    write(tmp_path, [make_item(category=...), make_item(category="foundation")])
    records = Records(path, "charts", ["foundation", "charts"])
    numbers_of_categories = {name: numbers.tolist() for name, numbers in records.group_by_category().items()}
    assert numbers_of_categories == {"charts": [0], "foundation": [1]}


def test_part_of_the_records_of_several_files(tmp_path: Path) -> None:
    paths = []
    for number, count in enumerate((3, 1, 4)):
        paths.append(tmp_path / f"{number}.jsonl")
        paths[-1].write_text("\n".join(json.dumps(make_item(id=f"{number}-{n}")) for n in range(count)))
    records = Records(paths)
    every = [record.id for record in records if not isinstance(record, RecordError)]
    for start in range(9):
        for stop in range(start, 9):
            part = records.read(start, stop)
            assert [r.id for r in part if not isinstance(r, RecordError)] == every[start:stop]
            places = [(records.paths[f], i) for f, a, b in records.parts(start, stop) for i in range(a, b)]
            assert places == [(r.source, r.index) for r in (records[n] for n in range(start, stop))]
