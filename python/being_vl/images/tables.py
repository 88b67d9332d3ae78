"""Tables of images or records: Parquet files, and Arrow files of either kind, as `datasets` writes them.

A table is read part by part: row groups of Parquet, record batches of Arrow. Those that were read last are kept in
memory, for whoever reads row by row.
"""

import errno
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from being_vl.files import file_version

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
    """

    path: Path
    version: tuple[int, ...]
    schema: "pa.Schema"
    group_sizes: tuple[int, ...]
    num_rows: int

    def read_group(self, group: int, columns: tuple[str, ...]) -> "pa.Table":
        """Some columns of one row group or record batch, by its number.

        Raises:
            OSError: if the file cannot be read, or has changed since the table was opened.
        """
        return _read_group(self.path, self.version, group, columns)

    def row_key(self, table_name: str, row: int) -> str:
        """The key of the image in a row: `FILE.parquet/ROW`, with as many digits as the table needs.

        Args:
            table_name: What the file is called in keys.
            row: The row's number in the file, from 0.
        """
        return f"{table_name}/{row:0{len(str(self.num_rows))}d}"


def open_table(path: Path) -> Table:
    """Read a table's layout.

    Raises:
        OSError, pyarrow.ArrowException: if it cannot be read, or is damaged as a whole.
    """
    version = file_version(path)
    if path.suffix == ".parquet":
        file = _parquet_file(path, version)
        metadata = file.metadata
        schema = file.schema_arrow
        sizes = tuple(metadata.row_group(n).num_rows for n in range(metadata.num_row_groups))
    else:
        schema, batches = _arrow_batches(path, version)
        sizes = tuple(batch.num_rows for batch in batches)
    return Table(path, version, schema, sizes, sum(sizes))


@lru_cache(GROUPS_IN_MEMORY)
def _read_group(path: Path, version: tuple[int, ...], group: int, columns: tuple[str, ...]) -> "pa.Table":
    import pyarrow as pa

    if path.suffix == ".parquet":
        return _parquet_file(path, version).read_row_group(group, columns=list(columns))
    _, batches = _arrow_batches(path, version)
    return pa.Table.from_batches([batches[group].select(list(columns))])


@lru_cache(FILES_IN_MEMORY)
def _parquet_file(path: Path, version: tuple[int, ...]) -> Any:
    import pyarrow.parquet as pq

    _check_version(path, version)
    return pq.ParquetFile(path)


@lru_cache(FILES_IN_MEMORY)
def _arrow_batches(path: Path, version: tuple[int, ...]) -> "tuple[pa.Schema, list[pa.RecordBatch]]":
    """Schema and record batches of an Arrow file, in place: of `datasets` streaming format or of the other one."""
    import pyarrow as pa

    _check_version(path, version)
    file_map = pa.memory_map(str(path))
    if file_map.read(6) == b"ARROW1":
        file = pa.ipc.open_file(file_map)
        return file.schema, [file.get_batch(n) for n in range(file.num_record_batches)]
    file_map.seek(0)
    stream = pa.ipc.open_stream(file_map)
    return stream.schema, list(stream)


def _check_version(path: Path, version: tuple[int, ...]) -> None:
    """Make sure that a file is still the one whose layout was read; a missing file is for its reader to report."""
    if version and file_version(path) not in (version, ()):
        raise OSError(errno.ESTALE, "changed while it was being read", str(path))
