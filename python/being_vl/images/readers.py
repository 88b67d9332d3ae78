"""Files of records: JSON, JSON lines, WebDataset, Parquet and Arrow, each read record by record.

A reader knows its number of records and gives any of them by number, or all in turn. It keeps 16 bytes of memory per
record at most, namely where the record is; of tars, the listings of those that were read last as well.
"""

import codecs
import errno
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from being_vl.errors import RecordError
from being_vl.files import file_version
from being_vl.images.files import open_file
from being_vl.images.references import describe_kind
from being_vl.images.table_reader import TableReader
from being_vl.images.tar_reader import TarReader
from being_vl.names import show_name
from being_vl.options import StrPath

WINDOW = 1 << 20
"""Bytes of a JSON list that are read at a time."""
MAX_ELEMENT = 1 << 26
"""Bytes in which an element of a JSON list must end."""

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf": "7z",
}
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
        with open_file(path) as file:
            head = file.read(8)
        if kind := next((kind for start, kind in _COMPRESSED.items() if head.startswith(start)), None):
            raise RecordError(f"{path}: compressed ({kind}); expected records, so unpack it")
        reader = _READERS.get(path.suffix.lower(), JsonReader)(path)
    except RecordError:
        raise
    except FileNotFoundError:
        raise RecordError(f"{path}: no such file; expected records") from None
    except RecursionError:
        raise RecordError(f"{path}: holds JSON that is nested too deeply; expected records") from None
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror or error}); expected records") from None
    except ValueError as error:  # a name that no file can have
        raise RecordError(f"{show_name(path)}: cannot be read ({error}); expected records") from None
    if not len(reader):
        raise RecordError(f"{path}: an empty list; expected a JSON list of records or another file of them")
    return reader


class JsonReader:
    """A JSON list, or for `.jsonl` a JSON value on each line that is not blank."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._version = file_version(path)
        find_spans = _find_lines if path.suffix.lower() == ".jsonl" else _find_elements
        self._spans: NDArray[np.int64] = np.fromiter(find_spans(path), _SPAN)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Any:
        with self._open() as file:
            return self._read(file, index)

    def read(self, start: int, stop: int) -> Iterator[Any]:
        """See `Reader`."""
        with self._open() as file:
            for index in range(start, stop):
                try:
                    yield self._read(file, index)
                except RecordError as error:
                    yield error

    def _open(self) -> BinaryIO:
        if file_version(self.path) not in (self._version, ()):
            raise OSError(errno.ESTALE, "changed while it was being read", str(self.path))
        return open_file(self.path)

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
    with open_file(path) as file:
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
    with io.TextIOWrapper(open_file(path), encoding="latin-1", newline="") as file:
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
    with open_file(path) as file:
        while chunk := file.read(min(WINDOW, position - file.tell())):
            *lines, last_line = decoder.decode(chunk).split("\n")
            line += len(lines)
            column = len(last_line) + (1 if lines else column)
    return RecordError(
        f"{path}: line {line}, column {column}: not JSON ({reason}); expected a list of records"
    )


_READERS: dict[str, Callable[[Path], Reader]] = {
    ".jsonl": JsonReader,
    ".tar": TarReader,
    ".parquet": TableReader,
    ".arrow": TableReader,
}
