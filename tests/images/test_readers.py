"""Files of records of every kind: the same records, in turn and by number, and what is wrong with a file."""

import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from being_vl.data.records import Record, Records
from being_vl.errors import RecordError
from being_vl.images import readers
from being_vl.images.readers import open_records
from being_vl.images.sources import find_images


def item(number: int) -> dict[str, Any]:
    return {
        "id": f"größe-{number}",
        "image": f"{number}.png",
        "category": ("foundation", "reasoning")[number % 3 == 0],
        "conversations": [
            {"from": "human", "value": f"<image>\nWhat is {number}, [a] {{b}}, \"c\" \\ '€'?"},
            {"from": "gpt", "value": "A number. " * (number % 5 + 1)},
        ],
    }


ITEMS = [item(number) for number in range(50)]


def write_json(path: Path) -> None:
    path.write_text(json.dumps(ITEMS, ensure_ascii=False, indent=1), encoding="utf-8-sig")


def write_lines(path: Path) -> None:
    lines = [json.dumps(item, ensure_ascii=False) for item in ITEMS]
    path.write_text("\n\n".join(lines), encoding="utf-8-sig")


def write_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ITEMS), path, row_group_size=7)


def write_arrow(path: Path) -> None:
    table = pa.Table.from_pylist(ITEMS)
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


def write_arrow_file(path: Path) -> None:
    table = pa.Table.from_pylist(ITEMS)
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


def write_tar(path: Path, image: bool = False, format: int = tarfile.PAX_FORMAT) -> None:
    with tarfile.open(path, "w", format=format) as tar:
        for number, record in enumerate(ITEMS):
            parts = {"json": json.dumps(record if not image else {**record, "image": None}).encode()}
            if image:
                parts = {"png": b"pixels", **parts}
            for suffix, data in parts.items():
                info = tarfile.TarInfo(f"{'deep/' * 30}größe/{number:03d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


WRITERS = {
    "list.json": write_json,
    "lines.jsonl": write_lines,
    "table.parquet": write_parquet,
    "table.arrow": write_arrow,
    "file.arrow": write_arrow_file,
    "web.tar": write_tar,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_records_in_turn_and_by_number(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "WINDOW", 100)
    path = tmp_path / name
    WRITERS[name](path)
    reader = pickle.loads(pickle.dumps(open_records(path)))
    assert len(reader) == 50
    assert list(reader.read(0, len(reader))) == ITEMS
    assert [reader[number] for number in (49, 0, 7, 6, 13)] == [ITEMS[number] for number in (49, 0, 7, 6, 13)]


def test_records_of_several_files_are_numbered_through_and_sorted_by_category(tmp_path: Path) -> None:
    for name, write in WRITERS.items():
        write(tmp_path / name)
    records = Records([tmp_path / name for name in WRITERS])
    all_records = list(records)
    assert len(records) == len(all_records) == 300
    assert [records[number] for number in range(300)] == all_records
    assert all_records[250].source == tmp_path / "web.tar"
    assert all_records[250].index == 0
    for category, numbers in records.group_by_category().items():
        assert numbers.tolist() == [n for n, record in enumerate(all_records) if record.category == category]
    with pytest.raises(IndexError, match="there are 300 records"):
        records[300]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(
    values=st.lists(json_values, min_size=1),
    window=st.integers(1, 40),
    indent=st.sampled_from([None, 0, 3]),
    ascii_only=st.booleans(),
)
def test_any_json_list_is_read_element_by_element(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], window: int, indent: int, ascii_only: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "WINDOW", window)
        assert list(open_records(path).read(0, len(values))) == values


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"id": 1}, {"id": 2}', "line 1, column 22: not JSON"),
        ('[{"id": 1}\n {"id": 2}]', "line 2, column 2: not JSON (Expecting ',' delimiter)"),
        ('[{"id": "größe"},\n\n{"größe": 3 4}]', "line 3, column 13: not JSON (Expecting ',' delimiter)"),
        ("[1, 2,]", "line 1, column 7: not JSON"),
        ("[1, 2] 3", "line 1, column 8: not JSON (Extra data)"),
        ("[1] ]", "line 1, column 5: not JSON (Extra data)"),
        ("[", "line 1, column 2: not JSON"),
        ('"[1]"', "a JSON string; expected a JSON list"),
        ("[ ]", "an empty list"),
    ],
)
@pytest.mark.parametrize("window", [1, 7, 1000])
def test_a_damaged_json_list_says_where(
    tmp_path: Path, content: str, message: str, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "WINDOW", window)
    path = tmp_path / "list.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(RecordError) as error:
        open_records(path)
    assert str(error.value).startswith(f"{path}: {message}")


