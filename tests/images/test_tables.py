"""Tables and tars, as images and records find them: the same keys, and files that change."""

import io
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from being_vl.data.records import Record, Records
from being_vl.errors import RecordError
from being_vl.images import tables
from being_vl.images.readers import open_records
from being_vl.images.sources import find_images
from being_vl.images.tables import open_table

TABLES = ["a.parquet", "a.arrow", "a.file.arrow"]


def write_table(path: Path, images: list[bytes | None], captions: str = "Red.") -> Path:
    """Captions of embedded images, in row groups or record batches of three."""
    rows = [{"image": image and {"bytes": image, "path": None}, "caption": captions} for image in images]
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=3)
    else:
        new_writer = pa.ipc.new_file if path.name.endswith(".file.arrow") else pa.ipc.new_stream
        with new_writer(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    return path


@pytest.mark.parametrize("name", TABLES)
def test_a_table_that_is_replaced_is_read_anew(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for round_number, size in enumerate((10, 8, 8, 12)):
        images = [f"{round_number}-{n}".encode() for n in range(size)]
        write_table(path, images, f"Caption {round_number}.")
        os.utime(path, (round_number, round_number))  # a second write may fall on the same tick of the clock
        assert [source.read() for source in find_images(path).sources] == images
        records = list(Records(path))
        assert [record.turns[0].text for record in records] == [f"Caption {round_number}."] * size
        assert [record.images for record in records] == [
            (f"{tmp_path}/{source.key}",) for source in find_images(path).sources
        ]


@pytest.mark.parametrize("name", TABLES)
def test_a_table_that_changes_under_its_reader_is_an_error(tmp_path: Path, name: str) -> None:
    path = write_table(tmp_path / name, [b"image"] * 10)
    sources, reader = find_images(path).sources, open_records(path)
    assert sources[0].read() == b"image"
    path.unlink()
    write_table(path, [b"other"] * 20)
    for read in (tables._arrow_file, tables._read_row_group):
        read.cache_clear()
    with pytest.raises(OSError, match="changed while it was being read"):
        sources[9].read()
    with pytest.raises(OSError, match="changed while it was being read"):
        reader[9]


@pytest.mark.parametrize("name", TABLES)
def test_rows_are_read_one_group_at_a_time_whatever_their_order(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_table(tmp_path / name, [None if n == 4 else b"%d" % n for n in range(10)])
    table = open_table(path)
    assert (table.group_sizes, table.num_rows) == ((3, 3, 3, 1), 10)
    reads: list[int] = []
    for function in ("_read_batch", "_read_row_group"):
        read = getattr(tables, function)
        read = getattr(read, "__wrapped__", read)
        monkeypatch.setattr(
            tables, function, lambda *words, read=read: reads.append(words[2]) or read(*words)
        )
    reader = open_records(path)
    items = list(reader.read(1, 8))
    assert reads == [0, 1, 2]
    assert [item["image"] for item in items] == [None if n == 4 else f"{path}/{n:02d}" for n in range(1, 8)]
    assert [reader[n]["image"] for n in (9, 0, 4)] == [f"{path}/09", f"{path}/00", None]
    assert [source.key for source in find_images(path).sources] == [f"{name}/{n:02d}" for n in range(10)]


def write_tar(path: Path, names: list[str]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(name)
            tar.addfile(member, io.BytesIO(name.encode()))
    return path


def test_images_and_records_find_the_same_members_of_a_tar(tmp_path: Path) -> None:
    """Folders, links and other files among them, in lower and upper case, with and without `./`."""
    names = [
        "./a/1.png",
        "./a/1.JPG",
        "./a/1.txt",
        "b/2.webp",
        "b/2.seg.npy",
        "b/2.txt",
        "c.d/3.png",
        "c.d/3.txt",
    ]
    path = write_tar(tmp_path / "web.tar", names)
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("c.d/4.png")
        link.type, link.linkname = tarfile.SYMTYPE, "3.png"
        tar.addfile(link)
        folder = tarfile.TarInfo("folder.png")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    sources = find_images(path).sources
    assert [source.key for source in sources] == [
        "web.tar/a/1.JPG",
        "web.tar/a/1.png",
        "web.tar/b/2.webp",
        "web.tar/c.d/3.png",
        "web.tar/c.d/4.png",
    ]
    contents = [b"./a/1.JPG", b"./a/1.png", b"b/2.webp", b"c.d/3.png", b"c.d/3.png"]
    assert [source.read() for source in sources] == contents
    *records, link_without_text = Records(path).read()
    assert [record.images for record in records if isinstance(record, Record)] == [
        (f"{path}/a/1.png", f"{path}/a/1.JPG"),
        (f"{path}/b/2.webp",),
        (f"{path}/c.d/3.png",),
    ]
    assert isinstance(link_without_text, RecordError)
    assert "record 3 (c.d/4.png): no .json or .txt beside it" in str(link_without_text)


def test_fingerprints_of_images_change_with_their_file(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(b"1")
    tar, table = write_tar(tmp_path / "a.tar", ["1.png"]), write_table(tmp_path / "a.parquet", [b"1"])
    for path, file in ((tar, tar), (table, table), (tmp_path, tmp_path / "1.png")):
        old_fingerprint = find_images(path).sources[0].fingerprint
        assert old_fingerprint == find_images(path).sources[0].fingerprint
        os.utime(file, (1, 1))
        new_fingerprint = find_images(path).sources[0].fingerprint
        assert old_fingerprint != new_fingerprint
    (tmp_path / "1.png").write_bytes(b"12")
    os.utime(tmp_path / "1.png", (1, 1))
    assert find_images(tmp_path).sources[0].fingerprint != new_fingerprint
