"""Where images come from: folders, lists of files, LLaVA JSON, tar files of WebDataset, Parquet and Arrow tables."""

import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from being_vl.errors import ImageError
from being_vl.files import file_version
from being_vl.images.files import list_image_files
from being_vl.images.tables import Table, open_table
from being_vl.images.tars import member_key, read_members
from being_vl.options import StrPath

if TYPE_CHECKING:
    import pyarrow as pa


class ImageSource(Protocol):
    """One image file, wherever its bytes are; picklable."""

    @property
    def key(self) -> str:
        """The image's name, unique in a job."""

    def read(self) -> bytes:
        """All bytes of the image file.

        Raises:
            OSError, ImageError: if it cannot be read.
        """

    @property
    def fingerprint(self) -> tuple[Any, ...]:
        """JSON-able values that change with the image, known without reading it."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A file of its own."""

    key: str
    path: Path

    def read(self) -> bytes:
        """The file's bytes."""
        return self.path.read_bytes()

    @property
    def fingerprint(self) -> tuple[Any, ...]:
        """Key, size and time of change; the key alone if the file is missing."""
        return self.key, *file_version(self.path)


@dataclass(frozen=True, slots=True)
class TarMember:
    """A part of an uncompressed tar file, read in place.

    Args:
        key: The image's name.
        path: The tar file.
        version: The tar file's size and time of change.
        offset: Where the member's bytes begin in it.
        size: How many they are.
    """

    key: str
    path: Path
    version: tuple[int, ...]
    offset: int
    size: int

    def read(self) -> bytes:
        """The member's bytes."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) < self.size:
            raise ImageError(f"{self.key}: the tar file ends within it")
        return data

    @property
    def fingerprint(self) -> tuple[Any, ...]:
        """Key and place, and the tar file's size and time of change."""
        return self.key, self.offset, self.size, *self.version


@dataclass(frozen=True, slots=True)
class TableRow:
    """A row of a Parquet or Arrow file.

    Args:
        key: The image's name.
        table: The file.
        column: Name of the column with the images.
        group: Number of the row group or record batch.
        row: The row's number in it.
    """

    key: str
    table: Table
    column: str
    group: int
    row: int

    def read(self) -> bytes:
        """The image's bytes, or those of the file that the row names."""
        value = self.table.read_group(self.group, (self.column,))[self.column][self.row].as_py()
        if isinstance(value, dict):  # datasets' Image: bytes, or a path where they were not embedded
            path = value.get("path")
            value = value.get("bytes")
            if value is None and path:
                return Path(self.table.path.parent, path).read_bytes()
        if value is None:
            raise ImageError(f"{self.key}: holds no image")
        return bytes(value)

    @property
    def fingerprint(self) -> tuple[Any, ...]:
        """Key and column, and the table's size and time of change."""
        return self.key, self.column, *self.table.version


def find_images(path: StrPath, root: StrPath | None = None) -> list[ImageSource]:
    """All images that `path` names, in the order of their keys.

    Args:
        path: One of

            - a folder: the image files in it and its subfolders; if there are none, the tar, Parquet and Arrow files;
            - `.txt`: a list of files, one a line;
            - `.json`: records of LLaVA JSON, whose `image` is a file or a list of them;
            - `.tar`: of WebDataset; its members that have an image's suffix;
            - `.parquet`, `.arrow`: the column of `datasets`' images or, if there is one of them, of binary values.

            Files are keyed by their name in the folder, list or record, members and rows by `FILE.tar/MEMBER` and
            `FILE.parquet/ROW`.
        root: Folder that names in a list or records are relative to; the file's own by default.

    Raises:
        ImageError: if there is no image, or a file is damaged as a whole.
    """
    path = Path(path)
    sources: list[ImageSource] = []
    if path.is_file():
        sources += _find_in_file(path, path.parent if root is None else Path(root))
        if not sources:
            raise ImageError(f"{path}: names no image")
    else:
        try:
            sources += (ImageFile(key, path / key) for key in list_image_files(path))
        except ImageError:
            for container in (p for p in path.rglob("*") if p.suffix in CONTAINERS):
                sources += CONTAINERS[container.suffix](container, container.relative_to(path).as_posix())
            if not sources:
                raise
    return sorted(sources, key=lambda source: source.key)


def _find_in_file(path: Path, root: Path) -> Iterator[ImageSource]:
    """The images that a file holds or names."""
    if path.suffix in CONTAINERS:
        return CONTAINERS[path.suffix](path, path.name)
    if path.suffix not in LISTS:
        raise ImageError(
            f"{path}: expected a folder or a file that ends in {', '.join([*LISTS, *CONTAINERS])}; for one image give "
            "its folder"
        )
    try:
        names = LISTS[path.suffix](path.read_text(encoding="utf-8"))
    except (ValueError, TypeError, AttributeError) as error:
        raise ImageError(f"{path}: names of images cannot be read from it ({error})") from None
    return (ImageFile(key, root / key) for key in dict.fromkeys(names))


def _names_in_list(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _names_in_records(text: str) -> list[str]:
    images = (record.get("image", []) for record in json.loads(text))
    return [name for image in images for name in ([image] if isinstance(image, str) else image)]


def _tar_members(path: Path, tar_name: str) -> Iterator[ImageSource]:
    version = file_version(path)
    try:
        with path.open("rb") as file:
            for member in read_members(file):
                if key := member_key(tar_name, member):
                    yield TarMember(key, path, version, member.offset_data, member.size)
    except tarfile.TarError as error:
        raise ImageError(f"{path}: not a complete uncompressed tar file ({error})") from None


def _table_rows(path: Path, table_name: str) -> Iterator[ImageSource]:
    import pyarrow as pa

    try:
        table = open_table(path)
    except (OSError, pa.ArrowException) as error:
        raise ImageError(f"{path}: not a complete table ({error})") from None
    column = _image_column(path, table.schema)
    number = 0
    for group, size in enumerate(table.group_sizes):
        for row in range(size):
            yield TableRow(table.row_key(table_name, number), table, column, group, row)
            number += 1


def _image_column(path: Path, schema: "pa.Schema") -> str:
    """The column of `datasets`' images (structs with `bytes`), or else that of binary values."""
    import pyarrow as pa

    struct_columns = [
        f.name for f in schema if pa.types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0
    ]
    binary_columns = [
        f.name for f in schema if pa.types.is_binary(f.type) or pa.types.is_large_binary(f.type)
    ]
    columns = struct_columns or binary_columns
    if len(columns) != 1:
        raise ImageError(
            f"{path}: expected one column of images, that is of binary values or of structs with a field bytes; found "
            f"{', '.join(columns) or 'none'} in {', '.join(schema.names)}"
        )
    return str(columns[0])


LISTS: dict[str, Callable[[str], list[str]]] = {".txt": _names_in_list, ".json": _names_in_records}
CONTAINERS: dict[str, Callable[[Path, str], Iterator[ImageSource]]] = {
    ".tar": _tar_members,
    ".parquet": _table_rows,
    ".arrow": _table_rows,
}