def test_a_json_list_that_is_not_closed_is_not_read_as_one_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "WINDOW", 100)
    monkeypatch.setattr(readers, "MAX_ELEMENT", 1000)
    path = tmp_path / "list.json"
    path.write_text('[{"id": "' + "x" * 100_000, encoding="utf-8")
    with pytest.raises(RecordError, match=r"line 1, column 9: not JSON \(Unterminated string"):
        open_records(path)


def test_a_damaged_line_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    lines = [json.dumps(ITEMS[0]).encode(), b'{"id": \xe9}', b'{"id": }', json.dumps(ITEMS[1]).encode()]
    path.write_bytes(b"\r\n".join(lines))
    first_record, latin_error, json_error, last_record = open_records(path).read(0, 4)
    assert [first_record, last_record] == ITEMS[:2]
    place = len(lines[0]) + 2 + 7
    assert str(latin_error) == f"{path}: record 1: byte {place} of the file: not UTF-8; expected a record"
    assert str(json_error) == f"{path}: record 2: column 8: not JSON (Expecting value); expected a record"
    with pytest.raises(RecordError, match="record 1: byte"):
        list(Records(path))


@pytest.mark.parametrize("name", ["list.json", "lines.jsonl"])
def test_json_that_is_nested_too_deeply_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("[" * 100_000)
    with pytest.raises(RecordError, match=rf"{name}: .*nested too deeply"):
        list(Records(path))


@pytest.mark.parametrize("name", ["table.parquet", "table.arrow"])
def test_a_row_that_is_not_utf8_is_a_fault_of_its_own(tmp_path: Path, name: str) -> None:
    texts = pa.array([b"gr\xf6\xdfe" if n == 5 else f"{n}".encode() for n in range(9)], pa.binary())
    captions = pa.StringArray.from_buffers(9, *texts.buffers()[1:])
    table = pa.table({"image": [f"{n}.png" for n in range(9)], "caption": captions})
    if name.endswith("parquet"):
        pq.write_table(table, tmp_path / name)
    else:
        with pa.ipc.new_stream(tmp_path / name, table.schema) as writer:
            writer.write_table(table)
    records = Records(tmp_path / name)
    records_read = list(records.read())
    assert [record.index for record in records_read if isinstance(record, Record)] == [0, 1, 2, 3, 4, 6, 7, 8]
    error_record = records_read[5]
    assert isinstance(error_record, RecordError)
    assert error_record.kind == "wrong encoding"
    assert str(error_record).startswith(f"{tmp_path / name}: record 5: a text that is not UTF-8")
    assert records[6] == records_read[6]
    with pytest.raises(RecordError, match="record 5: a text that is not UTF-8"):
        records[5]


NUMBER, DEEP = "9" * 5000, "[" * 5000 + "]" * 5000


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("list.json", NUMBER),
        ("lines.jsonl", NUMBER),
        ("lines.jsonl", DEEP),
        ("web.tar", NUMBER),
        ("web.tar", DEEP),
    ],
    ids=["list-number", "lines-number", "lines-deep", "tar-number", "tar-deep"],
)
def test_json_that_python_cannot_hold_is_a_fault_of_its_record(tmp_path: Path, name: str, value: str) -> None:
    path = tmp_path / name
    items = [json.dumps(ITEMS[0]), '{"id": ' + value + "}", json.dumps(ITEMS[1])]
    if name == "web.tar":
        with tarfile.open(path, "w") as tar:
            for number, text in enumerate(items):
                info = tarfile.TarInfo(f"{number}.json")
                info.size = len(text)
                tar.addfile(info, io.BytesIO(text.encode()))
    else:
        path.write_text("[" + ",".join(items) + "]" if name == "list.json" else "\n".join(items))
    first_record, error_record, last_record = open_records(path).read(0, 3)
    assert [first_record["id"], last_record["id"]] == [ITEMS[0]["id"], ITEMS[1]["id"]]
    assert isinstance(error_record, RecordError)
    assert error_record.kind == "not JSON"
    assert str(error_record).startswith(f"{path}: record 1")


