"""The images in the rows of a table: which column they are in, and where each is."""

import posixpath
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from being_vl.errors import ImageError
from being_vl.files import file_version
from being_vl.images.encoded import TableImage
from being_vl.images.fields import IMAGE_FIELDS
from being_vl.images.files import LeftOut
from being_vl.images.tables import Table, open_table
from being_vl.names import show_name

if TYPE_CHECKING:
    import pyarrow as pa


class NoColumnError(ImageError):
    """A table without a column that could be images."""


class NamesColumnError(ImageError):
    """A table that names images in a column and holds none."""


def find_table_images(
    path: Path, table_key: str, column: str | None, check_file: Callable[[str], str]
) -> Iterator[TableImage | LeftOut]:
    """The images of a table, and what is left out of those that its rows name.

    Rows without an image are among them, where only reading them would tell.

    Args:
        path: The file.
        table_key: What it is called in keys.
        column: The column with the images; if None, the only one that could be.
        check_file: Gives the reason to leave out a file that a row names, by its path; empty if there is none.

    Raises:
        NoColumnError, NamesColumnError: if it has none that holds images.
        ImageError: if several columns could be it, or the table is damaged as a whole.
    """
    import pyarrow as pa

    try:
        table = open_table(path)
        yield from _find_images(table, table_key, choose_column(table.schema, path, column), check_file)
    except (OSError, pa.ArrowException) as error:
        raise ImageError(f"{path}: not a complete table ({show_name(error)})") from None


def choose_column(schema: "pa.Schema", path: Path, column: str | None) -> str:
    """The column with the images: `image` or `images`, else the only one of `datasets`' images, else of binary values.

    Args:
        schema: Of the table.
        path: The file, for errors.
        column: The column that is asked for, if there is one.

    Raises:
        NoColumnError, NamesColumnError: if there is none that holds images.
        ImageError: if several columns could be it.
    """
    names = ", ".join(show_name(name, 40) for name in schema.names[:20])
    kinds = {field.name: _kind(field.type) for field in schema}
    fields = [name for name in IMAGE_FIELDS if name in kinds]
    if column is not None:
        candidates = [column] if kinds.get(column) else []
        if not candidates:
            raise ImageError(f"{path}: no column of images is named {show_name(column)}; it has {names}")
    elif fields:
        candidates = [name for name in fields if kinds[name]]
        if not candidates:
            raise NamesColumnError(
                f"{path}: its column {fields[0]!r} names images, and holds none; give the table by itself"
            )
    else:
        candidates = [name for name, kind in kinds.items() if kind == "struct"]
        candidates = candidates or [name for name, kind in kinds.items() if kind]
    if not candidates:
        raise NoColumnError(
            f"{path}: expected a column of images, that is of binary values or of structs with a field bytes; found "
            f"none in {names}"
        )
    if len(candidates) > 1:
        raise ImageError(
            f"{path}: the images could be in {' or '.join(map(show_name, candidates))}; choose one with --column"
        )
    return candidates[0]


def _kind(kind: "pa.DataType") -> str:
    """`struct` for `datasets`' images, `binary` for binary values, and for lists of either; empty for other types."""
    import pyarrow as pa

    types = pa.types
    if types.is_dictionary(kind) or is_list(kind):
        return _kind(kind.value_type)
    if types.is_struct(kind):
        number = kind.get_field_index("bytes")
        return "struct" if number >= 0 and _kind(kind.field(number).type) == "binary" else ""
    tests = (types.is_binary, types.is_large_binary, types.is_binary_view)
    return "binary" if any(test(kind) for test in tests) else ""


def is_list(kind: "pa.DataType") -> bool:
    """Whether a type is one of Arrow's lists."""
    import pyarrow as pa

    types = pa.types
    tests = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view)
    return any(test(kind) for test in (*tests, types.is_large_list_view))


