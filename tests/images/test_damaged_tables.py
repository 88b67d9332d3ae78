"""Damaged Parquet and Arrow files of others: each is read or refused by an error, whatever its reader would do."""

import io
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from being_vl.images import table_process
from being_vl.images.tables import open_table
from helpers.damage import damage

VARIATIONS = int(os.environ.get("TABLE_VARIATIONS", "35"))
"""Of each format; a few seconds. Set it to some hundred to look for more."""


def make_table() -> pa.Table:
    """Ten rows of images, texts in several encodings, names, and nested lists."""
    turns = [{"from": "human", "value": "What is this? " * n} for n in range(4)]
    return pa.table(
        {
            "image": pa.array([{"bytes": os.urandom(40 * n), "path": f"{n}.png"} for n in range(10)]),
            "conversations": pa.array([turns[: n % 4] for n in range(10)]),
            "category": pa.array(["foundation", "reasoning"] * 5).dictionary_encode(),
            "id": list(range(10)),
            "text": pa.array(["same text"] * 9 + [None], pa.large_string()),
        }
    )


def write_parquet(**options: object) -> Callable[[pa.Table], bytes]:
    def write(table: pa.Table) -> bytes:
        sink = io.BytesIO()
        pq.write_table(table, sink, row_group_size=4, **options)
        return sink.getvalue()

    return write


def write_arrow(new_writer: Callable[..., pa.ipc.RecordBatchStreamWriter], compression: str | None = None):  # type: ignore[no-untyped-def]
    def write(table: pa.Table) -> bytes:
        sink = io.BytesIO()
        with new_writer(
            sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)
        ) as writer:
            writer.write_table(table, max_chunksize=4)
        return sink.getvalue()

    return write


FORMATS = {
    "snappy.parquet": write_parquet(),
    "zstd.parquet": write_parquet(compression="zstd", data_page_version="2.0"),
    "plain.parquet": write_parquet(compression="none", use_dictionary=False),
    "file.arrow": write_arrow(pa.ipc.new_file),
    "stream.arrow": write_arrow(pa.ipc.new_stream),
    "zstd.arrow": write_arrow(pa.ipc.new_file, "zstd"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_tables_are_read_or_refused(name: str, tmp_path: Path) -> None:
    data = FORMATS[name](make_table())
    paths = [tmp_path / name, *(tmp_path / f"{n}-{name}" for n in range(VARIATIONS))]
    for path, content in zip(paths, [data, *damage(data, VARIATIONS, seed=len(name))], strict=True):
        path.write_bytes(content)
    reader = Path(__file__).parents[1] / "helpers" / "read_tables.py"
    process = subprocess.run(
        [sys.executable, str(reader), "2"],
        input="\n".join(map(str, paths)),
        capture_output=True,
        text=True,
        timeout=60 + VARIATIONS * 3,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    results = [json.loads(line) for line in process.stdout.splitlines()]
    assert len(results) == len(paths)
    assert results[0] == "10 rows"
    counts = Counter(result.partition(":")[0] for result in results)
    print(name, counts, Counter(result for result in results if "reader" in result or "more than" in result))
    assert counts["error"] > VARIATIONS // 4
    assert all(len(result) < 500 for result in results)


def test_what_takes_all_memory_or_does_not_end_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of some kilobytes that unpacks to 3 GB."""
    path = tmp_path / "bomb.parquet"
    images = pa.DictionaryArray.from_arrays(pa.array([0] * 3000), pa.array([bytes(1 << 20)]))
    pq.write_table(pa.table({"image": images}), path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 1 << 20
    table = open_table(path)
    monkeypatch.setattr(table_process, "MEMORY", 20 << 20)
    with pytest.raises(
        OSError, match=r"row group 0: reading it takes more than 0\.0 GB of memory.*bomb\.parquet"
    ):
        table.read_group(0, ("image",))
    monkeypatch.undo()
    monkeypatch.setattr(table_process, "SECONDS", 0.01)
    with pytest.raises(
        OSError, match=r"row group 0: damaged: reading it took more than 0 s of processor time"
    ):
        table.read_group(0, ("image",))


def test_a_reader_that_is_killed_is_named_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(FORMATS["snappy.parquet"](make_table()))
    table = open_table(path)
    assert table_process._process is not None
    table_process._process._process.send_signal(signal.SIGSEGV)
    with pytest.raises(OSError, match=r"row group 1: damaged: its reader crashed \(SIGSEGV\).*a\.parquet"):
        table.read_group(1, ("id",))
    assert table.read_group(1, ("id",)).num_rows == 4


def test_forks_have_readers_of_their_own(tmp_path: Path) -> None:
    """As the workers of a data loader are, of which several read at a time."""
    path = tmp_path / "a.parquet"
    path.write_bytes(FORMATS["snappy.parquet"](make_table()))
    table = open_table(path)
    table.read_group(0, ("text",))
    children = []
    for group in (1, 2, 1):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                rows = [table.read_group(group, (name,)).num_rows for name in ("id", "text", "image")]
                status = 0 if rows == [table.group_sizes[group]] * 3 else 2
            finally:
                os._exit(status)
        children.append(child)
    assert [table.read_group(group, ("id",)).num_rows for group in (0, 1, 2)] == [4, 4, 2]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_what_is_no_regular_file_is_refused(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(OSError, match="regular"):
        open_table(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        open_table(tmp_path / "missing" / name)
