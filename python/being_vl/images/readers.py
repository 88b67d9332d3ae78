"""Files of records: JSON, JSON lines, WebDataset, Parquet and Arrow, each read record by record.

A reader knows its number of records and gives any of them by number, or all in turn. It keeps 16 bytes of memory per
record at most, namely where the record is.
"""

import codecs
import json
import re
import tarfile
from collections.abc import Callable, Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from being_vl.errors import RecordError
from being_vl.images.tables import open_table
from being_vl.images.tars import member_key, read_members
from being_vl.options import StrPath

WINDOW = 1 << 20
"""Bytes of a JSON list that are read at a time."""
MAX_ELEMENT = 1 << 26
"""Bytes in which an element of a JSON list must end."""

_FIELDS = ("id", "category", "image", "images", "conversations", "messages", "caption")
_SPAN = np.dtype((np.int64, 2))
_SPACE = re.compile(r"[ \t\r\n]*")
# Finds where a value ends; int() would refuse more than 4300 digits.
_decode = json.JSONDecoder(parse_int=float).raw_decode


class Reader(Protocol):
    """Records of one file, as decoded JSON; picklable."""

    def __len__(self) -> int:
        """Number of records."""

    def __getitem__(self, index: int) -> Any:
        """Record `index`, from 0.

        Raises:
            RecordError: naming file and record, if it cannot be decoded.
        """

    def read(self, start: int, stop: int) -> Iterator[Any]:
        """Records `start` to `stop` in turn; one that cannot be decoded comes as the `RecordError` that says so."""


def open_records(path: StrPath) -> Reader:
    """A reader of `path`, by its suffix: `.jsonl`, `.tar`, `.parquet`, `.arrow`; any other is a JSON list.

    Raises:
        RecordError: if there is no such file, it is no file of its kind, or it holds no record.
    """
    path = Path(path)
    try:
        reader = _READERS.get(path.suffix, JsonReader)(path)
    except FileNotFoundError:
        raise RecordError(f"{path}: no such file; expected records") from None
    except RecursionError:
        raise RecordError(f"{path}: holds JSON that is nested too deeply; expected records") from None
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror or error}); expected records") from None
    if not len(reader):
        raise RecordError(f"{path}: an empty list; expected a JSON list of records or another file of them")
    return reader


class JsonReader:
    """A JSON list, or for `.jsonl` a JSON value on each line that is not blank."""

    def __init__(self, path: Path) -> None:
        self.path = path
        find_spans = _find_lines if path.suffix == ".jsonl" else _find_elements
        self._spans: NDArray[np.int64] = np.fromiter(find_spans(path), _SPAN)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Any:
        with self.path.open("rb") as file:
            return self._read(file, index)

    def read(self, start: int, stop: int) -> Iterator[Any]:
        """See `Reader`."""
        with self.path.open("rb") as file:
            for index in range(start, stop):
                try:
                    yield self._read(file, index)
                except RecordError as error:
                    yield error

    def _read(self, file: BinaryIO, index: int) -> Any:
        start, end = self._spans[index].tolist()
        file.seek(start)
        try:
            return json.loads(file.read(end - start).decode("utf-8"))
        except UnicodeDecodeError as error:
            raise RecordError(
                f"{self.path}: record {index}: byte {start + error.start} of the file: not UTF-8; expected a record",
                "wrong encoding",
            ) from None
        except RecursionError:
            raise RecordError(
                f"{self.path}: record {index}: JSON nested too deeply; expected a record", "not JSON"
            ) from None
        except json.JSONDecodeError as error:
            raise RecordError(
                f"{self.path}: record {index}: column {error.colno}: not JSON ({error.msg}); expected a record",
                "not JSON",
            ) from None
        except ValueError as error:  # an integer of too many digits
            raise RecordError(
                f"{self.path}: record {index}: {error}; expected a record", "not JSON"
            ) from None


def _find_lines(path: Path) -> Iterator[tuple[int, int]]:
    """Where each line that is not blank begins and ends, in bytes."""
    with path.open("rb") as file:
        start = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
        file.seek(start)
        for line in file:
            if not line.isspace():
                yield start, start + len(line)
            start += len(line)


