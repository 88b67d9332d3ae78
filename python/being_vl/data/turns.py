"""Turns of a conversation, in each of the dialects that records have."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from being_vl.errors import RecordError
from being_vl.images.fields import UNSUPPORTED_TURN_FIELDS, has_content
from being_vl.images.references import PLACEHOLDER, UNSUPPORTED, describe_kind, read_content, show_value

Role = Literal["system", "user", "assistant"]


class _Dialect(NamedTuple):
    """Names in a field of turns: keys of a turn's role and text, its own before those of others, and roles."""

    role_keys: tuple[str, str]
    text_keys: tuple[str, str]
    user: str
    assistant: str


_DIALECTS = {
    "conversations": _Dialect(("from", "role"), ("value", "content"), "human", "gpt"),
    "messages": _Dialect(("role", "from"), ("content", "value"), "user", "assistant"),
}
_ROLES: dict[str, Role] = {
    "system": "system",
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model"), "assistant"),
}
_LOSS_KEYS = ("loss", "weight", "train", "training")


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn of a conversation; a user's text may hold `<image>` placeholders.

    Args:
        role: Whose it is.
        text: What it says.
        has_loss: Whether the options decide what loss it carries; else it carries none.
    """

    role: Role
    text: str
    has_loss: bool = True


class _Item(NamedTuple):
    """A turn as it was read: the role as it is called there, the text, and its place for messages."""

    name: str
    turn: Turn
    place: str


def read_turns(item: dict[str, Any], field: str, location: str) -> tuple[Turn, ...]:
    """The turns of a conversation: user and assistant alternate, behind a system turn if there is one.

    Args:
        item: The record as it was decoded; its field `system` may hold the system turn.
        field: Where the turns are: `conversations`, `messages` or, as pairs of `user` and `assistant`, `texts`.
        location: The record's place, for errors.

    Raises:
        RecordError: if they are anything else.
    """
    items = item[field]
    if not isinstance(items, list) or not items:
        content = "empty" if items == [] else f"a JSON {describe_kind(items)}"
        raise RecordError(f"{location}: {field!r} is {content}; expected a list of turns")
    dialect = _DIALECTS.get(field, _DIALECTS["messages"])
    read_items = _read_exchanges if field == "texts" else _read_items
    turns = _read_system(item.get("system"), location)
    num_system = 0
    for number, (name, turn, place) in enumerate(read_items(items, field, location)):
        # An empty system turn is no turn.
        if turn.role == "system" and number == 0:
            num_system = 1
            if turn.text and turns and turns[0].text != turn.text:
                raise RecordError(
                    f"{location}: two system turns, 'system' and {place}; expected one", "odd turns"
                )
            turns = turns or ([turn] if turn.text else [])
            continue
        if turn.role != ("assistant" if (number - num_system) % 2 else "user"):
            raise RecordError(
                f"{location}: {place} is from {name!r}; expected {dialect.user!r} first, then {dialect.assistant!r} "
                f"and {dialect.user!r} in turn",
                "odd turns",
            )
        if turn.role == "assistant" and not turn.text:
            raise RecordError(
                f"{location}: {place} is an empty answer; there is nothing to learn from it", "empty answer"
            )
        turns.append(turn)
    if not turns or turns[-1].role != "assistant":
        raise RecordError(
            f"{location}: {field!r} ends with a question; expected an answer from {dialect.assistant!r}",
            "odd turns",
        )
    return tuple(turns)


def read_caption(caption: Any, images: tuple[str, ...], location: str) -> tuple[Turn, ...]:
    """A caption of images, as a turn of the assistant.

    Raises:
        RecordError: if it is no text, or there is no image.
    """
    text = _check_text(caption, "'caption'", location)
    if not images:
        raise RecordError(
            f"{location}: its 'caption' has no image; expected a text about images", "text without image"
        )
    if not text:
        raise RecordError(f"{location}: its 'caption' is empty; expected a text", "empty answer")
    if PLACEHOLDER in text:
        raise RecordError(f"{location}: {PLACEHOLDER} in its 'caption'; expected text", "image markers")
    return (Turn("assistant", text),)


def _read_system(text: Any, location: str) -> list[Turn]:
    """The system turn of a record that has it as a field."""
    text = "" if text is None else _check_text(text, "'system'", location)
    if PLACEHOLDER in text:
        raise RecordError(
            f"{location}: {PLACEHOLDER} in its 'system'; expected it in questions only", "image markers"
        )
    return [Turn("system", text)] if text else []


def _read_items(items: list[Any], field: str, location: str) -> Iterator[_Item]:
    """The turns of a list of objects, each with a role and a text."""
    dialect = _DIALECTS[field]
    (role_key, *_), (text_key, *_) = dialect.role_keys, dialect.text_keys
    for number, item in enumerate(items):
        place = f"'{field}[{number}]'"
        name, text, is_plain = _read_plain_turn(item, role_key, text_key)
        if not is_plain:
            _check_fields(item, f"{role_key!r} and {text_key!r}", place, location)
            name = _take(item, dialect.role_keys, place, location)
            text, _ = read_content(_take(item, dialect.text_keys, place, location), place, location)
            for key, value in ((role_key, name), (text_key, text)):
                if not isinstance(value, str):
                    fault = f"has a {key!r} that is a JSON {describe_kind(value)}"
                    fault = fault if key in item else f"has no {key!r}"
                    raise RecordError(f"{location}: {place} {fault}; expected a string")
        text = _check_text(text, place, location)
        if name not in _ROLES:
            raise RecordError(
                f"{location}: {place} is from {show_value(name)}; expected {dialect.user!r} or {dialect.assistant!r}",
                "odd turns",
            )
        role = _ROLES[name]
        if PLACEHOLDER in text and role != "user":
            turn_kind = "an answer" if role == "assistant" else "a system turn"
            raise RecordError(
                f"{location}: {place} has {PLACEHOLDER} in {turn_kind}; expected it in questions only",
                "image markers",
            )
        yield _Item(name, Turn(role, text, is_plain or _read_loss(item, role, place, location)), place)


def _read_plain_turn(item: Any, role_key: str, text_key: str) -> tuple[Any, Any, bool]:
    """Role and text of a turn that has nothing else, as most have; and whether it is such a turn."""
    if type(item) is not dict or len(item) != 2:
        return None, None, False
    name, text = item.get(role_key), item.get(text_key)
    return name, text, type(name) is str and type(text) is str


def _read_exchanges(items: list[Any], field: str, location: str) -> Iterator[_Item]:
    """The turns of a list of objects, each with a question and its answer."""
    for number, item in enumerate(items):
        place = f"'{field}[{number}]'"
        _check_fields(item, "'user' and 'assistant'", place, location)
        losses = {key: item[key] for key in _LOSS_KEYS if key in item}
        for role, fields in (("user", {}), ("assistant", losses)):
            if not isinstance(item.get(role), str):
                content = describe_kind(item.get(role))
                raise RecordError(
                    f"{location}: {place} has a {role!r} that is a JSON {content}; expected a string"
                )
            message = {"role": role, "content": item[role], **fields}
            (turn,) = _read_items([message], "messages", location)
            yield turn._replace(place=f"{place} {role!r}")


def _check_fields(item: Any, keys: str, place: str, location: str) -> None:
    """Make sure that a turn is an object, and nothing in it changes what it means."""
    if not isinstance(item, dict):
        raise RecordError(
            f"{location}: {place} is a JSON {describe_kind(item)}; expected an object with {keys}"
        )
    for name, value in item.items():
        if name in UNSUPPORTED_TURN_FIELDS and has_content(value):
            reason = f"has the field {name!r}, which cannot be learned from"
            raise RecordError(f"{location}: {place} {reason}; expected {keys} alone", UNSUPPORTED)


def _take(item: dict[str, Any], keys: tuple[str, str], place: str, location: str) -> Any:
    """What a turn has under either of two keys."""
    values = [item[key] for key in keys if item.get(key) is not None]
    if len(values) == 2 and values[0] != values[1]:
        raise RecordError(f"{location}: {place} has both {keys[0]!r} and {keys[1]!r}; expected one of them")
    return values[0] if values else None


def _read_loss(item: dict[str, Any], role: Role, place: str, location: str) -> bool:
    """Whether a turn is learned from, as far as it says so itself."""
    has_loss = True
    for key in _LOSS_KEYS:
        value = item.get(key)
        if value is None:
            continue
        if value not in (0, 1):
            raise RecordError(
                f"{location}: {place} has a {key!r} of {show_value(value)}; expected true or false, 1 or 0",
                UNSUPPORTED,
            )
        if value and role != "assistant":
            raise RecordError(
                f"{location}: {place} has a {key!r} of {show_value(value)}, but is no answer; the option "
                "sequences.loss.questions has all questions learned",
                UNSUPPORTED,
            )
        has_loss = has_loss and bool(value)
    return has_loss


def _check_text(text: Any, place: str, location: str) -> str:
    """A text without white space around it, and without the byte order mark of a file that it was read from."""
    if not isinstance(text, str):
        raise RecordError(f"{location}: {place} is a JSON {describe_kind(text)}; expected a string")
    if text.isascii():
        return text.strip()
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RecordError(
            f"{location}: {place} holds {text[error.start]!a}, half of a character, at {error.start}; expected "
            "Unicode text",
            "wrong encoding",
        ) from None
    return text.removeprefix("\ufeff").strip()
