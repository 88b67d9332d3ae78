"""Damaged Parquet and Arrow files of others: each is read or refused by an error, whatever its reader would do."""

import io
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

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