def test_messages_of_chat_data_are_read(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    lines = [
        {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A cat."}]},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi."}]},
    ]
    path.write_text(json.dumps(lines[0] | {"images": ["a.png"]}) + "\n" + json.dumps(lines[1]))
    first_record, second_record = list(Records(path))
    assert first_record.images == ("a.png",)
    assert [turn.text for turn in first_record.turns] == ["<image>\nWhat?", "A cat."]
    assert second_record.images == ()
    path.write_text(json.dumps({"messages": [{"role": "tool", "content": "Be nice."}]}))
    with pytest.raises(RecordError, match=r"'messages\[0\]' is from 'tool'; expected 'user' or 'assistant'"):
        list(Records(path))


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_images_of_a_tar_have_the_keys_that_quantize_gives_them(tmp_path: Path, format: int) -> None:
    path = tmp_path / "web.tar"
    write_tar(path, image=True, format=format)
    keys = [f"{tmp_path}/{source.key}" for source in find_images(path).sources]
    assert [record.images for record in list(Records(path))] == [(key,) for key in keys]
    assert Records(path)[31].images == (keys[31],)


@pytest.mark.parametrize("name", ["table.parquet", "table.arrow"])
@pytest.mark.parametrize(
    "image", [{"bytes": b"pixels", "path": None}, {"bytes": b"pixels"}, b"pixels"], ids=str
)
def test_images_of_a_table_have_the_keys_that_quantize_gives_them(
    tmp_path: Path, name: str, image: Any
) -> None:
    path = tmp_path / name
    rows = [{**record, "image": None if n == 3 else image} for n, record in enumerate(ITEMS)]
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=7)
    else:
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    keys = [f"{tmp_path}/{source.key}" for source in find_images(path).sources]
    assert Records(path)[31].images == (keys[31],)
    faulty_record, *others = sorted(Records(path).read(), key=lambda record: isinstance(record, Record))
    assert [record.images for record in others if isinstance(record, Record)] == [
        (key,) for key in keys if key != keys[3]
    ]
    assert str(faulty_record).endswith("1 <image> in 'conversations' for 0 images; expected as many")


@pytest.mark.parametrize("name", ["lines.jsonl", "web.tar", "table.parquet", "table.arrow"])
def test_files_that_are_empty_or_not_of_their_kind_are_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"")
    with pytest.raises(RecordError, match=name):
        open_records(path)
    path.write_bytes(b"\x00nonsense" * 1000)
    with pytest.raises(RecordError, match=name):
        list(Records(path))


def test_a_sample_without_a_record_is_named(tmp_path: Path) -> None:
    path = tmp_path / "web.tar"
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo("0.png"))
    with pytest.raises(RecordError, match=r"record 0 \(0\.png\): no \.json or \.txt beside it"):
        list(Records(path))


def test_a_member_whose_name_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "web.tar"
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo("gr\udcf6n.json"))
    (error_record,) = Records(path).read()
    assert isinstance(error_record, RecordError)
    assert str(error_record).encode().startswith(f"{path}: record 0 (gr\\udcf6n.json): ".encode())


