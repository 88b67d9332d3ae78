"""Records: conversations about images, read and checked."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from being_vl.data.options import CATEGORIES, RecordFile, check_record_files, list_record_files
from being_vl.data.turns import Turn as Turn
from being_vl.data.turns import read_caption, read_turns
from being_vl.errors import RecordError
from being_vl.images.fields import CONVERSATION_FIELDS, find_unsupported_field, is_empty, is_image_field
from being_vl.images.readers import open_records
from being_vl.images.record_files import find_record_files
from being_vl.images.references import PLACEHOLDER as PLACEHOLDER
from being_vl.images.references import UNSUPPORTED, describe_kind, read_references, show_value
from being_vl.names import show_name
from being_vl.options import StrPath


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation: questions and answers in turns, about any number of images; or a caption of images.

    Args:
        id: The record's own id, or its index in the file.
        images: Keys of the images in the grid store, in the order of their placeholders.
        turns: User and assistant alternate, user first, assistant last; a system turn may stand before them. A caption
            is a single turn of the assistant.
        category: The kind of data, by which mixtures are made.
        source: File that the record comes from.
        index: Position in that file, counted from 0.
    """

    id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    category: str
    source: Path
    index: int

    @property
    def location(self) -> str:
        """The record's place, for messages."""
        return _describe_place(self.source, self.index, self.id)


