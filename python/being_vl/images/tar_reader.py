"""Records of WebDataset: the samples of a tar file."""

import errno
import json
import posixpath
import tarfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from being_vl.errors import RecordError
from being_vl.files import file_version
from being_vl.images.fields import CONVERSATION_FIELDS, is_empty
from being_vl.images.files import HIDDEN, NOT_UTF_8, open_file
from being_vl.images.references import names_images, replace_names
from being_vl.images.tars import REPLACED, Member, TarListing, list_members, normalise_name
from being_vl.names import show_name


class TarReader:
    """WebDataset: members that share their name up to its first dot are a sample; its `.json` is the record.

    They need not stand together. A sample without `.json` is a caption of its images, the `.txt`; so is one whose
    `.json` has neither conversation nor caption. Where the record names no image, the sample's images are its own.
    Those in the tar are named by the tar's absolute path, `/`, and their name in it. Other members are passed over.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._version = file_version(path)
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
        if file_version(self.path) not in (self._version, ()):
            raise OSError(errno.ESTALE, "changed while it was being read", str(self.path))
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
