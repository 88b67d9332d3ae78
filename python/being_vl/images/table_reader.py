"""Records of tables: the rows of a Parquet or Arrow file."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from being_vl.errors import RecordError
from being_vl.images.fields import IMAGE_FIELDS, RECORD_FIELDS
from being_vl.images.tables import open_table
from being_vl.names import show_name


class TableReader:
    """Parquet, or Arrow as `datasets` writes it: a row is a record, with the columns that records have as fields.

    A column `image` or `images` that holds images, not names, stands for the keys that `being-vl quantize` gives to the
    row's images, as absolute paths. Any row costs the decoding of its part of the file (row group, record batch), the
    last of which are kept.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self.path = path
        try:
            self._table = open_table(path)
        except pa.ArrowException as error:
            raise RecordError(f"{path}: not a complete table ({show_name(error)})") from None
        schema = self._table.schema
        self._ends = np.cumsum(self._table.group_sizes, dtype=np.int64)
        self._columns = tuple(name for name in schema.names if name in RECORD_FIELDS)
        bytes_columns = [name for name in self._columns if _holds_bytes(schema.field(name).type)]
        self._image_columns = [name for name in bytes_columns if name in IMAGE_FIELDS]
        self._other_bytes_columns = [name for name in bytes_columns if name not in IMAGE_FIELDS]
        self._path_columns = (
            _find_path_columns(path, self._image_columns) if path.suffix == ".parquet" else {}
        )

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> Any:
        (item,) = self._items(self._rows(index, index + 1), index)
        if isinstance(item, RecordError):
            raise item
        return item

    def read(self, start: int, stop: int) -> Iterator[Any]:
        """See `Reader`."""
        while start < stop:
            for batch in self._rows(start, stop).to_batches(1024):
                yield from self._items(batch, start)
                start += batch.num_rows

    def _rows(self, start: int, stop: int) -> Any:
        """Rows `start` to `stop`, or to the end of their part of the file; without the bytes of images."""
        group = int(np.searchsorted(self._ends, start, side="right"))
        leaves = {
            name: leaf for name, (leaf, nulls) in self._path_columns.items() if nulls[group] is not None
        }
        rows = self._table.read_group(group, tuple(leaves.get(name, name) for name in self._columns))
        for name in leaves:
            # Their paths tell which values are there, unless some are without bytes.
            if _count_nulls(rows[name]) != self._path_columns[name][1][group]:
                column = self._table.read_group(group, (name,))[name]
                rows = rows.set_column(rows.schema.get_field_index(name), name, column)
        group_start = int(self._ends[group]) - rows.num_rows
        rows = rows.slice(start - group_start, stop - start)
        for name in self._image_columns:
            rows = _set_column(rows, name, _drop_bytes)
        for name in self._other_bytes_columns:
            rows = _set_column(rows, name, lambda column: column.is_valid())
        return rows

    def _items(self, rows: Any, start: int) -> Iterator[Any]:
        """Rows of a table or batch as records, the first of them record `start`."""
        try:
            items = rows.to_pylist()
        except UnicodeDecodeError as error:
            if rows.num_rows > 1:
                for number in range(rows.num_rows):
                    yield from self._items(rows.slice(number, 1), start + number)
                return
            reason = f"a text that is not UTF-8 ({error}); expected a record"
            items = [RecordError(f"{self.path}: record {start}: {reason}", "wrong encoding")]
        for index, item in enumerate(items, start):
            if isinstance(item, dict):
                for name in self._image_columns:
                    item[name] = self._name_images(item[name], index)
                for name in self._other_bytes_columns:
                    item[name] = "binary" if item[name] else None
            yield item

    def _name_images(self, value: Any, index: int) -> Any:
        """The names of a row's images, where there are some."""
        row_name = self._table.row_key(str(self.path.absolute()), index)
        if not isinstance(value, list):
            return row_name if value else None
        return [f"{row_name}/{position}" if is_image else None for position, is_image in enumerate(value)]


def _holds_bytes(kind: Any) -> bool:
    """Whether the values of a column are images or lists of them: binary, or structs with binary `bytes`."""
    import pyarrow as pa

    types = pa.types
    if types.is_dictionary(kind) or _is_list(kind):
        return _holds_bytes(kind.value_type)
    if types.is_struct(kind):
        number = kind.get_field_index("bytes")
        return number >= 0 and _holds_bytes(kind.field(number).type)
    tests = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)
    return any(test(kind) for test in tests)


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    types = pa.types
    tests = (
        types.is_list,
        types.is_large_list,
        types.is_fixed_size_list,
        types.is_list_view,
        types.is_large_list_view,
    )
    return any(test(kind) for test in tests)


def _find_path_columns(path: Path, names: list[str]) -> dict[str, tuple[str, list[int | None]]]:
    """Of Parquet columns of structs with `bytes` and `path`: where paths are, and the nulls of `bytes` per group."""
    import pyarrow.parquet as pq

    metadata = pq.read_metadata(path)
    schema = [metadata.schema.column(number).path for number in range(metadata.num_columns)]
    result = {}
    for name in names:
        leaves = [
            leaf for leaf in schema if leaf.startswith(f"{name}.") and leaf.endswith((".bytes", ".path"))
        ]
        if len(leaves) == 2:
            bytes_leaf, path_leaf = sorted(leaves)
            groups = (metadata.row_group(group) for group in range(metadata.num_row_groups))
            chunks = [group.column(schema.index(bytes_leaf)) for group in groups]
            counts = [chunk.statistics and chunk.statistics.null_count for chunk in chunks]
            result[name] = path_leaf, counts
    return result


def _count_nulls(column: Any) -> int:
    """The nulls of a column's leaves where no struct has null fields; as in Parquet, an empty list counts as one."""
    import pyarrow.compute as pc

    if not _is_list(column.type):
        return int(column.null_count)
    num_empty = pc.sum(pc.less(pc.list_value_length(column).fill_null(0), 1)).as_py() or 0
    return int(num_empty + pc.list_flatten(column).null_count)


def _set_column(rows: Any, name: str, change: Callable[[Any], Any]) -> Any:
    """A table with a column changed, chunk by chunk."""
    import pyarrow as pa

    chunks = [change(chunk) for chunk in rows[name].chunks]
    return rows.set_column(rows.schema.get_field_index(name), name, pa.chunked_array(chunks))


def _drop_bytes(values: Any) -> Any:
    """Whether each value is an image; of lists, whether each of their values is."""
    import pyarrow as pa
    import pyarrow.compute as pc

    types = pa.types
    if types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if _is_list(values.type):
        lengths = pc.list_value_length(values).fill_null(0)
        offsets = np.append(0, np.cumsum(lengths.to_numpy(zero_copy_only=False), dtype=np.int64))
        flags = _drop_bytes(pc.list_flatten(values))
        return pa.LargeListArray.from_arrays(pa.array(offsets), flags, mask=values.is_null())
    is_image = values.is_valid()
    if types.is_struct(values.type) and values.type.get_field_index("bytes") >= 0:
        fields = [
            values.field(name).is_valid()
            for name in ("bytes", "path")
            if values.type.get_field_index(name) >= 0
        ]
        is_image = pc.and_(is_image, fields[0] if len(fields) == 1 else pc.or_(*fields))
    return is_image
