"""Files of records: JSON, JSON lines, WebDataset, Parquet and Arrow, each read record by record.

A reader knows its number of records and gives any of them by number, or all in turn. It keeps 16 bytes of memory per
record at most, namely where the record is.
"""

import codecs
import io
import json
import posixpath
import re
import tarfile
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from being_vl.errors import RecordError
from being_vl.images.fields import CONVERSATION_FIELDS, IMAGE_FIELDS, RECORD_FIELDS, is_empty
from being_vl.images.files import HIDDEN, NOT_UTF_8, open_file
from being_vl.images.references import describe_kind, names_images, replace_names
from being_vl.images.tables import open_table
from being_vl.images.tars import REPLACED, Member, TarListing, list_members, normalise_name
from being_vl.names import show_name
from being_vl.options import StrPath

WINDOW = 1 << 20
"""Bytes of a JSON list that are read at a time."""
MAX_ELEMENT = 1 << 26
"""Bytes in which an element of a JSON list must end."""

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
        reader = _READERS.get(path.suffix.lower(), JsonReader)(path)
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
        find_spans = _find_lines if path.suffix.lower() == ".jsonl" else _find_elements
        self._spans: NDArray[np.int64] = np.fromiter(find_spans(path), _SPAN)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Any:
        with open_file(self.path) as file:
            return self._read(file, index)

    def read(self, start: int, stop: int) -> Iterator[Any]:
        """See `Reader`."""
        with open_file(self.path) as file:
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


class TarReader:
    """WebDataset: members that share their name up to its first dot are a sample; its `.json` is the record.

    They need not stand together. A sample without `.json` is a caption of its images, the `.txt`; so is one whose
    `.json` has neither conversation nor caption. Where the record names no image, the sample's images are its own.
    Those in the tar are named by the tar's absolute path, `/`, and their name in it. Other members are passed over.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        listing = self._list()
        samples: dict[str, list[int]] = {}
        for number, member in enumerate(listing.members):
            if member.is_image or _is_text_name(member.name):
                samples.setdefault(_stem(member.name), []).append(number)
        self._numbers = np.fromiter(chain.from_iterable(samples.values()), np.int32)
        self._ends = np.cumsum([len(numbers) for numbers in samples.values()], dtype=np.int32)
        self._faults = [
            (name, reason)
            for name, reason in listing.left_out
            if _is_text_name(name) and reason not in (HIDDEN, REPLACED)
        ]

    def __len__(self) -> int:
        return len(self._ends) + len(self._faults)

    def __getitem__(self, index: int) -> Any:
        (item,) = self.read(index, index + 1)
        if isinstance(item, RecordError):
            raise item
        return item

    def read(self, start: int, stop: int) -> Iterator[Any]:
        """See `Reader`."""
        if start >= stop:
            return
        members = self._list().members
        image_names = LazyNames(members)
        with open_file(self.path) as file:
            for index in range(start, min(stop, len(self._ends))):
                numbers = self._numbers[self._ends[index - 1] if index else 0 : self._ends[index]]
                try:
                    yield self._read(file, [members[number] for number in numbers], image_names, index)
                except RecordError as error:
                    yield error

        for index in range(max(start, len(self._ends)), stop):
            name, reason = self._faults[index - len(self._ends)]
            kind = "wrong encoding" if reason == NOT_UTF_8 else "malformed record"
            yield RecordError(
                f"{self.path}: record {index} ({show_name(name)}): {reason}; expected a record", kind
            )

    def _list(self) -> TarListing:
        try:
            return list_members(self.path)
        except tarfile.TarError as error:
            raise RecordError(
                f"{self.path}: not a complete uncompressed tar file ({show_name(error)})"
            ) from None

    def _read(self, file: BinaryIO, sample: list[Member], image_names: "LazyNames", index: int) -> Any:
        location = f"{self.path}: record {index} ({show_name(sample[0].name)})"
        texts = {suffix: _find_text(sample, suffix, location) for suffix in (".json", ".txt")}
        if not any(texts.values()):
            raise RecordError(
                f"{location}: no .json or .txt beside it; expected a record with 'conversations' or 'messages'",
                "image without text",
            )
        item: Any = {}
        if member := texts[".json"]:
            text = self._read_text(file, member, location)
            try:
                item = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise RecordError(f"{location}: its .json is not JSON ({error})", "not JSON") from None
        if not isinstance(item, dict):
            return item
        if (member := texts[".txt"]) and all(
            is_empty(item.get(name)) for name in (*CONVERSATION_FIELDS, "caption")
        ):
            item["caption"] = self._read_text(file, member, location)

        # Images in the tar, by their own names or by those that the record gives them.
        container = f"{self.path.absolute()}/"
        if not names_images(item):
            item["image"] = [container + member.name for member in sample if member.is_image]
        else:
            folder = posixpath.dirname(sample[0].name)
            replace_names(item, lambda name: image_names.find(name, folder, container))
        return item

    def _read_text(self, file: BinaryIO, member: Member, location: str) -> str:
        file.seek(member.offset)
        try:
            return file.read(member.size).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            suffix = posixpath.splitext(member.name)[1].lower()
            raise RecordError(f"{location}: its {suffix} is not UTF-8 ({error})", "wrong encoding") from None


class LazyNames:
    """Names of the images in a tar, gathered when the first is looked up."""

    def __init__(self, members: tuple[Member, ...]) -> None:
        self._members = members
        self._names: frozenset[str] | None = None

    def find(self, name: str, folder: str, container: str) -> str:
        """An image's name in the tar, as it is written or below `folder`, behind `container`; else `name` itself."""
        if self._names is None:
            self._names = frozenset(member.name for member in self._members if member.is_image)
        path = name.replace("\\", "/")
        for candidate in (normalise_name(path), normalise_name(posixpath.join(folder, path))):
            if candidate in self._names:
                return container + candidate
        return name