def test_a_text_beside_an_image_of_a_tar_is_its_caption(tmp_path: Path) -> None:
    path = tmp_path / "web.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in {
            "0.png": b"x",
            "0.txt": "Ein Kätzchen.".encode(),
            "1.txt": b"\xff",
            "1.png": b"x",
        }.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    caption, error_record = Records(path).read()
    assert not isinstance(caption, RecordError)
    assert caption.images == (f"{path}/0.png",)
    assert [(turn.role, turn.text) for turn in caption.turns] == [("assistant", "Ein Kätzchen.")]
    assert isinstance(error_record, RecordError)
    assert error_record.kind == "wrong encoding"
    assert "record 1 (1.txt): its .txt is not UTF-8" in str(error_record)


def make_tar(path: Path, members: list[tuple[str, bytes | str | dict[str, Any]]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            text = content if isinstance(content, str | bytes) else json.dumps(content)
            data = text if isinstance(text, bytes) else text.encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


TURNS = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A cat."}]
IMAGE2DATASET = {"url": "https://e.org/a.jpg", "key": "0", "status": "success", "width": 4, "caption": None}
SAMPLES: dict[str, tuple[list[tuple[str, Any]], list[str], str]] = {
    "text beside a json without one": (
        [("0.jpg", b"x"), ("0.json", IMAGE2DATASET), ("0.txt", "A cat.")],
        ["0.jpg"],
        "A cat.",
    ),
    "caption of the json": (
        [("0.json", {"caption": "A cat."}), ("0.jpg", b"x"), ("0.txt", "")],
        ["0.jpg"],
        "A cat.",
    ),
    "conversation of the json": (
        [("0.json", {"conversations": TURNS}), ("0.txt", "No."), ("0.png", b"x")],
        ["0.png"],
        "A cat.",
    ),
    "byte order marks": ([("0.png", b"x"), ("0.txt", "\ufeffA cat.")], ["0.png"], "A cat."),
    "byte order mark of the json": (
        [("0.png", b"x"), ("0.json", '\ufeff{"caption": "A cat."}')],
        ["0.png"],
        "A cat.",
    ),
    "upper case": ([("0.PNG", b"x"), ("0.TXT", "A cat.")], ["0.PNG"], "A cat."),
    "members that stand apart": (
        [
            ("1.png", b"x"),
            ("0.png", b"x"),
            ("2.png", b"x"),
            ("2.txt", "-"),
            ("0.txt", "A cat."),
            ("1.txt", "-"),
        ],
        ["0.png"],
        "A cat.",
    ),
    "a later member of its name": (
        [("0.png", b"x"), ("0.txt", "A dog."), ("0.txt", "A cat.")],
        ["0.png"],
        "A cat.",
    ),
    "other jsons": (
        [("0.json", {"caption": "A cat."}), ("0.meta.json", {}), ("0.png", b"x")],
        ["0.png"],
        "A cat.",
    ),
    "bystanders": (
        [
            ("._0.png", b"x"),
            ("0.png", b"x"),
            ("0.txt", "A cat."),
            ("0.cls", b"3"),
            ("README.md", b"x"),
            ("._0.txt", b"\xff"),
        ],
        ["0.png"],
        "A cat.",
    ),
    "named as written": (
        [("b/0.png", b"x"), ("a/0.json", {"image": "b/0.png", "conversations": TURNS}), ("b/0.txt", "-")],
        ["b/0.png"],
        "A cat.",
    ),
    "named beside the json": (
        [("a/1.png", b"x"), ("a/0.json", {"images": ["./1.png"], "conversations": TURNS}), ("a/1.txt", "-")],
        ["a/1.png"],
        "A cat.",
    ),
    "named in a part": (
        [
            ("a/1.png", b"x"),
            ("a/1.txt", "-"),
            (
                "a/0.json",
                {
                    "messages": [
                        {"role": "user", "content": [{"type": "image", "image": "1.png"}]},
                        {"role": "assistant", "content": "A cat."},
                    ]
                },
            ),
        ],
        ["a/1.png"],
        "A cat.",
    ),
}


@pytest.mark.parametrize(("members", "images", "answer"), SAMPLES.values(), ids=SAMPLES)
def test_samples_of_tars(
    tmp_path: Path, members: list[tuple[str, Any]], images: list[str], answer: str
) -> None:
    path = make_tar(tmp_path / "00000.tar", members)
    records = list(Records(path))
    (record,) = (record for record in records if record.turns[-1].text == answer)
    assert record.images == tuple(f"{path}/{name}" for name in images)
    assert all(record == records[n] for n, record in enumerate(Records(path)))
    assert [Records(path)[n] for n in reversed(range(len(records)))] == records[::-1]


def test_a_name_that_the_tar_has_not_is_one_of_another_file(tmp_path: Path) -> None:
    item = {"image": "coco/1.png", "conversations": TURNS}
    (record,) = Records(make_tar(tmp_path / "a.tar", [("0.json", item), ("0.png", b"x")]))
    assert record.images == ("coco/1.png",)


def test_an_updated_tar_pairs_the_new_text_with_the_new_image(tmp_path: Path) -> None:
    path = make_tar(
        tmp_path / "a.tar", [("0.png", b"old"), ("0.txt", "Old."), ("1.png", b"x"), ("1.txt", "B.")]
    )
    make_tar(path, [("0.txt", "New."), ("0.png", b"new")], "a")
    assert [(record.images, record.turns[0].text) for record in Records(path)] == [
        ((f"{path}/0.png",), "New."),
        ((f"{path}/1.png",), "B."),
    ]


FAULTY_SAMPLES: dict[str, tuple[list[tuple[str, Any]], str]] = {
    "no text": ([("0.png", b"x")], "(0.png): no .json or .txt beside it"),
    "no image": ([("0.txt", "A cat.")], "its 'caption' has no image"),
    "empty text": ([("0.png", b"x"), ("0.txt", "\ufeff \n")], "its 'caption' is empty"),
    "two texts": (
        [("0.png", b"x"), ("0.a.txt", "A."), ("0.b.txt", "B.")],
        "has 0.a.txt and 0.b.txt; expected one .txt",
    ),
    "image in the json": (
        [("0.json", {"image": "data:image/gif,GIF89a", "conversations": TURNS})],
        "'image' holds an image itself; expected the image as a member of the tar",
    ),
    "list": ([("0.png", b"x"), ("0.json", "[]")], "a JSON list; expected an object"),
    "no UTF-8": ([("0.png", b"x"), ("0.json", b"\xff")], "its .json is not UTF-8"),
    "name that is not UTF-8": ([("gr\udcf6n.txt", "A cat.")], r"(gr\udcf6n.txt): a name that is not UTF-8"),
}


@pytest.mark.parametrize(("members", "message"), FAULTY_SAMPLES.values(), ids=FAULTY_SAMPLES)
def test_samples_with_faults_are_named_and_stop_no_other(
    tmp_path: Path, members: list[tuple[str, Any]], message: str
) -> None:
    path = make_tar(tmp_path / "a.tar", [*members, ("x.png", b"x"), ("x.txt", "A dog.")])
    records = list(Records(path).read())
    (error,) = (record for record in records if isinstance(record, RecordError))
    assert message in str(error)
    assert [record.turns[0].text for record in records if isinstance(record, Record)] == ["A dog."]


@pytest.mark.parametrize("blocks", [0, 2, 3])
def test_a_tar_that_is_cut_off_is_noticed_also_between_members(tmp_path: Path, blocks: int) -> None:
    path = make_tar(
        tmp_path / "a.tar", [("0.png", b"x"), ("0.txt", "A cat."), ("1.png", b"x"), ("1.txt", "-")]
    )
    path.write_bytes(path.read_bytes()[: 512 * (4 + blocks)])
    with pytest.raises(RecordError, match=r"a\.tar: not a complete uncompressed tar file"):
        open_records(path)


IMAGE = {"bytes": b"pixels", "path": None}
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
COLUMNS: dict[str, tuple[str, pa.Array, list[list[str] | None]]] = {
    "structs": ("image", pa.array([IMAGE, None, {"bytes": None, "path": None}], STRUCT), [[""], None, None]),
    "paths in structs": ("image", pa.array([{"path": "a.png"}, IMAGE], STRUCT), [[""], [""]]),
    "binary": ("image", pa.array([b"x", None]), [[""], None]),
    "large binary": ("images", pa.array([None, b"x"], pa.large_binary()), [None, [""]]),
    "views of binary": ("image", pa.array([b"x", None], pa.binary_view()), [[""], None]),
    "dictionary of binary": ("image", pa.array([b"x", None]).dictionary_encode(), [[""], None]),
    "lists of structs": (
        "images",
        pa.array([[IMAGE] * 2, [], None], pa.list_(STRUCT)),
        [["/0", "/1"], None, None],
    ),
    "large lists": ("images", pa.array([[IMAGE], None], pa.large_list(STRUCT)), [["/0"], None]),
    "lists of binary": (
        "image",
        pa.array([[b"x"], [b"y", b"z"]], pa.list_(pa.binary())),
        [["/0"], ["/0", "/1"]],
    ),
    "names": ("image", pa.array(["a.png", None]), [["a.png"], None]),
    "large names": ("image", pa.array(["a.png", None], pa.large_string()), [["a.png"], None]),
    "views of names": ("image", pa.array(["a.png", None], pa.string_view()), [["a.png"], None]),
    "dictionary of names": (
        "image",
        pa.array(["a.png", "a.png"]).dictionary_encode(),
        [["a.png"], ["a.png"]],
    ),
    "lists of names": (
        "images",
        pa.array([["a.png", "b.png"], []], pa.large_list(pa.string())),
        [["a.png", "b.png"], None],
    ),
}


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize(("name", "column", "images"), COLUMNS.values(), ids=COLUMNS)
def test_columns_of_images_of_every_type(
    tmp_path: Path, suffix: str, name: str, column: pa.Array, images: list[list[str] | None]
) -> None:
    path = tmp_path / f"rows.{suffix}"
    turns = [[{"from": "human", "value": "<image>" * len(row or [])}, TURNS[1]] for row in images]
    table = pa.table({name: column, "conversations": turns})
    if suffix == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    expected = [
        tuple(image if image.endswith("png") else f"{path}/{n}{image}" for image in row or [])
        for n, row in enumerate(images)
    ]
    assert [record.images for record in Records(path)] == expected
    assert [Records(path)[n].images for n in range(len(images))] == expected


def test_rows_without_an_image_are_text_and_others_need_not_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As LLaVA-OneVision: the bytes of images are not read to see where there are some."""
    path = tmp_path / "rows.parquet"
    pq.write_table(
        pa.table({"image": pa.array([IMAGE, None] * 4, STRUCT), "conversations": [TURNS] * 8}), path
    )
    reader = open_records(path)
    columns: list[tuple[str, ...]] = []
    read_group = type(reader._table).read_group
    monkeypatch.setattr(
        type(reader._table),
        "read_group",
        lambda table, group, names: columns.append(names) or read_group(table, group, names),
    )
    assert [item["image"] for item in reader.read(0, 8)] == [
        f"{path}/{n}" if n % 2 == 0 else None for n in range(8)
    ]
    assert columns == [("image.path", "conversations")]


@pytest.mark.parametrize("name", ["list.json.gz", "lines.jsonl.zst", "web.tar", "data.zip"])
def test_compressed_files_are_told_apart(tmp_path: Path, name: str) -> None:
    starts = {".gz": b"\x1f\x8b\x08", ".zst": b"\x28\xb5\x2f\xfd", ".tar": b"BZh9", ".zip": b"PK\x03\x04"}
    (tmp_path / name).write_bytes(starts[Path(name).suffix] + b"nonsense" * 20)
    with pytest.raises(RecordError, match=r": compressed \(.*unpack it"):
        open_records(tmp_path / name)


@pytest.mark.parametrize("name", ["list.json", "lines.jsonl", "web.tar"])
def test_a_file_that_changes_under_its_reader_is_an_error(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    reader = open_records(tmp_path / name)
    with (tmp_path / name).open("ab") as file:
        file.write(b"\0" * 1024)
    with pytest.raises(OSError, match="changed while it was being read"):
        reader[3]
    with pytest.raises(OSError, match="changed while it was being read"):
        list(reader.read(0, 5))
