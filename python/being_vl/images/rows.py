"""The images in the rows of a table, and the files that its rows name."""

import posixpath
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from being_vl.errors import ImageError
from being_vl.files import file_version
from being_vl.images.columns import IMAGE_FIELDS, ImageColumn, find_image_column, image_kind
from being_vl.images.encoded import TableImage
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
        column: The column with the images; see `find_image_column`.
        check_file: Gives the reason to leave out a file that a row names, by its path; empty if there is none.

    Raises:
        NoColumnError, NamesColumnError: if it has none that holds images.
        ImageError: if several columns could be it, or the table is damaged as a whole.
    """
    try:
        table = open_table(path)
        if column is None and _has_names_alone(table.schema):
            raise NamesColumnError(f"{path}: names images, and holds none")
        image_column = find_image_column(path, table.schema, column)
        if image_column is None:
            names = ", ".join(show_name(name, 40) for name in table.schema.names[:20])
            raise NoColumnError(
                f"{path}: expected a column of images, that is of binary values or of structs with a field bytes; "
                f"found none in {names}"
            )
        if image_column.kind == "names":
            raise NamesColumnError(
                f"{path}: its column {show_name(image_column.name)} names images, and holds none"
            )
        yield from _find_images(table, table_key, image_column, check_file)
    except OSError as error:
        reason = show_name(error.strerror or error)
        raise ImageError(f"{path}: not a complete table ({reason})") from None


def _has_names_alone(schema: "pa.Schema") -> bool:
    """Whether all columns of images, by their names, hold names of files."""
    kinds = [image_kind(field) for field in schema if field.name in IMAGE_FIELDS]
    return bool(kinds) and all(kind is not None and kind[0] == "names" for kind in kinds)


def _find_images(
    table: Table, table_key: str, column: ImageColumn, check_file: Callable[[str], str]
) -> Iterator[TableImage | LeftOut]:
    """The images of a table's column, row by row."""

    def locate(key: str, file: str, group: int, row: int, position: int = 0) -> TableImage | LeftOut:
        file = file and posixpath.join(table.path.parent, file)
        if file and (reason := check_file(file)):
            return LeftOut(key, reason, file)
        version = file_version(file) if file else ()
        return TableImage(key, table, column, group, row, position, file, version)

    start = 0
    for group, size in enumerate(table.group_sizes):
        files = _read_files(table, column, group)
        for row in range(size):
            key = table.row_key(table_key, start + row)
            if not column.is_list:
                yield locate(key, files[row][0] if files else "", group, row)
                continue
            for position, file in enumerate(files[row] if files else ()):
                yield locate(f"{key}/{position}", file, group, row, position)
        start += size


def _read_files(table: Table, column: ImageColumn, group: int) -> list[list[str]] | None:
    """Of each row of a group, for each of its images, the file that the row names; empty if it may be in the row.

    None if no row names a file. The images themselves are not read where it can be told without.
    """
    if not column.is_list and column.kind == "bytes":
        return None
    leaf, num_nulls = _find_path_leaf(table, column.name, group)
    if not column.is_list and num_nulls == 0:
        return None
    if column.is_list and leaf and num_nulls is not None:
        # Their paths tell how many images the lists have; an empty list counts as one without bytes.
        lengths = _list_lengths(table.read_group(group, (leaf,))[column.name])
        if num_nulls <= lengths.count(0):
            return [[""] * length for length in lengths]
    values = table.read_group(group, (column.name,))[column.name]
    try:
        if not column.is_list:
            return [[file] for file in _named_files(values)]
        files = iter(_named_files(_flatten(values)))
        return [list(islice(files, length)) for length in _list_lengths(values)]
    except (NotImplementedError, TypeError):  # types that have no such functions
        images = (column.values(value.as_py()) for value in values)
        return [[image if isinstance(image, str) else "" for image in row] for row in images]


def _find_path_leaf(table: Table, column: str, group: int) -> tuple[str, int | None]:
    """Of a Parquet column of structs with `bytes` and `path`: where the paths are, and how many have no bytes."""
    leaves = [leaf for leaf in table.leaves if leaf.startswith(f"{column}.")]
    bytes_leaf, path_leaf = (
        next((leaf for leaf in leaves if leaf.endswith(end)), "") for end in (".bytes", ".path")
    )
    if not path_leaf or bytes_leaf not in table.null_counts:
        return "", None
    return path_leaf, table.null_counts[bytes_leaf][group]


def _named_files(values: "pa.ChunkedArray") -> list[str]:
    """Of each image the file that it names where it has no bytes; else an empty text.

    Raises:
        NotImplementedError, TypeError: if the type is none of plain binary values or structs.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = values.type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return [""] * len(values)
    if not pa.types.is_struct(kind):
        raise TypeError(f"of type {kind}")
    if kind.get_field_index("path") < 0:
        return [""] * len(values)
    paths = pc.struct_field(values, "path").to_pylist()
    if kind.get_field_index("bytes") < 0:
        return [path or "" for path in paths]
    has_bytes = pc.struct_field(values, "bytes").is_valid().to_pylist()
    return ["" if is_there else path or "" for path, is_there in zip(paths, has_bytes, strict=True)]


def _flatten(values: "pa.ChunkedArray") -> "pa.ChunkedArray":
    import pyarrow.compute as pc

    return pc.list_flatten(values)


def _list_lengths(values: "pa.ChunkedArray") -> list[int]:
    import pyarrow.compute as pc

    return [length or 0 for length in pc.list_value_length(values).to_pylist()]
