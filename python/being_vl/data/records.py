"""Records: conversations about images, read and checked."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from being_vl.data.options import CATEGORIES
from being_vl.data.readers import kind_of, open_records
from being_vl.errors import RecordError

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
    """What one side says; a user's text may hold `<image>` placeholders."""

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
        category: What mixtures ask for.
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
    def where(self) -> str:
        """The record's place, for messages."""
        return f"{self.source}: record {self.index} (id {self.id!r})"


class Records:
    """The records of files, read and checked when they are asked for; in memory is only where each of them is.

    Args:
        paths: One file or several, as `being_vl.data.readers.open_records` takes them. Records are numbered through
            all of them.
        default_category: Category of the records that name none.
        categories: The categories that there are.
        images_in_front: Whether a record with images may have no placeholder at all; they come in front of its text.

    Raises:
        RecordError: naming file, record (counted from 0 in its file) and field, for what is wrong.
    """

    def __init__(
        self,
        paths: Path | str | Iterable[Path | str],
        default_category: str = "foundation",
        categories: Sequence[str] = CATEGORIES,
        images_in_front: bool = False,
    ) -> None:
        if default_category not in categories:
            raise RecordError(
                f"default category is {default_category!r}; expected one of {', '.join(categories)}"
            )
        self.categories = categories
        self.paths = [Path(path) for path in ([paths] if isinstance(paths, Path | str) else paths)]
        self._default_category = default_category
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
        for record in self.checked():
            if isinstance(record, RecordError):
                raise record
            yield record

    def checked(self, start: int = 0, stop: int | None = None) -> Iterator[Record | RecordError]:
        """Records `start` to `stop` in turn; in place of a bad one, the error that says what is wrong with it."""
        for file, begin, end in self.parts(start, len(self) if stop is None else stop):
            for index, item in enumerate(self._readers[file].read(begin, end), begin):
                try:
                    yield self._read(item, file, index)
                except RecordError as error:
                    yield error

    def parts(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Where records `start` to `stop` are: numbers of files in `paths`, and of records in them, from and to."""
        first = 0
        for file, end in enumerate(self._ends.tolist()):
            if max(start, first) < min(stop, end):
                yield file, max(start, first) - first, min(stop, end) - first
            first = end

    def by_category(self) -> dict[str, NDArray[np.int64]]:
        """The numbers of the records of each category, ascending; reads and checks all records, one at a time."""
        names = list(self.categories)
        found = np.fromiter((names.index(record.category) for record in self), np.uint16, len(self))
        return {names[n]: np.flatnonzero(found == n) for n in np.unique(found)}

    def _read(self, item: Any, file: int, index: int) -> Record:
        path, allowed = self.paths[file], self._images_in_front
        return _read_record(item, path, index, self._default_category, self.categories, allowed)


def _read_record(
    item: Any,
    path: Path,
    index: int,
    default_category: str,
    categories: Sequence[str],
    images_in_front: bool,
) -> Record:
    if isinstance(item, RecordError):
        raise item
    if not isinstance(item, dict):
        raise RecordError(
            f"{path}: record {index}: a JSON {kind_of(item)}; expected an object with 'conversations' or 'messages'"
        )
    item = {
        name: value for name, value in item.items() if value is not None
    }  # a table's rows have every field
    name = item.get("id")
    identity = str(index) if name is None else str(name)
    where = f"{path}: record {index} (id {identity!r})"

    category = item.get("category", default_category)
    if category not in categories:
        expected = f"expected one of {', '.join(categories)}"
        raise RecordError(f"{where}: 'category' is {category!r}; {expected}", "unknown category")

    named = "image" if "image" in item else "images"
    images = item.get(named, [])
    images = images if isinstance(images, list) else [images]
    for image in images:
        if not isinstance(image, str) or not image:
            raise RecordError(
                f"{where}: {named!r} holds {image!r:.80}; expected a file name or a list of file names"
            )

    field = next((field for field in (*_DIALECTS, "caption") if field in item), None)
    if field is None:
        raise RecordError(f"{where}: no field 'conversations' or 'messages'; expected a list of turns")
    if field == "caption":
        turns: tuple[Turn, ...] = (Turn("assistant", _checked_text(item[field], "'caption'", where)),)
        if not images:
            raise RecordError(f"{where}: its 'caption' has no image; expected a text about images")
        if not turns[0].text:
            raise RecordError(f"{where}: its 'caption' is empty; expected a text", "empty answer")
        if PLACEHOLDER in turns[0].text:
            raise RecordError(f"{where}: {PLACEHOLDER} in its 'caption'; expected text", "image markers")
    else:
        turns = _read_turns(item[field], field, where)
    found = sum(turn.text.count(PLACEHOLDER) for turn in turns)
    if found != len(images) and (found or (field != "caption" and not images_in_front)):
        raise RecordError(
            f"{where}: {found} {PLACEHOLDER} in {field!r} for {len(images)} image{'s' * (len(images) != 1)}; "
            "expected as many" + ("" if found else ", unless images_in_front is set"),
            "image markers",
        )
    return Record(identity, tuple(images), turns, category, path, index)


def _read_turns(items: Any, field: str, where: str) -> tuple[Turn, ...]:
    if not isinstance(items, list) or not items:
        found = "empty" if items == [] else f"a JSON {kind_of(items)}"
        raise RecordError(f"{where}: {field!r} is {found}; expected a list of turns")
    role_key, text_key, roles = _DIALECTS[field]
    system, user, assistant = roles
    turns: list[Turn] = []
    begins = 0
    for number, item in enumerate(items):
        place = f"'{field}[{number}]'"
        if not isinstance(item, dict):
            raise RecordError(
                f"{where}: {place} is a JSON {kind_of(item)}; expected an object with {role_key!r} and {text_key!r}"
            )
        turn = {role_key: item.get(role_key), text_key: _joined(item.get(text_key))}
        for key, value in turn.items():
            if not isinstance(value, str):
                found = f"has a {key!r} that is a JSON {kind_of(value)}" if key in item else f"has no {key!r}"
                raise RecordError(f"{where}: {place} {found}; expected a string")
        name, text = turn[role_key], _checked_text(turn[text_key], place, where)
        if name not in roles:
            raise RecordError(
                f"{where}: {place} is from {name!r}; expected {user!r} or {assistant!r}", "odd turns"
            )
        if PLACEHOLDER in text and name != user:
            what = "an answer" if name == assistant else "a system turn"
            raise RecordError(
                f"{where}: {place} has {PLACEHOLDER} in {what}; expected it in questions only",
                "image markers",
            )
        if name == system and number == 0:
            begins = 1
            turns += [Turn("system", text)] if text else []
            continue
        if roles[name] != ("assistant" if (number - begins) % 2 else "user"):
            raise RecordError(
                f"{where}: {place} is from {name!r}; expected {user!r} first, then {assistant!r} and {user!r} in turn",
                "odd turns",
            )
        if name == assistant and not text:
            raise RecordError(
                f"{where}: {place} is an empty answer; there is nothing to learn from it", "empty answer"
            )
        turns.append(Turn(roles[name], text))
    if not turns or turns[-1].role != "assistant":
        raise RecordError(
            f"{where}: {field!r} ends with a question; expected an answer from {assistant!r}", "odd turns"
        )
    return tuple(turns)


def _checked_text(text: Any, place: str, where: str) -> str:
    """A text without white space around it."""
    if not isinstance(text, str):
        raise RecordError(f"{where}: {place} is a JSON {kind_of(text)}; expected a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RecordError(
            f"{where}: {place} holds {text[error.start]!a}, half of a character, at {error.start}; expected "
            "Unicode text",
            "wrong encoding",
        ) from None
    return text.strip()


def _joined(content: Any) -> Any:
    """The text of a message whose content is a list of parts, `text` and `image`; other contents as they are."""
    if not isinstance(content, list):
        return content
    parts = [part if isinstance(part, dict) else {} for part in content]
    texts = [PLACEHOLDER if part.get("type") == "image" else part.get("text") for part in parts]
    return content if None in texts else "\n".join(map(str, texts))
