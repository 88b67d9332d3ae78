"""The images that an item of a file of records names or holds: one reading, for records and for `quantize`."""

import base64
import posixpath
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from being_vl.errors import RecordError
from being_vl.images.fields import CONVERSATION_FIELDS, IMAGE_FIELDS, is_empty
from being_vl.images.formats import HEAD_SIZE, sniff_format
from being_vl.names import show_name
from being_vl.options import StrPath

PLACEHOLDER = "<image>"
"""Where in a question an image stands."""
NAME_BYTES = 4096
"""Most bytes of an image's name; no file's path is longer."""

TEXT_KEYS = ("content", "value")
"""Fields of a turn that hold its text or its parts."""

_TEXT_PARTS = ("text", "input_text", "output_text")
IMAGE_PARTS = ("image", "image_url", "input_image")
IMAGE_KEYS = ("bytes", "base64", "image", "image_url", "path", "url")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_DATA_URI = re.compile(r"data:([^,]{0,200}),", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/_ \t\r\n-]*={0,2}[ \t\r\n]*")
_PLAIN_NAME = re.compile(r"\w[\w-]*(?:/\w[\w-]*){0,9}\.\w{3,4}", re.ASCII)
"""Most names of image files, which need no more looking at."""
_BASE64_LENGTH = 48
"""Fewest characters of an image as base64; shorter texts are names."""
_HEAD_LENGTH = -(-HEAD_SIZE // 3) * 4
UNSUPPORTED = "unsupported field"
"""Kind of the fault of a record with a field that changes its meaning in a way that is not known here."""

_EXPECTATION = "expected a file name or a list of file names"


@dataclass(frozen=True, slots=True)
class ImageReference:
    """An image of a record.

    Args:
        name: What `GridStores.find` takes. Of an image file: its path as the record gives it, with `/` between its
            parts. Of an image that the file of records itself holds (a tar's member, a table's row, a data URI): the
            file's absolute path, `/`, and its place in the file.
        data: The encoded image where the item itself holds it; None where it is elsewhere, or was not asked for.
    """

    name: str
    data: bytes | None = None


@dataclass(frozen=True, slots=True)
class ImageSlot:
    """The place of an image in a conversation.

    Args:
        image: What names or holds the image; None if it is one of the record's field of images.
        number: Its number there, from 0; None if it is the next one.
        place: The part of the conversation, for messages.
    """

    image: Any = None
    number: int | None = None
    place: str = ""


def read_references(
    item: dict[str, Any], location: str, path: StrPath, index: int, with_data: bool = False
) -> list[ImageReference]:
    """The images of a record, in the order of their places in the conversation.

    They are those of the field `image` or `images`, and those of the parts of messages. A file name is taken as it
    stands. An image that the record itself holds, as data URI, base64 or bytes, is named by the file and the record,
    and by its number in the record if the field is a list or there are several.

    Args:
        item: The record as it was decoded.
        location: The record's place, for errors.
        path: The file of records.
        index: The record's number in it, from 0.
        with_data: Decode the images that the record holds.

    Raises:
        RecordError: if a field that names images holds something else, or names an image that lies on another machine.
    """
    field, images, is_list = _read_fields(item, location)
    values = [(value, field) for value in images]
    slots = list(_find_slots(item, location))
    if any(slot.image is not None or slot.number is not None for slot in slots):
        values = _fill_slots(slots, values, location)
    references = []
    for position, (value, place) in enumerate(values):
        image = _read_image(value, place, location)
        if isinstance(image, _EmbeddedImage):
            if Path(path).suffix.lower() == ".tar":  # its images are its members
                reason = f"{place} holds an image itself; expected the image as a member of the tar"
                raise RecordError(f"{location}: {reason}", UNSUPPORTED)
            name = f"{Path(path).absolute()}/{index}"
            name = f"{name}/{position}" if is_list or len(values) > 1 else name
            references.append(ImageReference(name, image.decode() if with_data else None))
        else:
            references.append(ImageReference(image))
    return references


def replace_names(item: dict[str, Any], replace: Callable[[str], str]) -> None:
    """Put other names in place of those by which a record names images, in its fields and the parts of its messages.

    Args:
        item: The record as it was decoded; changed.
        replace: Gives the other name, or the same.
    """
    for field in IMAGE_FIELDS:
        if field in item:
            item[field] = _replace_names(item[field], replace)
    for _, contents in _find_contents(item):
        for content in contents:
            for part in content if isinstance(content, list) else []:
                if isinstance(part, dict):
                    part.update(
                        _replace_names({key: part[key] for key in IMAGE_KEYS if key in part}, replace)
                    )


def _replace_names(value: Any, replace: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return replace(value) if len(value) <= NAME_BYTES else value
    if isinstance(value, list):
        return [_replace_names(element, replace) for element in value]
    if isinstance(value, dict):
        return {k: _replace_names(v, replace) if k in IMAGE_KEYS else v for k, v in value.items()}
    return value


def names_images(item: dict[str, Any]) -> bool:
    """Whether a record names or holds an image, right or wrong."""
    if any(not is_empty(item.get(field)) for field in IMAGE_FIELDS):
        return True
    parts = (
        part
        for _, contents in _find_contents(item)
        for content in contents
        for part in (content if isinstance(content, list) else [])
    )
    return any(not is_empty(part.get(key)) for part in parts if isinstance(part, dict) for key in IMAGE_KEYS)


def read_content(content: Any, place: str, location: str) -> tuple[Any, list[ImageSlot]]:
    """The text of a turn, and the images that its placeholders stand for.

    Args:
        content: A text, or a list of parts: `{"type": "text", "text": …}`, `{"type": "image"}` for the next of the
            record's images, `{"type": "image", "index": …}`, `{"type": "image", "image": …}`,
            `{"type": "image_url", "image_url": {"url": …}}`. Anything else is returned unchanged.
        place: The turn, for errors.
        location: The record's place, for errors.

    Raises:
        RecordError: if a part is of another kind.
    """
    if isinstance(content, str):
        return content, [ImageSlot()] * content.count(PLACEHOLDER)
    if not isinstance(content, list) or not content:
        return content, []
    texts, slots = [], []
    for number, part in enumerate(content):
        part_place = f"{place}, part {number},"
        text, part_slots = _read_part(part, part_place, location)
        texts.append(text)
        slots += part_slots
    return "\n".join(texts), slots


def describe_kind(value: Any) -> str:
    """JSON's name for the type of a decoded value."""
    kinds = {
        dict: "object",
        list: "list",
        str: "string",
        bool: "boolean",
        type(None): "null",
        bytes: "binary value",
    }
    return kinds.get(type(value), "number" if isinstance(value, int | float) else type(value).__name__)


def show_value(value: Any) -> str:
    """A value of a record in a message: as it is written, and short."""
    return show_name(repr(value[:1000] if isinstance(value, str | bytes | list) else value), 80)


def _read_fields(item: dict[str, Any], location: str) -> tuple[str, list[Any], bool]:
    """The field that names the record's images, in quotes; the images; and whether it is a list."""
    fields = {name: item[name] for name in IMAGE_FIELDS if name in item and not is_empty(item[name])}
    if not fields:
        return "'image'", [], False
    lists = {name: value if isinstance(value, list) else [value] for name, value in fields.items()}
    if len(lists) == 2 and [*map(_comparable, lists["image"])] != [*map(_comparable, lists["images"])]:
        contents = (f"{name!r} holds {show_value(value)}" for name, value in fields.items())
        raise RecordError(
            f"{location}: {' and '.join(contents)}; expected one of the two fields, or equal ones"
        )
    name = "images" if "images" in fields else "image"
    return repr(name), lists[name], isinstance(fields[name], list)


def _comparable(value: Any) -> Any:
    return _normalise(value) if isinstance(value, str) and len(value) <= NAME_BYTES else value


def _find_contents(item: dict[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """Each field that holds a conversation, and the texts or parts of its turns, if parts are among them."""
    for field in CONVERSATION_FIELDS:
        turns = item.get(field)
        if isinstance(turns, list) and any(map(_has_parts, turns)):
            yield (
                field,
                [
                    next((turn[key] for key in TEXT_KEYS if turn.get(key) is not None), None)
                    for turn in turns
                    if isinstance(turn, dict)
                ],
            )


def _has_parts(turn: Any) -> bool:
    return isinstance(turn, dict) and (
        isinstance(turn.get("content"), list) or isinstance(turn.get("value"), list)
    )


def _find_slots(item: dict[str, Any], location: str) -> Iterator[ImageSlot]:
    """The places of images in the conversation, if parts of it name any."""
    for field, contents in _find_contents(item):
        for number, content in enumerate(contents):
            yield from read_content(content, f"'{field}[{number}]'", location)[1]


def _read_part(part: Any, place: str, location: str) -> tuple[str, list[ImageSlot]]:
    """The text and the images of one part of a turn."""
    if not isinstance(part, dict):
        raise RecordError(
            f"{location}: {place} is a JSON {describe_kind(part)}; expected an object with 'type'"
        )
    fields = {key: value for key, value in part.items() if not is_empty(value)}
    kind = fields.pop("type", None)
    images = {key: fields.pop(key) for key in IMAGE_KEYS if key in fields}
    text = fields.pop("text", "" if "text" in part else None)
    if kind is None and (images or text):  # it says by its fields what it is
        kind = "image" if images else "text"
    if kind not in (*_TEXT_PARTS, *IMAGE_PARTS):
        raise RecordError(
            f"{location}: {place} is of the type {show_value(kind)}; expected 'text' or 'image'", UNSUPPORTED
        )
    if kind in _TEXT_PARTS and isinstance(text, str) and not images:
        return text, [ImageSlot()] * text.count(PLACEHOLDER)
    if kind in _TEXT_PARTS or text:
        content = "holds a text and an image" if text else "has no 'text'"
        raise RecordError(f"{location}: {place} {content}; expected either of them")
    if images:
        return PLACEHOLDER, [ImageSlot(images, place=place)]
    number = fields.pop("index", None)
    if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 0):
        raise RecordError(f"{location}: {place} has the index {show_value(number)}; expected a number from 0")
    if fields:
        keys = ", ".join(map(repr, IMAGE_KEYS))
        raise RecordError(
            f"{location}: {place} has the field {show_value(next(iter(fields)))}; expected one of {keys}",
            UNSUPPORTED,
        )
    return PLACEHOLDER, [ImageSlot(number=number, place=place)]


def _fill_slots(
    slots: list[ImageSlot], values: list[tuple[Any, str]], location: str
) -> list[tuple[Any, str]]:
    """The image of each slot, and behind them the record's images that no slot stands for."""
    if values and all(slot.image is not None for slot in slots):
        names = [_comparable(_take_image(slot.image, slot.place, location)) for slot in slots]
        if names == [_comparable(value) for value, _ in values]:
            values = []
    free_numbers = list(range(len(values)))
    result = []
    for slot in slots:
        if slot.image is not None:
            result.append((slot.image, slot.place))
        elif slot.number is not None:
            if slot.number >= len(values):
                raise RecordError(
                    f"{location}: {slot.place} has the index {slot.number}, of {len(values)} images",
                    "image markers",
                )
            free_numbers = [number for number in free_numbers if number != slot.number]
            result.append(values[slot.number])
        elif free_numbers:
            result.append(values[free_numbers.pop(0)])
    return result + [values[number] for number in free_numbers]


@dataclass(frozen=True, slots=True)
class _EmbeddedImage:
    """An image that the record holds: its bytes, or base64 or percent-encoding of them."""

    content: str | bytes
    encoding: str = ""

    def decode(self) -> bytes:
        """The bytes of the image file."""
        if isinstance(self.content, bytes):
            return self.content
        if self.encoding == "percent":
            return unquote_to_bytes(self.content)
        return _decode_base64(self.content)


def _decode_base64(text: str) -> bytes:
    """Bytes of base64 of either alphabet, with or without white space and the signs that fill it up."""
    text = "".join(text.split()).rstrip("=").replace("-", "+").replace("_", "/")
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


def _take_image(value: Any, place: str, location: str) -> Any:
    """What names or holds an image in an object that says so by one of its fields."""
    for _ in range(3):  # such as {"type": "image_url", "image_url": {"url": …}}
        if not isinstance(value, dict):
            break
        images = {key: value[key] for key in IMAGE_KEYS if not is_empty(value.get(key))}
        if "bytes" in images:  # datasets' Image, whose path then says where they once were
            images = {"bytes": images["bytes"]}
        local_images = {key: image for key, image in images.items() if not _is_remote(image)}
        candidates = list((local_images or images).values())
        if len(candidates) != 1:
            raise RecordError(f"{location}: {place} holds {show_value(value)}; {_EXPECTATION}")
        value = candidates[0]
    return value


def _is_remote(value: Any) -> bool:
    return isinstance(value, str) and bool(_URL.match(value)) and not value.lower().startswith("file://")


def _read_image(value: Any, place: str, location: str) -> "str | _EmbeddedImage":
    """A file's name, or an image that the record holds.

    Raises:
        RecordError: if the value is neither.
    """
    if type(value) is str and len(value) < 256 and _PLAIN_NAME.fullmatch(value):
        return value
    value = _take_image(value, place, location)
    if isinstance(value, bytes | bytearray | memoryview) and value:
        return _EmbeddedImage(bytes(value))
    if not isinstance(value, str) or not value:
        raise RecordError(f"{location}: {place} holds {show_value(value)}; {_EXPECTATION}")
    if image := _read_embedded(value, place, location):
        return image
    if _is_remote(value):
        raise RecordError(
            f"{location}: {place} holds the address {show_value(value)}; download the images first, for instance with "
            "img2dataset",
            "image not downloaded",
        )
    name = _normalise(value)
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        reason = "half of a character in it"
    else:
        if size <= NAME_BYTES and not any(sign in name for sign in "\0\n\r"):
            return name
        reason = f"{size:,} bytes long" if size > NAME_BYTES else "a control character in it"
    raise RecordError(f"{location}: {place} holds {show_value(value)}, {reason}; {_EXPECTATION}")


def _read_embedded(text: str, place: str, location: str) -> _EmbeddedImage | None:
    """The image that a text is, as data URI or base64; None if it is a name."""
    uri = _DATA_URI.match(text)
    if uri is None and len(text) < _BASE64_LENGTH:
        return None
    content = text[uri.end() :] if uri else text
    if uri and not uri[1].lower().replace(" ", "").endswith(";base64"):
        image = _EmbeddedImage(content, "percent")
        is_image = sniff_format(unquote_to_bytes(content[: 3 * HEAD_SIZE])) is not None
    else:
        image, is_image = _EmbeddedImage(content, "base64"), _is_base64_image(content)
    if is_image:
        return image
    if uri is None:
        return None
    raise RecordError(
        f"{location}: {place} holds {show_value(text)}, which is no image that can be opened; {_EXPECTATION}"
    )


def _is_base64_image(text: str) -> bool:
    """Whether a text is base64 throughout, and begins as an image file."""
    if not _BASE64.fullmatch(text):
        return False
    num_digits = len(text) - sum(map(text.count, " \t\r\n="))
    head = "".join(text[:_HEAD_LENGTH].split()).rstrip("=")
    return num_digits % 4 != 1 and bool(sniff_format(_decode_base64(head[: len(head) // 4 * 4])))


def _normalise(name: str) -> str:
    """A file's name with `/` between its parts, and without `file://`, `.` and doubled separators."""
    if name.lower().startswith("file://"):
        name = name[len("file://") :]
    name = name.replace("\\", "/")
    return posixpath.normpath("/" + name.lstrip("/") if name.startswith("/") else name) if name else name
