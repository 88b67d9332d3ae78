"""Members of uncompressed tar files, such as WebDataset's; read in place."""

import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from being_vl.files import file_version
from being_vl.images.files import HIDDEN, NOT_REGULAR, NOT_UTF_8, is_hidden, is_text, open_file
from being_vl.images.formats import HEAD_SIZE, find_format, is_image_name
from being_vl.options import StrPath

MAX_HEADER = 1 << 22
"""Bytes of a member's long name or PAX header, at most."""
MAX_LINKS = 40
"""Links that lead to links, at most; as in Linux."""
LISTINGS_IN_MEMORY = 2

REPLACED = "replaced by a later member of its name"
SPARSE = "a sparse member"
LOST_LINK = "a link to no file in the tar"


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar.

    Args:
        name: Its path in the tar, posix, normalised, as keys have it.
        offset: Where its bytes begin in the tar.
        size: How many they are.
        is_image: Whether its suffix or its first bytes are those of an image.
    """

    name: str
    offset: int
    size: int
    is_image: bool


@dataclass(frozen=True, slots=True)
class TarListing:
    """What is in a tar.

    Args:
        members: Its files, in the order in which their names appear first; of several with one name the last, as when
            the tar is unpacked. A link is the file that it leads to.
        left_out: Name and reason of each member that is none of these; folders are not listed.
    """

    members: tuple[Member, ...]
    left_out: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class _Entry:
    """A member before links are followed: bytes, or the name in the tar that it is a link to, or a reason."""

    offset: int = 0
    size: int = 0
    link: str = ""
    reason: str = ""


def list_members(path: StrPath) -> TarListing:
    """All files in a tar, also in archives that were appended to it; the last few listings are kept in memory.

    Raises:
        tarfile.TarError: if it is no uncompressed tar, is damaged, or has no end mark and so may be cut off.
        OSError: if it cannot be read, or is no regular file.
    """
    path = Path(path)
    return _list_members(path, file_version(path))


@lru_cache(LISTINGS_IN_MEMORY)
def _list_members(path: Path, version: tuple[int, ...]) -> TarListing:
    entries: dict[str, _Entry] = {}
    left_out: list[tuple[str, str]] = []
    members: list[Member] = []
    with open_file(path) as file:
        # Of each name the last member counts.
        for name, entry in _read_entries(file, entries):
            if name in entries:
                left_out.append((name, REPLACED))
            entries[name] = entry
        for name, entry in entries.items():
            target = entry if entry.reason else _follow_links(entries, name)
            reason = HIDDEN if is_hidden(name) else target.reason if is_text(name) else NOT_UTF_8
            if reason:
                left_out.append((name, reason))
            else:
                is_image = is_image_name(name) or _has_image_bytes(file, target, name)
                members.append(Member(name, target.offset, target.size, is_image))
    return TarListing(tuple(members), tuple(left_out))


def _read_entries(file: BinaryIO, entries: dict[str, _Entry]) -> Iterator[tuple[str, _Entry]]:
    """Each member with its name; a hard link is what was read of its target before, which `entries` has."""
    for member in _read_headers(file):
        name = normalise_name(member.name)
        if member.isdir() or not name:
            continue
        if member.islnk():
            entry = entries.get(normalise_name(member.linkname), _Entry(reason=LOST_LINK))
        elif member.issym():
            # A relative link may lead above the tar's top folder, out of the tar.
            link = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
            entry = _Entry(link=normalise_name(link) if link.startswith("/") else link)
        elif member.issparse():
            entry = _Entry(reason=SPARSE)
        elif not member.isreg():
            entry = _Entry(reason=NOT_REGULAR)
        else:
            entry = _Entry(member.offset_data, member.size)
        yield name, entry


def _follow_links(entries: dict[str, _Entry], name: str) -> _Entry:
    """The member that a name leads to."""
    for _ in range(MAX_LINKS):
        entry = entries.get(name)
        if entry is None:
            break
        if not entry.link:
            return entry
        name = entry.link
    return _Entry(reason=LOST_LINK)


def _has_image_bytes(file: BinaryIO, entry: _Entry, name: str) -> bool:
    file.seek(entry.offset)
    return find_format(file.read(min(HEAD_SIZE, entry.size)), name) is not None


def _read_headers(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The members of a tar, and of the tars that follow it in the file.

    Done here because `tarfile` takes a damaged header for the end of the tar, as it takes the end of the file.
    """
    file_size = file.seek(0, 2)
    file.seek(0)
    headers: BinaryIO = _Headers(file)  # type: ignore[assignment]
    position, has_ended = 0, False
    tar: tarfile.TarFile | None = None
    while not has_ended or (position := _skip_zeros(file, position)) < file_size:
        try:
            tar = tar or tarfile.TarFile(fileobj=headers, encoding="utf-8", errors="surrogateescape")
            file.seek(position)
            member = tar.tarinfo.fromtarfile(tar)
        except tarfile.HeaderError as error:
            file.seek(position)
            if file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE):
                has_ended = True
                continue
            if position >= file_size:
                raise tarfile.ReadError("no end mark; it is cut off, or still being written") from None
            raise tarfile.ReadError(f"{error} at byte {position}") from None
        except (ValueError, LookupError, OverflowError, RecursionError) as error:
            raise tarfile.ReadError(f"a damaged header at byte {position}") from error
        if member.size < 0 or tar.offset <= position:
            raise tarfile.ReadError(f"a negative size at byte {position}")
        if tar.offset - tarfile.BLOCKSIZE >= file_size:
            raise tarfile.ReadError("unexpected end of data")
        position, has_ended = tar.offset, False
        yield member


class _Headers:
    """A tar file for the one who parses its headers, which are of limited size."""

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, size: int) -> bytes:
        if size > MAX_HEADER:
            raise ValueError("a header too large")
        return self._read(size)


def _skip_zeros(file: BinaryIO, position: int) -> int:
    """Where the first block from `position` on begins that is not all zeros, or the file's end."""
    file.seek(position)
    while chunk := file.read(1 << 20):
        if zeros := len(chunk) - len(chunk.lstrip(b"\0")):
            if zeros < len(chunk):
                return position + zeros // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
            position += len(chunk)
        else:
            break
    return position


def normalise_name(name: str) -> str:
    """A member's path below the folder that the tar is unpacked in, without `.`, `..` and doubled separators."""
    if name and name[0] not in "./" and "//" not in name and "/." not in name:
        return name
    return posixpath.normpath("/" + name).lstrip("/")
