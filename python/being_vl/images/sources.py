"""Where images come from: folders, lists of files, LLaVA JSON, tar files of WebDataset, Parquet and Arrow tables."""

import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from being_vl.errors import ImageError
from being_vl.images.decode import SUFFIXES, find_images

ROW_GROUPS_IN_MEMORY = 2


class Source(Protocol):
    """One image file, wherever its bytes are; picklable."""

    @property
    def key(self) -> str:
        """The image's name, unique in a job."""

    def read(self) -> bytes:
        """The whole file.

        Raises:
            OSError, ImageError: if it cannot be read.
        """

    @property
    def stamp(self) -> tuple[Any, ...]:
        """What changes when the image does, without reading it."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A file of its own."""

    key: str
    path: Path

    def read(self) -> bytes:
        """The file's bytes."""
        return self.path.read_bytes()

    @property
    def stamp(self) -> tuple[Any, ...]:
        """Name, size and time of change; no size if it is missing."""
        return self.key, *_stat(self.path)


@dataclass(frozen=True, slots=True)
class TarMember:
    """A part of an uncompressed tar file, read in place."""

    key: str
    path: Path
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
    def stamp(self) -> tuple[Any, ...]:
        """Name and place, and the tar file's size and time of change."""
        return self.key, self.offset, self.size, *_stat(self.path)


@dataclass(frozen=True, slots=True)
class TableRow:
    """A row of a Parquet file, or of an Arrow file as `datasets` writes it."""

    key: str
    path: Path
    column: str
    group: int
    row: int

    def read(self) -> bytes:
        """The image's bytes, or those of the file that the row names."""
        value = _row_group(self.path, self.column, self.group)[self.row].as_py()
        if isinstance(value, dict):  # datasets' Image: bytes, or a path where they were not embedded
            path = value.get("path")
            value = value.get("bytes")
            if value is None and path:
                return Path(self.path.parent, path).read_bytes()
        if value is None:
            raise ImageError(f"{self.key}: holds no image")
        return bytes(value)

    @property
    def stamp(self) -> tuple[Any, ...]:
        """Name and column, and the table's size and time of change."""
        return self.key, self.column, *_stat(self.path)


def find_sources(path: Path, root: Path | None = None) -> list[Source]:
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
    sources: list[Source] = []
    if path.is_file():
        sources += _of_file(path, path.parent if root is None else root)
        if not sources:
            raise ImageError(f"{path}: names no image")
    else:
        try:
            sources += (ImageFile(key, path / key) for key in find_images(path))
        except ImageError:
            for container in (p for p in path.rglob("*") if p.suffix in CONTAINERS):
                sources += CONTAINERS[container.suffix](container, container.relative_to(path).as_posix())
            if not sources:
                raise
    return sorted(sources, key=lambda source: source.key)


def _of_file(path: Path, root: Path) -> Iterator[Source]:
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


def _tar_members(path: Path, name: str) -> Iterator[Source]:
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isfile() and Path(member.name).suffix.lower() in SUFFIXES:
                    key = f"{name}/{member.name.removeprefix('./')}"
                    yield TarMember(key, path, member.offset_data, member.size)
    except tarfile.TarError as error:
        raise ImageError(f"{path}: not a whole uncompressed tar file ({error})") from None


def _table_rows(path: Path, name: str) -> Iterator[Source]:
    try:
        column, sizes = _layout(path)
    except (OSError, pa.ArrowException) as error:
        raise ImageError(f"{path}: not a whole table ({error})") from None
    digits = len(str(sum(sizes)))
    first = 0
    for group, rows in enumerate(sizes):
        for row in range(rows):
            yield TableRow(f"{name}/{first + row:0{digits}d}", path, column, group, row)
        first += rows


LISTS: dict[str, Callable[[str], list[str]]] = {".txt": _names_in_list, ".json": _names_in_records}
CONTAINERS: dict[str, Callable[[Path, str], Iterator[Source]]] = {
    ".tar": _tar_members,
    ".parquet": _table_rows,
    ".arrow": _table_rows,
}


def _layout(path: Path) -> tuple[str, list[int]]:
    """The column of images, and the rows of each part of the table."""
    if path.suffix == ".parquet":
        file = pq.ParquetFile(path)
        sizes = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
        return _image_column(path, file.schema_arrow), sizes
    schema, batches = arrow_batches(path)
    return _image_column(path, schema), [batch.num_rows for batch in batches]


def _image_column(path: Path, schema: pa.Schema) -> str:
    """The column of `datasets`' images (structs with `bytes`), or else that of binary values."""
    structs = [f.name for f in schema if pa.types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
    binary = [f.name for f in schema if pa.types.is_binary(f.type) or pa.types.is_large_binary(f.type)]
    columns = structs or binary
    if len(columns) != 1:
        raise ImageError(
            f"{path}: expected one column of images, that is of binary values or of structs with a field bytes; found "
            f"{', '.join(columns) or 'none'} in {', '.join(schema.names)}"
        )
    return str(columns[0])


def arrow_batches(path: Path) -> tuple[pa.Schema, list[pa.RecordBatch]]:
    """Schema and record batches of an Arrow file, in place: of `datasets` streaming format or of the other one.

    Raises:
        OSError, pyarrow.ArrowException: if it cannot be read, or is not whole.
    """
    mapped = pa.memory_map(str(path))
    if mapped.read(6) == b"ARROW1":
        file = pa.ipc.open_file(mapped)
        return file.schema, [file.get_batch(n) for n in range(file.num_record_batches)]
    mapped.seek(0)
    stream = pa.ipc.open_stream(mapped)
    return stream.schema, list(stream)


@lru_cache(ROW_GROUPS_IN_MEMORY)
def _row_group(path: Path, column: str, group: int) -> Any:
    """One column of one part of a table."""
    if path.suffix == ".parquet":
        return pq.ParquetFile(path).read_row_group(group, columns=[column])[column]
    return arrow_batches(path)[1][group][column]


def _stat(path: Path) -> tuple[int, ...]:
    try:
        stat = path.stat()
    except OSError:
        return ()
    return stat.st_size, stat.st_mtime_ns