def _find_elements(path: Path) -> Iterator[tuple[int, int]]:
    """Where each element of a JSON list begins and ends, in bytes; one window of the file is in memory at a time."""
    # As Latin-1 each byte is a character, so positions in the text are positions in the file, and JSON's own signs are
    # ASCII. `window` is the part of the file from byte `base` on, `position` a place in it.
    with path.open(encoding="latin-1", newline="") as file:
        # Find the opening bracket, behind UTF-8's byte order mark if there is one.
        head = file.read(3)
        window, base = ("", 3) if head == "ï»¿" else (head, 0)
        while window.strip() in ("", "[") and (chunk := file.read(WINDOW)):
            window += chunk
        position = _skip_space(window, 0)
        if window[position : position + 1] != "[":
            raise _no_list_error(path, window + file.read(MAX_ELEMENT), base)
        position = _skip_space(window, position + 1)
        if window[position : position + 1] == "]":
            return
        while True:
            # Find the end of the next element and the sign behind it.
            try:
                start = _skip_space(window, position)
                _, end = _decode(window, start)
                sign_position = _skip_space(window, end)
                sign = window[sign_position]
                if sign not in ",]":  # also where the window ends within a number
                    raise json.JSONDecodeError("Expecting ',' delimiter", window, sign_position)
            except (json.JSONDecodeError, IndexError) as error:
                # The window may end within the element: try again with a longer one.
                chunk = file.read(max(WINDOW, len(window))) if len(window) - position < MAX_ELEMENT else ""
                if not chunk:
                    raise _json_error(path, window, base, error) from None
                window, base, position = window[position:] + chunk, base + position, 0
                continue
            yield base + start, base + end
            position = sign_position + 1
            if sign == "]":
                break
        # Behind the closing bracket there is nothing but white space.
        tail = window[position:] + file.read(MAX_ELEMENT)
        if tail.strip():
            fault = json.JSONDecodeError("Extra data", tail, _skip_space(tail, 0))
            raise _json_error(path, tail, base + position, fault)


def _skip_space(text: str, position: int) -> int:
    """Where in `text`, from `position` on, white space ends."""
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _no_list_error(path: Path, text: str, base: int) -> RecordError:
    """What a file holds that does not begin with `[`; `text` begins at its byte `base`."""
    try:
        value, end = _decode(text, _skip_space(text, 0))
        if text[end:].strip():
            hint = "; JSON lines go by the suffix .jsonl" if isinstance(value, dict) else ""
            raise json.JSONDecodeError("Extra data" + hint, text, _skip_space(text, end))
    except json.JSONDecodeError as error:
        return _json_error(path, text, base, error)
    return RecordError(f"{path}: a JSON {describe_kind(value)}; expected a JSON list of records")


def _json_error(path: Path, text: str, base: int, error: Exception) -> RecordError:
    """Say where a file is not JSON, or not UTF-8; `text` begins at its byte `base`."""
    try:
        codecs.utf_8_decode(text.encode("latin-1"), "strict", False)
    except UnicodeDecodeError as fault:
        return RecordError(f"{path}: byte {base + fault.start}: not UTF-8; expected a JSON list of records")
    position, reason = base + len(text), "Expecting ',' delimiter"
    if isinstance(error, json.JSONDecodeError):
        position, reason = base + error.pos, error.msg
    # Count lines, and characters of the last one, up to there.
    line, column = 1, 1
    decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")
    with path.open("rb") as file:
        while chunk := file.read(min(WINDOW, position - file.tell())):
            *lines, last_line = decoder.decode(chunk).split("\n")
            line += len(lines)
            column = len(last_line) + (1 if lines else column)
    return RecordError(
        f"{path}: line {line}, column {column}: not JSON ({reason}); expected a list of records"
    )


