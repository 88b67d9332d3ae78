"""Tables of images or records: Parquet files, and Arrow files of either kind, as `datasets` writes them.

A table is read part by part: row groups of Parquet, record batches of Arrow. Those that were read last are kept in
memory, for whoever reads row by row.

Others made these files, and a damaged one can crash its reader. So Parquet is decoded in another process, which hands
over what it has decoded as Arrow. Arrow files are checked there when they are opened, and then read in place.
"""

import errno
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from being_vl.files import file_version
from being_vl.images.files import open_file
from being_vl.images.table_process import read_in_process
from being_vl.names import show_name

if TYPE_CHECKING:
    import pyarrow as pa

GROUPS_IN_MEMORY = 2
FILES_IN_MEMORY = 4


@dataclass(frozen=True)
class Table:
    """A table's layout; picklable.

    Args:
        path: The file.
        version: The file's size and time of change when it was opened.
        schema: Names and types of the columns.
        group_sizes: Number of rows of each row group or record batch.
        num_rows: Number of all rows.
        leaves: Of Parquet, the columns as they are stored, by their paths: a struct has several. Else empty.
        null_counts: Of the leaves that are a field `bytes`, how many values of each row group are null; None where the
            file does not say.
    """

    path: Path
    version: tuple[int, ...]
    schema: "pa.Schema"
    group_sizes: tuple[int, ...]
    num_rows: int
    leaves: tuple[str, ...] = ()
    null_counts: dict[str, list[int | None]] = field(default_factory=dict, compare=False)

    def read_group(self, group: int, columns: tuple[str, ...]) -> "pa.Table":
        """Some columns of one row group or record batch, by its number.

        Args:
            group: The number.
            columns: Names of columns, or of Parquet also `leaves`.

        Raises:
            OSError: if the file cannot be read, is damaged, or has changed since the table was opened; its `strerror`
                says why.
        """
        for name in columns:
            if self.schema.names.count(name) > 1:
                raise OSError(errno.EINVAL, f"has several columns {show_name(name)}", str(self.path))
        if not self.leaves:
            return _read_batch(self.path, self.version, group, columns)
        return _read_row_group(self.path, self.version, group, columns, len(self.group_sizes))

    def row_key(self, table_name: str, row: int) -> str:
        """The key of the image in a row: `FILE.parquet/ROW`, with as many digits as the table needs.

        Args:
            table_name: What the file is called in keys.
            row: The row's number in the file, from 0.
        """
        return f"{table_name}/{row:0{len(str(self.num_rows))}d}"


def open_table(path: Path) -> Table:
    """Read a table's layout.

    Args:
        path: Its file, Parquet or Arrow by its content.

    Raises:
        OSError: if it cannot be read, or is damaged; its `strerror` says why.
    """
    import pyarrow as pa

    version = file_version(path)
    with open_file(path) as file:
        is_parquet = file.read(4) in (b"PAR1", b"PARE")
    if is_parquet:
        answer, memory = read_in_process(path, version, {"format": "parquet", "group": None})
        schema = pa.ipc.open_stream(pa.py_buffer(memory)).schema
        sizes = tuple(answer["groups"])
        return Table(path, version, schema, sizes, sum(sizes), tuple(answer["leaves"]), answer["null_counts"])
    read_in_process(path, version, {"format": "arrow", "group": None})
    arrow_file = _arrow_file(path, version)
    sizes = tuple(batch.num_rows for batch in arrow_file.batches)
    return Table(path, version, arrow_file.schema, sizes, sum(sizes))


def _read_batch(path: Path, version: tuple[int, ...], group: int, columns: tuple[str, ...]) -> "pa.Table":
    import pyarrow as pa

    file = _arrow_file(path, version)
    batch = file.batches[group].select(list(columns))
    if file.holds(batch):
        return pa.Table.from_batches([batch])
    return _read_copy(path, version, group, columns)


@lru_cache(GROUPS_IN_MEMORY)
def _read_copy(path: Path, version: tuple[int, ...], group: int, columns: tuple[str, ...]) -> "pa.Table":
    """A record batch that is compressed, or that damage has made to lie outside of its file."""
    import pyarrow as pa

    _, memory = read_in_process(path, version, {"format": "arrow", "group": group, "columns": list(columns)})
    return pa.ipc.open_stream(pa.py_buffer(memory)).read_all()


@lru_cache(GROUPS_IN_MEMORY)
def _read_row_group(
    path: Path, version: tuple[int, ...], group: int, columns: tuple[str, ...], num_groups: int
) -> "pa.Table":
    global _last_request
    import pyarrow as pa

    request: dict[str, Any] = {"format": "parquet", "group": group, "columns": list(columns)}
    # Who reads one row group after the other gets each while the one before is used.
    next_request = request | {"group": group + 1}
    is_in_turn = _last_request == (path, group - 1, columns) and group + 1 < num_groups
    _last_request = (path, group, columns)
    _, memory = read_in_process(path, version, request, next_request if is_in_turn else None)
    return pa.ipc.open_stream(pa.py_buffer(memory)).read_all()


_last_request: tuple[Path, int, tuple[str, ...]] | None = None
"""The row group that was read last."""


@dataclass(frozen=True)
class _ArrowFile:
    """An Arrow file that was checked, in place.

    Args:
        schema: Its schema.
        batches: Its record batches.
        content: All of its bytes.
    """

    schema: "pa.Schema"
    batches: "list[pa.RecordBatch]"
    content: "pa.Buffer"

    def holds(self, batch: "pa.RecordBatch") -> bool:
        """Whether all values of a batch lie in the file's bytes, where the check has seen them."""
        start, end = self.content.address, self.content.address + self.content.size
        return all(
            start <= buffer.address and buffer.address + buffer.size <= end
            for column in batch.columns
            for buffer in _buffers(column)
        )


def _buffers(array: "pa.Array") -> "Iterator[pa.Buffer]":
    """The memory of an array, with that of its dictionaries."""
    import pyarrow as pa

    yield from filter(None, array.buffers())
    arrays = []
    if isinstance(array, pa.ExtensionArray):
        arrays = [array.storage]
    elif isinstance(array, pa.DictionaryArray):
        arrays = [array.dictionary]
    elif isinstance(array, pa.StructArray | pa.UnionArray):
        arrays = [array.field(n) for n in range(array.type.num_fields)]
    elif isinstance(array, pa.RunEndEncodedArray) or hasattr(array, "values"):
        arrays = [array.values]
    for child in arrays:
        yield from _buffers(child)


@lru_cache(FILES_IN_MEMORY)
def _arrow_file(path: Path, version: tuple[int, ...]) -> _ArrowFile:
    import pyarrow as pa

    if version and file_version(path) not in (version, ()):
        raise OSError(errno.ESTALE, "changed while it was being read", str(path))
    file_map = pa.memory_map(str(path))
    content = file_map.read_buffer()
    if content[:6].to_pybytes() == b"ARROW1":
        file = pa.ipc.open_file(file_map)
        return _ArrowFile(file.schema, [file.get_batch(n) for n in range(file.num_record_batches)], content)
    file_map.seek(0)
    stream = pa.ipc.open_stream(file_map)
    return _ArrowFile(stream.schema, list(stream), content)