def _find_text(sample: list[Member], suffix: str, location: str) -> Member | None:
    """The member of a sample that is its text of a kind: STEM.json before STEM.meta.json."""
    members = [member for member in sample if member.name.lower().endswith(suffix)]
    members = [m for m in members if len(m.name) == len(_stem(m.name)) + len(suffix)] or members
    if len(members) > 1:
        names = " and ".join(show_name(member.name) for member in members[:2])
        raise RecordError(f"{location}: has {names}; expected one {suffix}")
    return members[0] if members else None


def _is_text_name(name: str) -> bool:
    return name.lower().endswith((".json", ".txt"))


def _stem(name: str) -> str:
    """A member's name up to its first dot, with its folder."""
    folder, slash, file_name = name.rpartition("/")
    return folder + slash + file_name.partition(".")[0]


class TableReader:
    """Parquet, or Arrow as `datasets` writes it: a row is a record, with the columns that records have as fields.

    A column `image` or `images` that holds images, not names, stands for the keys that `being-vl quantize` gives to the
    row's images, as absolute paths. Any row costs the decoding of its part of the file (row group, record batch), the
    last of which are kept.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self.path = path
        try:
            self._table = open_table(path)
        except pa.ArrowException as error:
            raise RecordError(f"{path}: not a complete table ({show_name(error)})") from None
        schema = self._table.schema
        self._ends = np.cumsum(self._table.group_sizes, dtype=np.int64)
        self._columns = tuple(name for name in schema.names if name in RECORD_FIELDS)
        bytes_columns = [name for name in self._columns if _holds_bytes(schema.field(name).type)]
        self._image_columns = [name for name in bytes_columns if name in IMAGE_FIELDS]
        self._other_bytes_columns = [name for name in bytes_columns if name not in IMAGE_FIELDS]
        self._path_columns = (
            _find_path_columns(path, self._image_columns) if path.suffix == ".parquet" else {}
        )

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
        """Rows `start` to `stop`, or to the end of their part of the file; without the bytes of images."""
        group = int(np.searchsorted(self._ends, start, side="right"))
        leaves = {
            name: leaf for name, (leaf, nulls) in self._path_columns.items() if nulls[group] is not None
        }
        rows = self._table.read_group(group, tuple(leaves.get(name, name) for name in self._columns))
        for name in leaves:
            # Their paths tell which values are there, unless some are without bytes.
            if _count_nulls(rows[name]) != self._path_columns[name][1][group]:
                column = self._table.read_group(group, (name,))[name]
                rows = rows.set_column(rows.schema.get_field_index(name), name, column)
        group_start = int(self._ends[group]) - rows.num_rows
        rows = rows.slice(start - group_start, stop - start)
        for name in self._image_columns:
            rows = _set_column(rows, name, _drop_bytes)
        for name in self._other_bytes_columns:
            rows = _set_column(rows, name, lambda column: column.is_valid())
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
            if isinstance(item, dict):
                for name in self._image_columns:
                    item[name] = self._name_images(item[name], index)
                for name in self._other_bytes_columns:
                    item[name] = item[name] or None
            yield item

    def _name_images(self, value: Any, index: int) -> Any:
        """The names of a row's images, where there are some."""
        row_name = self._table.row_key(str(self.path.absolute()), index)
        if not isinstance(value, list):
            return row_name if value else None
        return [f"{row_name}/{position}" if is_image else None for position, is_image in enumerate(value)]