class TarReader:
    """WebDataset: members that share their name up to its first dot are a sample; its `.json` is the record.

    A sample without one is a caption, its `.txt`, of its images.

    Where the record names no image, the sample's image files are its images, by the key that `being-vl quantize` gives
    them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._starts = np.fromiter((sample[0].offset for sample in _samples(file)), np.int64)
        except tarfile.TarError as error:
            raise RecordError(f"{path}: not a complete uncompressed tar file ({error})") from None

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Any:
        with self.path.open("rb") as file:
            file.seek(int(self._starts[index]))
            return self._read(file, next(_samples(file)), index)

    def read(self, start: int, stop: int) -> Iterator[Any]:
        """See `Reader`."""
        if start >= stop:
            return
        with self.path.open("rb") as file:
            file.seek(int(self._starts[start]))
            for index, sample in enumerate(islice(_samples(file), stop - start), start):
                try:
                    yield self._read(file, sample, index)
                except RecordError as error:
                    yield error

    def _read(self, file: BinaryIO, sample: list[tarfile.TarInfo], index: int) -> Any:
        # It may hold bytes that are not UTF-8.
        name = sample[0].name.encode(errors="backslashreplace").decode()
        location = f"{self.path}: record {index} ({name})"
        members = {
            suffix: m for m in reversed(sample) for suffix in (".json", ".txt") if m.name.endswith(suffix)
        }
        if not members:
            raise RecordError(
                f"{location}: no .json or .txt beside it; expected a record with 'conversations' or 'messages'"
            )
        suffix = min(members)
        file.seek(members[suffix].offset_data)
        data = file.read(members[suffix].size)
        try:
            item = json.loads(data.decode()) if suffix == ".json" else {"caption": data.decode()}
        except UnicodeDecodeError as error:
            raise RecordError(f"{location}: its {suffix} is not UTF-8 ({error})", "wrong encoding") from None
        except (ValueError, RecursionError) as error:
            raise RecordError(f"{location}: its .json is not JSON ({error})", "not JSON") from None
        if isinstance(item, dict) and not (item.get("image") or item.get("images")):
            keys = (member_key(self.path.name, member) for member in sample)
            item["image"] = [key for key in keys if key is not None]
        return item


def _samples(file: BinaryIO) -> Iterator[list[tarfile.TarInfo]]:
    """The samples of a tar file from the member on at which it stands."""
    for _, members in groupby(read_members(file), lambda member: _stem(member.name)):
        yield list(members)


def _stem(name: str) -> str:
    """A member's name up to its first dot, with its folder."""
    folder, slash, file_name = name.rpartition("/")
    return folder + slash + file_name.partition(".")[0]


class TableReader:
    """Parquet, or Arrow as `datasets` writes it: a row is a record, with the columns that LLaVA JSON has as fields.

    A column `image` that holds images, not names, stands for the key that `being-vl quantize` gives to the row's image.
    Any row costs the decoding of its part of the file (row group, record batch), the last of which are kept.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self.path = path
        try:
            self._table = open_table(path)
        except pa.ArrowException as error:
            raise RecordError(f"{path}: not a complete table ({error})") from None
        schema = self._table.schema
        self._ends = np.cumsum(self._table.group_sizes, dtype=np.int64)
        columns = [name for name in schema.names if name in _FIELDS]
        self._has_image_bytes = "image" in columns and not _holds_names(schema.field("image").type)
        if self._has_image_bytes and path.suffix == ".parquet":
            kind = schema.field("image").type
            if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
                columns[columns.index("image")] = "image.path"  # enough to see whether there is an image
        self._columns = tuple(columns)

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> Any:
        (item,) = self._items(self._rows(index, index + 1), index)
        if isinstance(item, RecordError):
            raise item
        return item

    def read(self, start: int, stop: int) -> Iterator[Any]:
        """See `Reader`."""
        while start < stop:
            for batch in self._rows(start, stop).to_batches(1024):
                yield from self._items(batch, start)
                start += batch.num_rows

    def _rows(self, start: int, stop: int) -> Any:
        """Rows `start` to `stop`, or to the end of their part of the file; for embedded images whether there is one."""
        group = int(np.searchsorted(self._ends, start, side="right"))
        rows = self._table.read_group(group, self._columns)
        group_start = int(self._ends[group]) - rows.num_rows
        rows = rows.slice(start - group_start, stop - start)
        if self._has_image_bytes:
            rows = rows.set_column(rows.schema.get_field_index("image"), "image", rows["image"].is_valid())
        return rows

    def _items(self, rows: Any, start: int) -> Iterator[Any]:
        """Rows of a table or batch as records, the first of them record `start`."""
        try:
            items = rows.to_pylist()
        except UnicodeDecodeError as error:
            if rows.num_rows > 1:
                for number in range(rows.num_rows):
                    yield from self._items(rows.slice(number, 1), start + number)
                return
            reason = f"a text that is not UTF-8 ({error}); expected a record"
            items = [RecordError(f"{self.path}: record {start}: {reason}", "wrong encoding")]
        for index, item in enumerate(items, start):
            if self._has_image_bytes and isinstance(item, dict):
                item["image"] = self._table.row_key(self.path.name, index) if item["image"] else None
            yield item


def _holds_names(kind: Any) -> bool:
    import pyarrow as pa

    return any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_list))


def describe_kind(value: Any) -> str:
    """JSON's name for the type of a decoded value."""
    kinds = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return kinds.get(type(value), "number")


_READERS: dict[str, Callable[[Path], Reader]] = {
    ".jsonl": JsonReader,
    ".tar": TarReader,
    ".parquet": TableReader,
    ".arrow": TableReader,
}
