"""Records: conversations about images, read and checked."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from being_vl.data.options import CATEGORIES, RecordFile, check_record_files, list_record_files
from being_vl.errors import RecordError
from being_vl.images.readers import describe_kind, open_records
from being_vl.images.references import read_references
from being_vl.options import StrPath

PLACEHOLDER = "<image>"
"""Where in a question an image stands."""

Role = Literal["system", "user", "assistant"]
_DIALECTS: dict[str, tuple[str, str, dict[str, Role]]] = {
    "conversations": ("from", "value", {"system": "system", "human": "user", "gpt": "assistant"}),
    "messages": ("role", "content", {"system": "system", "user": "user", "assistant": "assistant"}),
}
"""Field of the turns: in each the field of its role and of its text, and the names of the roles."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn of a conversation; a user's text may hold `<image>` placeholders."""

    role: Role
    text: str


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
        return f"{self.source}: record {self.index} (id {self.id!r})"


class Records:
    """The records of files, read and checked when they are asked for; memory holds only the place of each.

    Args:
        paths: One file or several, as `being_vl.images.readers.open_records` takes them. Records are numbered through
            all of them. A `RecordFile` has a category for those of its records that name none.
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
        self.paths = [file.path for file in files]
        self._default_categories = [file.category or default_category for file in files]
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
            f"{path}: record {index}: a JSON {describe_kind(item)}; expected an object with 'conversations' or "
            "'messages'"
        )
    # A table's rows have every field, null where a record has none.
    item = {name: value for name, value in item.items() if value is not None}

    # The fields: id, category, images, and a conversation or a caption.
    name = item.get("id")
    record_id = str(index) if name is None else str(name)
    location = f"{path}: record {index} (id {record_id!r})"

    category = item.get("category", default_category)
    if category not in categories:
        expectation = f"expected one of {', '.join(categories)}"
        raise RecordError(f"{location}: 'category' is {category!r}; {expectation}", "unknown category")
    images = tuple(reference.name for reference in read_references(item, location, path, index))
    field = next((field for field in (*_DIALECTS, "caption") if field in item), None)
    if field is None:
        raise RecordError(f"{location}: no field 'conversations' or 'messages'; expected a list of turns")
    is_caption = field == "caption"
    turns = (
        _read_caption(item[field], images, location)
        if is_caption
        else _read_turns(item[field], field, location)
    )

    # As many placeholders as images, or none where images come in front.
    count = sum(turn.text.count(PLACEHOLDER) for turn in turns)
    if count != len(images) and (count or not (is_caption or images_in_front)):
        raise RecordError(
            f"{location}: {count} {PLACEHOLDER} in {field!r} for {len(images)} image{'s' * (len(images) != 1)}; "
            "expected as many" + ("" if count else ", unless images_in_front is set"),
            "image markers",
        )
    return Record(record_id, images, turns, category, path, index)


def _read_caption(caption: Any, images: tuple[str, ...], location: str) -> tuple[Turn, ...]:
    """A caption of images, as a turn of the assistant."""
    turn = Turn("assistant", _check_text(caption, "'caption'", location))
    if not images:
        raise RecordError(f"{location}: its 'caption' has no image; expected a text about images")
    if not turn.text:
        raise RecordError(f"{location}: its 'caption' is empty; expected a text", "empty answer")
    if PLACEHOLDER in turn.text:
        raise RecordError(f"{location}: {PLACEHOLDER} in its 'caption'; expected text", "image markers")
    return (turn,)


def _read_turns(items: Any, field: str, location: str) -> tuple[Turn, ...]:
    """The turns of a conversation: user and assistant alternate, behind a system turn if there is one."""
    if not isinstance(items, list) or not items:
        content = "empty" if items == [] else f"a JSON {describe_kind(items)}"
        raise RecordError(f"{location}: {field!r} is {content}; expected a list of turns")
    _, _, roles = _DIALECTS[field]
    system, user, assistant = roles
    turns: list[Turn] = []
    num_system = 0
    for number, item in enumerate(items):
        place = f"'{field}[{number}]'"
        name, text = _read_turn(item, field, place, location)
        # An empty system turn is no turn.
        if name == system and number == 0:
            num_system = 1
            turns += [Turn("system", text)] if text else []
            continue
        if roles[name] != ("assistant" if (number - num_system) % 2 else "user"):
            raise RecordError(
                f"{location}: {place} is from {name!r}; expected {user!r} first, then {assistant!r} and {user!r} "
                "in turn",
                "odd turns",
            )
        if name == assistant and not text:
            raise RecordError(
                f"{location}: {place} is an empty answer; there is nothing to learn from it", "empty answer"
            )
        turns.append(Turn(roles[name], text))
    if not turns or turns[-1].role != "assistant":
        raise RecordError(
            f"{location}: {field!r} ends with a question; expected an answer from {assistant!r}", "odd turns"
        )
    return tuple(turns)


def _read_turn(item: Any, field: str, place: str, location: str) -> tuple[str, str]:
    """The name of a turn's role in its dialect, and its text."""
    role_key, text_key, roles = _DIALECTS[field]
    _, user, assistant = roles
    if not isinstance(item, dict):
        raise RecordError(
            f"{location}: {place} is a JSON {describe_kind(item)}; expected an object with {role_key!r} and "
            f"{text_key!r}"
        )
    turn = {role_key: item.get(role_key), text_key: _join_parts(item.get(text_key))}
    for key, value in turn.items():
        if not isinstance(value, str):
            fault = (
                f"has a {key!r} that is a JSON {describe_kind(value)}" if key in item else f"has no {key!r}"
            )
            raise RecordError(f"{location}: {place} {fault}; expected a string")
    name, text = turn[role_key], _check_text(turn[text_key], place, location)
    if name not in roles:
        raise RecordError(
            f"{location}: {place} is from {name!r}; expected {user!r} or {assistant!r}", "odd turns"
        )
    if PLACEHOLDER in text and name != user:
        turn_kind = "an answer" if name == assistant else "a system turn"
        raise RecordError(
            f"{location}: {place} has {PLACEHOLDER} in {turn_kind}; expected it in questions only",
            "image markers",
        )
    return name, text


def _check_text(text: Any, place: str, location: str) -> str:
    """A text without white space around it."""
    if not isinstance(text, str):
        raise RecordError(f"{location}: {place} is a JSON {describe_kind(text)}; expected a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RecordError(
            f"{location}: {place} holds {text[error.start]!a}, half of a character, at {error.start}; expected "
            "Unicode text",
            "wrong encoding",
        ) from None
    return text.strip()


def _join_parts(content: Any) -> Any:
    """The text of a message whose content is a list of parts, `text` and `image`; other contents unchanged."""
    if not isinstance(content, list):
        return content
    parts = [part if isinstance(part, dict) else {} for part in content]
    texts = [PLACEHOLDER if part.get("type") == "image" else part.get("text") for part in parts]
    return content if None in texts else "\n".join(map(str, texts))
