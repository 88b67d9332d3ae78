"""Encoded images, wherever their bytes are: a file of its own, a tar's member, a table's row, a record."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from being_vl.errors import ImageError
from being_vl.files import file_version
from being_vl.images.columns import ImageColumn
from being_vl.images.files import check_size, open_file, read_file
from being_vl.images.readers import Reader, open_records
from being_vl.images.references import read_references
from being_vl.images.tables import Table
from being_vl.names import show_name

READERS_IN_MEMORY = 2


class NoImageError(ImageError):
    """A row of a table that has no image, such as one of text alone."""


class ImageSource(Protocol):
    """One encoded image, wherever its bytes are; picklable."""

    @property
    def key(self) -> str:
        """The image's name, unique in a job."""

    @property
    def size(self) -> int:
        """Bytes of the image, or else of the file that it is in; 0 if there is none."""

    @property
    def place(self) -> str:
        """The file that the image is or is in, for errors."""

    def read(self) -> bytes:
        """All bytes of the image file.

        Raises:
            OSError, ValueError: if it cannot be read.
            NoImageError: if there is none.
        """

    @property
    def fingerprint(self) -> tuple[Any, ...]:
        """JSON-able values that change with the image, known without reading it."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A file of its own.

    Args:
        key: The image's name.
        place: The file's path.
        version: Its size and time of change when it was found; empty if there was none.
    """

    key: str
    place: str
    version: tuple[int, ...]

    def read(self) -> bytes:
        """The file's bytes."""
        return read_file(self.place)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.version[0] if self.version else 0

    @property
    def fingerprint(self) -> tuple[Any, ...]:
        """Key, size and time of change."""
        return self.key, *self.version


@dataclass(frozen=True, slots=True)
class TarMember:
    """A part of an uncompressed tar file, read in place.

    Args:
        key: The image's name.
        place: The tar file.
        version: The tar file's size and time of change.
        offset: Where the member's bytes begin in it.
        size: How many they are.
    """

    key: str
    place: str
    version: tuple[int, ...]
    offset: int
    size: int

    def read(self) -> bytes:
        """The member's bytes."""
        check_size(self.size)
        with open_file(self.place) as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) < self.size:
            raise ImageError(f"{show_name(self.key)}: the tar file ends within it")
        return data

    @property
    def fingerprint(self) -> tuple[Any, ...]:
        """Key and place, and the tar file's size and time of change."""
        return self.key, self.offset, self.size, *self.version


@dataclass(frozen=True, slots=True)
class TableImage:
    """An image in a row of a Parquet or Arrow file.

    Args:
        key: The image's name.
        table: The file.
        column: Its column with the images.
        group: Number of the row group or record batch.
        row: The row's number in it.
        position: The image's number in the row, from 0.
        file: The image file that the row names; empty if the row holds the image itself.
        file_version: Its size and time of change.
    """

    key: str
    table: Table
    column: ImageColumn
    group: int
    row: int
    position: int = 0
    file: str = ""
    file_version: tuple[int, ...] = ()

    def read(self) -> bytes:
        """The image's bytes, or those of the file that the row names."""
        if self.file:
            return read_file(self.file)
        name = self.column.name
        value = self.table.read_group(self.group, (name,))[name][self.row].as_py()
        images = self.column.values(value)
        data = images[self.position] if self.position < len(images) else None
        if not data:
            raise NoImageError(f"{show_name(self.key)}: a row without an image")
        if isinstance(data, str):
            raise ImageError(f"{show_name(self.key)}: names the file {show_name(data)} now")
        check_size(len(data))
        return data

    @property
    def place(self) -> str:
        """The table, or the file that the row names."""
        return self.file or str(self.table.path)

    @property
    def size(self) -> int:
        """Bytes of the table, or of the file that the row names."""
        version = self.file_version or self.table.version
        return version[0] if version else 0

    @property
    def fingerprint(self) -> tuple[Any, ...]:
        """Key and column, and the size and time of change of the table and of the file that the row names."""
        return self.key, self.column.name, *self.table.version, *self.file_version


@dataclass(frozen=True, slots=True)
class RecordImage:
    """An image that a record holds, as data URI or base64.

    Args:
        key: The image's name.
        place: The file of records.
        version: Its size and time of change.
        record: The record's number in it.
        position: The image's number among those of the record.
    """

    key: str
    place: str
    version: tuple[int, ...]
    record: int
    position: int

    def read(self) -> bytes:
        """The image's bytes."""
        item = _open_records(self.place, self.version)[self.record]
        location = f"{self.place}: record {self.record}"
        references = read_references(item, location, Path(self.place), self.record, with_data=True)
        data = references[self.position].data if self.position < len(references) else None
        if not data:
            raise ImageError(f"{show_name(self.key)}: the record holds no image")
        return data

    @property
    def size(self) -> int:
        """Bytes of the file of records."""
        return self.version[0] if self.version else 0

    @property
    def fingerprint(self) -> tuple[Any, ...]:
        """Key and position, and the size and time of change of the file of records."""
        return self.key, self.position, *self.version


@lru_cache(READERS_IN_MEMORY)
def _open_records(path: str, version: tuple[int, ...]) -> Reader:
    if file_version(path) != version:
        raise ImageError(f"{path}: changed while it was being read")
    return open_records(path)
