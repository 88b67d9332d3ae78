"""Images and records of one file: what `quantize` encodes is what records name, whatever the file."""

import io
import json
import tarfile
from base64 import b64encode
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from being_vl.data.records import Record, Records
from being_vl.images.encoded import ImageSource, NoImageError
from being_vl.images.keys import image_key
from being_vl.images.sources import find_images

TURNS = [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A."}]


def image(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (level, 0, 0)).save(file, "PNG")
    return file.getvalue()


def record(num_images: int, **fields: Any) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": "<image>" * num_images + "Q?"}, TURNS[1]], **fields}


def write_json(path: Path, items: list[Any], encoding: str = "utf-8") -> Path:
    lines = map(json.dumps, items)
    path.write_text("\n".join(lines) if path.suffix == ".jsonl" else json.dumps(items), encoding)
    return path


def write_table(path: Path, columns: dict[str, Any]) -> Path:
    table = pa.table(columns)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=2)
    else:
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    return path


def write_tar(path: Path, members: dict[str, bytes | str]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


URI = "data:image/png;base64," + b64encode(image(1)).decode()
FIELDS: list[dict[str, Any]] = [
    record(1, image="1.png"),
    record(2, image=["2.png", "./3.png"]),
    record(1, images=["sub//4.png"]),
    record(1, image=None, images=["5.png"]),
    record(0, image=None),
    record(0),
    {"messages": [{"role": "user", "content": [{"type": "image", "image": "6.png"}, {"type": "text", "text": "Q?"}]},
                  {"role": "assistant", "content": "A."}]},
    record(1, image="sub/../7.png"),
    record(1, image=URI),
    record(2, images=[URI, "1.png"]),
    {"image": 7},
    {"image": "http://x/y.png"},
]  # fmt: skip


def conversations(num_images: list[int]) -> list[Any]:
    return [record(count)["conversations"] for count in num_images]


def make_json(folder: Path) -> Path:
    return write_json(folder / "r.json", FIELDS)


def make_json_with_mark(folder: Path) -> Path:
    return write_json(folder / "r.json", FIELDS, "utf-8-sig")


def make_json_lines(folder: Path) -> Path:
    return write_json(folder / "r.jsonl", FIELDS, "utf-8-sig")


def make_tar(folder: Path) -> Path:
    json_record = json.dumps(record(1, image="b/1.png")).encode()
    members = {
        "a.png": image(1),
        "._a.png": b"Mac",
        "a.txt": b"A.",
        "b/1.png": image(2),
        "c.json": json_record,
    }
    links = {"d.png": "a.png", "d.txt": b"D.", "e.bin": image(3), "e.txt": b"E.", "gone.png": "nowhere"}
    return write_tar(folder / "r.tar", members | links)


def make_tar_with_update(folder: Path) -> Path:
    path = write_tar(
        folder / "r.tar", {"./a.png": image(1), "a.txt": b"Old.", "b.png": image(2), "b.txt": b"B."}
    )
    with tarfile.open(path, "a") as tar:
        for name, data in (("a.png", image(3)), ("a.txt", b"New.")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})
ROWS = [{"bytes": image(n), "path": None if n % 2 else f"{n}.png"} for n in range(4)]


def make_rows(folder: Path, name: str) -> Path:
    images = pa.array([*ROWS[:2], None, ROWS[2], {"bytes": None, "path": None}], STRUCT)
    return write_table(folder / name, {"image": images, "conversations": conversations([1, 1, 0, 1, 0])})


def make_binary_rows(folder: Path, name: str) -> Path:
    images = pa.array([image(1), image(2), None], pa.large_binary())
    return write_table(folder / name, {"image": images, "conversations": conversations([1, 1, 0])})


def make_lists(folder: Path, name: str) -> Path:
    images = pa.array([ROWS[:2], [], ROWS[2:3], None, ROWS[3:]], pa.list_(STRUCT))
    return write_table(folder / name, {"images": images, "conversations": conversations([2, 0, 1, 0, 1])})


def make_names(folder: Path, name: str) -> Path:
    names = pa.array(["1.png", "2.png", None, "sub/4.png"]).dictionary_encode()
    return write_table(folder / name, {"image": names, "conversations": conversations([1, 1, 0, 1])})


def make_both_fields(folder: Path, name: str) -> Path:
    columns = {"image": ["1.png", None, None], "images": [None, ["2.png", "3.png"], []]}
    return write_table(folder / name, columns | {"conversations": conversations([1, 2, 0])})


TABLES = [make_rows, make_binary_rows, make_lists, make_names, make_both_fields]
CASES: list[Any] = [
    (make,) for make in (make_json, make_json_with_mark, make_json_lines, make_tar, make_tar_with_update)
]
CASES += [(make, name) for make in TABLES for name in ("r.parquet", "r.arrow")]


def has_image(source: ImageSource) -> bool:
    try:
        return bool(source.read())
    except NoImageError:
        return False


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join([case[0].__name__, *case[1:]]))
def test_records_name_what_quantize_encodes(case: Any, tmp_path: Path) -> None:
    make, *words = case
    (tmp_path / "sub").mkdir()
    for n in range(1, 8):
        (tmp_path / ("sub" if n == 4 else "") / f"{n}.png").write_bytes(image(n))
    path = make(tmp_path, *words)
    keys = {source.key for source in find_images(path).sources if has_image(source)}
    records = [record for record in Records(path).read() if isinstance(record, Record)]
    names = {image_key(name, tmp_path) for record in records for name in record.images}
    assert len(names) >= 2
    assert keys == names