def _find_images(
    table: Table, table_key: str, column: str, check_file: Callable[[str], str]
) -> Iterator[TableImage | LeftOut]:
    """The images of a table's column, row by row."""

    def locate(
        key: str, file: str, group: int, row: int, position: int | None = None
    ) -> TableImage | LeftOut:
        file = file and posixpath.join(table.path.parent, file)
        if file and (reason := check_file(file)):
            return LeftOut(key, reason, show_name(file))
        version = file_version(file) if file else ()
        return TableImage(key, table, column, group, row, position, file, version)

    start = 0
    for group, size in enumerate(table.group_sizes):
        files = _read_files(table, column, group)
        for row in range(size):
            key = table.row_key(table_key, start + row)
            row_files = files[row] if files else ""
            if isinstance(row_files, str):
                yield locate(key, row_files, group, row)
            else:
                for position, file in enumerate(row_files):
                    yield locate(f"{key}/{position}", file, group, row, position)
        start += size


def _read_files(table: Table, column: str, group: int) -> list[Any] | None:
    """Of each row of a group the file that it names, empty if the image may be in the row; lists of these for lists.

    None if no row names a file. Where it can be told otherwise, the images themselves are not read.
    """
    kind = table.schema.field(column).type
    leaf, num_nulls = _find_path_leaf(table, column, group)
    if not is_list(kind):
        if num_nulls == 0 or not _has_path(kind):
            return None
        return _named_files(table.read_group(group, (column,))[column])
    if leaf:
        # Their paths tell how many images the lists have; an empty list counts as one without bytes.
        paths = table.read_group(group, (leaf,))[column]
        lengths = _list_lengths(paths)
        if num_nulls is not None and num_nulls <= lengths.count(0):
            return [[""] * length for length in lengths]
    values = table.read_group(group, (column,))[column]
    files = iter(_named_files(_flatten(values)))
    return [list(islice(files, length)) for length in _list_lengths(values)]


def _find_path_leaf(table: Table, column: str, group: int) -> tuple[str, int | None]:
    """Of a Parquet column of structs with `bytes` and `path`: where the paths are, and how many have no bytes."""
    if table.path.suffix != ".parquet":
        return "", None
    metadata = _read_metadata(table.path, table.version)
    leaves = [metadata.schema.column(number).path for number in range(metadata.num_columns)]
    of_column = [leaf for leaf in leaves if leaf == column or leaf.startswith(f"{column}.")]
    bytes_leaf, path_leaf = (
        next((leaf for leaf in of_column if leaf.endswith(end)), "") for end in (".bytes", ".path")
    )
    if not bytes_leaf or not path_leaf:
        return "", None
    statistics = metadata.row_group(group).column(leaves.index(bytes_leaf)).statistics
    return path_leaf, statistics.null_count if statistics and statistics.has_null_count else None


@lru_cache(1)
def _read_metadata(path: Path, version: tuple[int, ...]) -> Any:
    import pyarrow.parquet as pq

    return pq.read_metadata(path)


def _has_path(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind) or is_list(kind):
        return _has_path(kind.value_type)
    return bool(pa.types.is_struct(kind) and kind.get_field_index("path") >= 0)


def _named_files(values: "pa.ChunkedArray") -> list[str]:
    """Of each image the file that it names where it has no bytes; else an empty text."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if not _has_path(values.type):
        return [""] * len(values)
    is_null = pc.struct_field(values, "bytes").is_null().to_pylist()
    paths = pc.struct_field(values, "path").to_pylist()
    return [path or "" if no_bytes else "" for path, no_bytes in zip(paths, is_null, strict=True)]


def _flatten(values: "pa.ChunkedArray") -> "pa.ChunkedArray":
    import pyarrow.compute as pc

    return pc.list_flatten(values)


def _list_lengths(values: "pa.ChunkedArray") -> list[int]:
    import pyarrow.compute as pc

    return [length or 0 for length in pc.list_value_length(values).to_pylist()]