def _holds_bytes(kind: Any) -> bool:
    """Whether the values of a column are images or lists of them: binary, or structs with binary `bytes`."""
    import pyarrow as pa

    types = pa.types
    if types.is_dictionary(kind) or _is_list(kind):
        return _holds_bytes(kind.value_type)
    if types.is_struct(kind):
        number = kind.get_field_index("bytes")
        return number >= 0 and _holds_bytes(kind.field(number).type)
    tests = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)
    return any(test(kind) for test in tests)


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    types = pa.types
    tests = (
        types.is_list,
        types.is_large_list,
        types.is_fixed_size_list,
        types.is_list_view,
        types.is_large_list_view,
    )
    return any(test(kind) for test in tests)


def _find_path_columns(path: Path, names: list[str]) -> dict[str, tuple[str, list[int | None]]]:
    """Of Parquet columns of structs with `bytes` and `path`: where paths are, and the nulls of `bytes` per group."""
    import pyarrow.parquet as pq

    metadata = pq.read_metadata(path)
    schema = [metadata.schema.column(number).path for number in range(metadata.num_columns)]
    result = {}
    for name in names:
        leaves = [
            leaf for leaf in schema if leaf.startswith(f"{name}.") and leaf.endswith((".bytes", ".path"))
        ]
        if len(leaves) == 2:
            bytes_leaf, path_leaf = sorted(leaves)
            groups = (metadata.row_group(group) for group in range(metadata.num_row_groups))
            chunks = [group.column(schema.index(bytes_leaf)) for group in groups]
            counts = [chunk.statistics and chunk.statistics.null_count for chunk in chunks]
            result[name] = path_leaf, counts
    return result


def _count_nulls(column: Any) -> int:
    """The nulls of a column's leaves where no struct has null fields; as in Parquet, an empty list counts as one."""
    import pyarrow.compute as pc

    if not _is_list(column.type):
        return int(column.null_count)
    num_empty = pc.sum(pc.less(pc.list_value_length(column).fill_null(0), 1)).as_py() or 0
    return int(num_empty + pc.list_flatten(column).null_count)


def _set_column(rows: Any, name: str, change: Callable[[Any], Any]) -> Any:
    """A table with a column changed, chunk by chunk."""
    import pyarrow as pa

    chunks = [change(chunk) for chunk in rows[name].chunks]
    return rows.set_column(rows.schema.get_field_index(name), name, pa.chunked_array(chunks))


def _drop_bytes(values: Any) -> Any:
    """Whether each value is an image; of lists, whether each of their values is."""
    import pyarrow as pa
    import pyarrow.compute as pc

    types = pa.types
    if types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if _is_list(values.type):
        lengths = pc.list_value_length(values).fill_null(0)
        offsets = np.append(0, np.cumsum(lengths.to_numpy(zero_copy_only=False), dtype=np.int64))
        flags = _drop_bytes(pc.list_flatten(values))
        return pa.LargeListArray.from_arrays(pa.array(offsets), flags, mask=values.is_null())
    is_image = values.is_valid()
    if types.is_struct(values.type) and values.type.get_field_index("bytes") >= 0:
        fields = [
            values.field(name).is_valid()
            for name in ("bytes", "path")
            if values.type.get_field_index(name) >= 0
        ]
        is_image = pc.and_(is_image, fields[0] if len(fields) == 1 else pc.or_(*fields))
    return is_image


_READERS: dict[str, Callable[[Path], Reader]] = {
    ".jsonl": JsonReader,
    ".tar": TarReader,
    ".parquet": TableReader,
    ".arrow": TableReader,
}