class Records:
    """The records of files, read and checked when they are asked for; memory holds only the place of each.

    Args:
        paths: One file or several, as `being_vl.images.readers.open_records` takes them, or what else
            `find_record_files` takes. Records are numbered through all of them. A `RecordFile` has a category for those
            of its records that name none.
        default_category: Category of the other records that name none.
        categories: The categories that records may have.
        images_in_front: Whether a record with images may have no placeholder at all; they come in front of its text.

    Raises:
        RecordError: if a file or record has a fault, naming file, record (counted from 0 in its file) and field.
    """

    def __init__(
        self,
        paths: StrPath | RecordFile | Iterable[StrPath | RecordFile],
        default_category: str = "foundation",
        categories: Sequence[str] = CATEGORIES,
        images_in_front: bool = False,
    ) -> None:
        if default_category not in categories:
            raise RecordError(
                f"default category is {default_category!r}; expected one of {', '.join(categories)}"
            )
        self.categories = categories
        files = list_record_files(paths)
        check_record_files(files, categories)
        parts = [
            (path, file.category) for file in files for path in find_record_files(file.path, report=True)
        ]
        self.paths = [path for path, _ in parts]
        self._default_categories = [category or default_category for _, category in parts]
        self._images_in_front = images_in_front
        self._readers = [open_records(path) for path in self.paths]
        self._ends = np.cumsum([len(reader) for reader in self._readers])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, number: int) -> Record:
        if not 0 <= number < len(self):
            raise IndexError(f"there are {len(self)} records, numbered from 0; asked for number {number}")
        file = int(np.searchsorted(self._ends, number, side="right"))
        index = number - int(self._ends[file]) + len(self._readers[file])
        return self._read(self._readers[file][index], file, index)

    def __iter__(self) -> Iterator[Record]:
        for record in self.read():
            if isinstance(record, RecordError):
                raise record
            yield record

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Record | RecordError]:
        """Records `start` to `stop` - 1 in order; in place of one with a fault, the error that names the fault."""
        for file, part_start, end in self.parts(start, len(self) if stop is None else stop):
            for index, item in enumerate(self._readers[file].read(part_start, end), part_start):
                try:
                    yield self._read(item, file, index)
                except RecordError as error:
                    yield error

    def parts(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Where records `start` to `stop` - 1 are: (index in `paths`, start in that file, stop in that file)."""
        start_of_file = 0
        for file, end in enumerate(self._ends.tolist()):
            if max(start, start_of_file) < min(stop, end):
                yield file, max(start, start_of_file) - start_of_file, min(stop, end) - start_of_file
            start_of_file = end

    def category_of(self, file: int) -> str:
        """Category of the records of the file `paths[file]` that name none."""
        return self._default_categories[file]

    def group_by_category(self) -> dict[str, NDArray[np.int64]]:
        """The numbers of the records of each category, ascending; reads and checks all records, one at a time."""
        names = list(self.categories)
        indices = np.fromiter((names.index(record.category) for record in self), np.uint16, len(self))
        return {names[n]: np.flatnonzero(indices == n) for n in np.unique(indices)}

    def _read(self, item: Any, file: int, index: int) -> Record:
        path, is_image_allowed_in_front = self.paths[file], self._images_in_front
        return _read_record(
            item, path, index, self._default_categories[file], self.categories, is_image_allowed_in_front
        )


def _read_record(
    item: Any,
    path: Path,
    index: int,
    default_category: str,
    categories: Sequence[str],
    images_in_front: bool,
) -> Record:
    """Check what a file holds as a record.

    Raises:
        RecordError: naming file, record and field.
    """
    if isinstance(item, RecordError):
        raise item
    if not isinstance(item, dict):
        raise RecordError(
            f"{_show_path(path)}: record {index}: a JSON {describe_kind(item)}; expected an object with "
            "'conversations' or 'messages'"
        )
    # A table's rows have every field, null where a record has none.
    item = {name: value for name, value in item.items() if value is not None}

    # The fields: id, category, images, and a conversation or a caption.
    name = item.get("id")
    record_id = str(index) if name is None else str(name)
    location = _describe_place(path, index, record_id)
    category = item.get("category", default_category)
    if category not in categories:
        expectation = f"expected one of {', '.join(categories)}"
        raise RecordError(
            f"{location}: 'category' is {show_value(category)}; {expectation}", "unknown category"
        )
    images = tuple(reference.name for reference in read_references(item, location, path, index))
    if (field := find_unsupported_field(item, bool(images))) is not None:
        remedy = "expected the image in 'image'" if is_image_field(field) else "expected it to be empty"
        raise RecordError(f"{location}: the field {field!r} cannot be learned from; {remedy}", UNSUPPORTED)
    field = _find_conversation(item, location)
    turns = (
        read_caption(item[field], images, location)
        if field == "caption"
        else read_turns(item, field, location)
    )

    # As many placeholders as images, or none where images come in front.
    count = sum(turn.text.count(PLACEHOLDER) for turn in turns)
    if count != len(images) and (count or not (field in ("caption", "texts") or images_in_front)):
        raise RecordError(
            f"{location}: {count} {PLACEHOLDER} in {field!r} for {len(images)} image{'s' * (len(images) != 1)}; "
            "expected as many" + ("" if count else ", unless images_in_front is set"),
            "image markers",
        )
    return Record(record_id, images, turns, category, path, index)


def _find_conversation(item: dict[str, Any], location: str) -> str:
    """The field that holds a record's turns, or its caption."""
    fields = [field for field in (*CONVERSATION_FIELDS, "caption") if field in item]
    full_fields = [field for field in fields if len(fields) == 1 or not is_empty(item[field])] or fields
    if not full_fields:
        names = ", ".join(show_name(name, 40) for name in islice(item, 5))
        contents = f" (it has {names}{', …' * (len(item) > 5)})" if item else ""
        raise RecordError(
            f"{location}: no field 'conversations' or 'messages'{contents}; expected a list of turns"
        )
    if len(full_fields) > 1 and full_fields[1] != "caption":
        raise RecordError(
            f"{location}: both {full_fields[0]!r} and {full_fields[1]!r}; expected one of them", UNSUPPORTED
        )
    return full_fields[0]


def _describe_place(path: Path, index: int, record_id: str) -> str:
    """A record's place, for messages."""
    return f"{_show_path(path)}: record {index} (id '{show_name(record_id, 100)}')"


@lru_cache(4)
def _show_path(path: Path) -> str:
    return show_name(path, 1000)
