"""LLaVA JSON: conversations about images, read and checked."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from being_vl.errors import RecordError

CATEGORIES = ("foundation", "perception", "reasoning", "instruction")
"""The paper's kinds of data (section 3.4): captions; attributes and objects; relations; dialogues and tasks."""

PLACEHOLDER = "<image>"
"""Where in a question an image stands."""

_ROLES: dict[str, Literal["user", "assistant"]] = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says; a user's text may hold `<image>` placeholders."""

    role: Literal["user", "assistant"]
    text: str


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation: questions and answers in turns, about any number of images.

    Args:
        id: The record's own id, or its index in the file.
        images: Keys of the images in the grid store, in the order of their placeholders.
        turns: User and assistant alternate, user first, assistant last.
        category: One of `CATEGORIES`.
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


def read_records(
    paths: Path | str | Iterable[Path | str], default_category: str = "foundation"
) -> list[Record]:
    """Read files of LLaVA JSON: a list of objects with `conversations`, and optionally `id`, `image`, `category`.

    `image` is a name or a list of names. A conversation without any `<image>` has its images in front; otherwise
    there are as many placeholders as images.

    Args:
        paths: One file or several.
        default_category: Category of the records that name none.

    Raises:
        RecordError: naming file, record (counted from 0) and field, for the first thing that is wrong.
    """
    if default_category not in CATEGORIES:
        raise RecordError(
            f"default category is {default_category!r}; expected one of {', '.join(CATEGORIES)}"
        )
    files = [paths] if isinstance(paths, Path | str) else paths
    return [record for file in files for record in _read_file(Path(file), default_category)]


def _read_file(path: Path, default_category: str) -> list[Record]:
    try:
        items = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise RecordError(f"{path}: no such file; expected LLaVA JSON") from None
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror}); expected LLaVA JSON") from None
    except json.JSONDecodeError as error:
        raise RecordError(
            f"{path}: line {error.lineno}, column {error.colno}: not JSON ({error.msg}); expected a list of records"
        ) from None
    except UnicodeDecodeError as error:
        raise RecordError(f"{path}: byte {error.start}: not UTF-8; expected a JSON list of records") from None
    if not isinstance(items, list) or not items:
        found = "an empty list" if items == [] else f"a JSON {_kind(items)}"
        raise RecordError(f"{path}: {found}; expected a JSON list of records")
    return [_read_record(item, path, index, default_category) for index, item in enumerate(items)]


def _read_record(item: Any, path: Path, index: int, default_category: str) -> Record:
    if not isinstance(item, dict):
        raise RecordError(
            f"{path}: record {index}: a JSON {_kind(item)}; expected an object with 'conversations'"
        )
    name = item.get("id")
    identity = str(index) if name is None else str(name)
    where = f"{path}: record {index} (id {identity!r})"

    category = item.get("category", default_category)
    if category not in CATEGORIES:
        raise RecordError(f"{where}: 'category' is {category!r}; expected one of {', '.join(CATEGORIES)}")

    images = item.get("image")
    images = [] if images is None else images if isinstance(images, list) else [images]
    for image in images:
        if not isinstance(image, str) or not image:
            raise RecordError(
                f"{where}: 'image' holds {image!r}; expected a file name or a list of file names"
            )

    if "conversations" not in item:
        raise RecordError(f"{where}: no field 'conversations'; expected a list of turns")
    turns = _read_turns(item["conversations"], where)
    placeholders = sum(turn.text.count(PLACEHOLDER) for turn in turns)
    if placeholders not in (0, len(images)):
        raise RecordError(
            f"{where}: {placeholders} {PLACEHOLDER} in 'conversations' but {len(images)} in 'image'; expected as many, "
            "or no placeholder at all"
        )
    return Record(identity, tuple(images), turns, category, path, index)


def _read_turns(conversations: Any, where: str) -> tuple[Turn, ...]:
    if not isinstance(conversations, list) or not conversations:
        found = "empty" if conversations == [] else f"a JSON {_kind(conversations)}"
        raise RecordError(f"{where}: 'conversations' is {found}; expected a list of turns")
    turns: list[Turn] = []
    for number, item in enumerate(conversations):
        field = f"'conversations[{number}]'"
        if not isinstance(item, dict):
            raise RecordError(
                f"{where}: {field} is a JSON {_kind(item)}; expected an object with 'from' and 'value'"
            )
        for key in ("from", "value"):
            if not isinstance(item.get(key), str):
                found = (
                    f"has a {key!r} that is a JSON {_kind(item[key])}" if key in item else f"has no {key!r}"
                )
                raise RecordError(f"{where}: {field} {found}; expected a string")
        if item["from"] not in _ROLES:
            raise RecordError(f"{where}: {field} is from {item['from']!r}; expected 'human' or 'gpt'")
        turn = Turn(_ROLES[item["from"]], item["value"].strip())
        if turn.role != ("assistant" if number % 2 else "user"):
            raise RecordError(
                f"{where}: {field} is from {item['from']!r}; expected 'human' first, then 'gpt' and 'human' in turn"
            )
        if turn.role == "assistant" and not turn.text:
            raise RecordError(f"{where}: {field} is an empty answer; there is nothing to learn from it")
        if turn.role == "assistant" and PLACEHOLDER in turn.text:
            raise RecordError(
                f"{where}: {field} has {PLACEHOLDER} in an answer; expected it in questions only"
            )
        turns.append(turn)
    if turns[-1].role == "user":
        raise RecordError(f"{where}: 'conversations' ends with a question; expected an answer from 'gpt'")
    return tuple(turns)


def _kind(value: Any) -> str:
    kinds = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return kinds.get(type(value), "number")
