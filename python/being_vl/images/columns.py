"""Which column of a table holds images, and how: by its name and its Arrow type."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from being_vl.errors import ImageError
from being_vl.names import show_name

if TYPE_CHECKING:
    import pyarrow as pa

IMAGE_FIELDS = ("image", "images")
"""Names of the columns that hold images whatever else is in the table, as records call them."""

Kind = Literal["bytes", "struct", "names"]

_TYPES = (
    "bytes of image files, names of files, or structs with 'bytes' or 'path' as `datasets` writes them; or lists of "
    "these"
)
_STRINGS = ("is_string", "is_large_string", "is_string_view")
_BINARIES = ("is_binary", "is_large_binary", "is_binary_view")
_LISTS = ("is_list", "is_large_list", "is_fixed_size_list", "is_list_view", "is_large_list_view")


@dataclass(frozen=True, slots=True)
class ImageColumn:
    """A column of images.

    Args:
        name: The column's.
        kind: What an image is in it: `bytes` of an image file; a `struct` as `datasets` writes it, with the field
            `bytes` or `path` or both; or names of files: `names`.
        is_list: Whether a row holds a list of images.
    """

    name: str
    kind: Kind
    is_list: bool

    def values(self, value: Any) -> list[bytes | str | None]:
        """The images of a row: bytes, names of files, or None for one that is missing.

        Args:
            value: Of this column in the row, as `pyarrow` converts it to Python.
        """
        if not self.is_list:
            return [_read_image(value)]
        return [_read_image(item) for item in value or ()]


def find_image_column(path: Path, schema: "pa.Schema", column: str | None = None) -> ImageColumn | None:
    """The column of images of a table.

    That is `image` or `images` if there is one, else the only one that holds bytes or `datasets`' images.

    Args:
        path: The table's file, for errors.
        schema: The table's.
        column: Its name, where it is another one.

    Returns:
        The column; None if none could be one of images.

    Raises:
        ImageError: if several columns could be the one, or it is missing or of a type that holds no images.
    """
    columns = _columns_by_name(path, schema)
    if column is not None and column not in columns:
        names = ", ".join(map(show_name, list(columns)[:20]))
        raise ImageError(f"{path}: has no column {show_name(column)}; expected one of {names}")
    fields = [columns[name] for name in ([column] if column is not None else IMAGE_FIELDS) if name in columns]
    named_columns = [
        _image_column(path, field) for field in fields if column is not None or not _is_empty(field)
    ]
    if not named_columns and fields:
        return ImageColumn(fields[0].name, "names", is_list=False)  # of nothing but nulls
    return _only_column(path, named_columns or list(_columns_of_bytes(schema)))


def image_kind(field: "pa.Field") -> tuple[Kind, bool] | None:
    """How a field holds images, and whether as lists; None if its type cannot hold any."""
    kind = _plain_type(field.type)
    item_kind = _item_kind(kind)
    is_tensor = b"ARROW:extension:name" in (field.metadata or {})  # of a type that pyarrow does not know
    if item_kind is None and _is(kind, _LISTS) and not is_tensor:
        item_kind = _item_kind(_plain_type(kind.value_type))
        return item_kind and (item_kind, True)
    return item_kind and (item_kind, False)


def _read_image(value: Any) -> bytes | str | None:
    """An image's bytes, or the name of its file."""
    if isinstance(value, dict):
        data = value.get("bytes")
        value = value.get("path") if data is None else data
    # Bytes are also written as lists of numbers.
    return bytes(value) if isinstance(value, list) else value


def _columns_by_name(path: Path, schema: "pa.Schema") -> dict[str, "pa.Field"]:
    names = schema.names
    for name in IMAGE_FIELDS:
        if names.count(name) > 1:
            raise ImageError(f"{path}: has {names.count(name)} columns {name!r}; expected one")
    return {field.name: field for field in schema}


def _image_column(path: Path, field: "pa.Field") -> ImageColumn:
    kind = image_kind(field)
    if kind is None:
        raise ImageError(
            f"{path}: column {show_name(field.name)} is of type {field.type!s:.200}; expected {_TYPES}"
        )
    return ImageColumn(field.name, *kind)


def _columns_of_bytes(schema: "pa.Schema") -> Iterator[ImageColumn]:
    """Columns that hold images going by their type alone: names, hashes, and numbers do not tell."""
    import pyarrow as pa

    for field in schema:
        kind = image_kind(field)
        value_type = _plain_type(field.type)
        value_type = _plain_type(value_type.value_type) if kind and kind[1] else value_type
        has_bytes = _is(value_type, _BINARIES) or (
            pa.types.is_struct(value_type) and value_type.get_field_index("bytes") >= 0
        )
        if kind and has_bytes:
            yield ImageColumn(field.name, *kind)


def _only_column(path: Path, columns: list[ImageColumn]) -> ImageColumn | None:
    if len(columns) > 1:
        names = ", ".join(show_name(column.name) for column in columns[:20])
        raise ImageError(
            f"{path}: several columns could be that of images ({names}); choose one with --column"
        )
    return columns[0] if columns else None


def _item_kind(kind: "pa.DataType") -> Kind | None:
    """How values of a type are images; None if they are none."""
    import pyarrow as pa

    if _is(kind, _STRINGS) or pa.types.is_null(kind):
        return "names"
    if _is(kind, _BINARIES) or (pa.types.is_fixed_size_binary(kind) and not pa.types.is_decimal(kind)):
        return "bytes"
    if _is(kind, _LISTS) and pa.types.is_uint8(kind.value_type):
        return "bytes"
    if pa.types.is_struct(kind):
        fields = {field.name: _item_kind(_plain_type(field.type)) for field in kind}
        is_null = "bytes" in fields and pa.types.is_null(kind.field("bytes").type)  # all images are named
        if "bytes" not in fields and "path" not in fields:
            return None
        if (fields.get("bytes", "bytes") == "bytes" or is_null) and fields.get("path", "names") == "names":
            return "struct"
    return None


def _plain_type(kind: "pa.DataType") -> "pa.DataType":
    """The type of the values themselves: without dictionary, run lengths, or an extension of texts or bytes."""
    import pyarrow as pa

    while True:
        if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
            kind = kind.value_type
        elif isinstance(kind, pa.BaseExtensionType) and _is(kind.storage_type, (*_STRINGS, *_BINARIES)):
            kind = kind.storage_type
        else:
            return kind


def _is_empty(field: "pa.Field") -> bool:
    """Whether a column can hold nothing but nulls, or lists of them."""
    import pyarrow as pa

    kind = _plain_type(field.type)
    return bool(pa.types.is_null(kind) or (_is(kind, _LISTS) and pa.types.is_null(kind.value_type)))


def _is(kind: "pa.DataType", tests: tuple[str, ...]) -> bool:
    import pyarrow as pa

    return any(getattr(pa.types, test)(kind) for test in tests)
