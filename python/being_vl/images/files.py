"""Image files in folders: which there are, and opening them safely."""

import errno
import os
import posixpath
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from being_vl.errors import ImageError
from being_vl.files import MANIFEST
from being_vl.fingerprints import FINGERPRINT
from being_vl.options import StrPath
from being_vl.outputs import read_json

MAX_FILE = 1 << 30
"""Bytes of an encoded image, at most; a larger file is refused before it is read."""

# Why something is left out.
HIDDEN = "hidden"
EMPTY = "empty"
NOT_REGULAR = "not a regular file"
NOT_UTF_8 = "a name that is not UTF-8"
CYCLE = "a link to a folder that it lies in"
DANGLING = "a link to nothing"
UNREADABLE = "cannot be read"
OUTPUT = "in the output of a job of being-vl"


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Something that a job has not used.

    Args:
        name: What it is called: its path below the root.
        reason: Why, in words that others of its kind share.
        detail: What else there is to say.
        count: How many images or files it stands for.
    """

    name: str
    reason: str
    detail: str = ""
    count: int = 1


def open_file(path: StrPath) -> BinaryIO:
    """Open a regular file for reading; a pipe or a device is not waited for.

    Raises:
        OSError: if it cannot be opened, or is no regular file.
        ValueError: if no file can have that name.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise OSError(errno.EINVAL, NOT_REGULAR, str(path))


def is_hidden(name: str) -> bool:
    """Whether the last part of a path, or a folder in it, begins with a dot."""
    return name.startswith(".") or "/." in name


def is_text(name: str) -> bool:
    """Whether a name can be stored as UTF-8."""
    return name.isascii() or not any("\ud800" <= c <= "\udfff" for c in name)


def check_size(size: int) -> None:
    """Refuse an encoded image that is too large to be read.

    Raises:
        OSError: if it has more than `MAX_FILE` bytes.
    """
    if size > MAX_FILE:
        raise OSError(errno.EFBIG, f"{size:,} bytes; expected at most {MAX_FILE:,}")


def read_file(path: StrPath) -> bytes:
    """All bytes of a regular file of at most `MAX_FILE` bytes.

    Raises:
        OSError: if it is larger, is no regular file, or cannot be read.
        ValueError: if no file can have that name.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        check_size(size)
        return file.read(size)


def suffix_of(name: str) -> str:
    """The suffix of a path's last part, in lower case; empty if it has none."""
    return posixpath.splitext(name)[1].lower()


@dataclass(frozen=True, slots=True)
class FolderFile:
    """A regular file in a folder or in a subfolder.

    Args:
        name: Its path relative to the folder, posix.
        path: Its path.
        version: Its size in bytes and time of change in nanoseconds.
    """

    name: str
    path: str
    version: tuple[int, ...]


@dataclass
class FolderWalk:
    """A walk through a folder and its subfolders; links are followed.

    Args:
        folder: Where it begins.
        left_out: Takes what is no regular file with a proper name.

    Raises:
        ImageError: if the folder cannot be read.
    """

    folder: Path
    left_out: list[LeftOut] = field(default_factory=list)

    def files(self) -> Iterator[FolderFile]:
        """All regular files that are neither hidden nor empty, in no particular order."""
        # Each folder with the prefix of its files' names, and the folders above it.
        folders: list[tuple[str, str, frozenset[tuple[int, int]]]] = [(str(self.folder), "", frozenset())]
        while folders:
            path, prefix, ancestors = folders.pop()
            try:
                status = Path(path).stat()
                inode = status.st_dev, status.st_ino
                if inode in ancestors:
                    self._leave(prefix, CYCLE)
                    continue
                with os.scandir(path) as scan:
                    entries = list(scan)
            except OSError as error:
                if not prefix:
                    raise ImageError(f"{path}: cannot be read ({error.strerror})") from None
                self._leave(prefix, UNREADABLE, error.strerror or "")
                continue
            if prefix and is_output(path, [entry.name for entry in entries]):
                self.left_out.append(LeftOut(prefix, OUTPUT, count=_count_files(path)))
                continue
            for entry in entries:
                name = prefix + entry.name
                if entry.name.startswith("."):
                    self._leave_hidden(name, entry)
                elif _is_folder(entry):
                    folders.append((entry.path, name + "/", ancestors | {inode}))
                elif file := self._check_file(name, entry):
                    yield file

    def _check_file(self, name: str, entry: os.DirEntry[str]) -> FolderFile | None:
        try:
            status = entry.stat()
        except FileNotFoundError:
            self._leave(name, DANGLING)
        except OSError as error:
            self._leave(name, UNREADABLE, error.strerror or "")
        else:
            if not stat.S_ISREG(status.st_mode):
                self._leave(name, NOT_REGULAR)
            elif not status.st_size:
                self._leave(name, EMPTY)
            elif not is_text(name):
                self._leave(name, NOT_UTF_8)
            else:
                return FolderFile(name, entry.path, (status.st_size, status.st_mtime_ns))
        return None

    def _leave(self, name: str, reason: str, detail: str = "") -> None:
        self.left_out.append(LeftOut(name, reason, detail))

    def _leave_hidden(self, name: str, entry: os.DirEntry[str]) -> None:
        """Leave out a file, or all that is in a folder, links not followed; its files are counted."""
        if not entry.is_dir(follow_symlinks=False):
            self._leave(name, HIDDEN)
        elif count := _count_files(entry.path):
            self.left_out.append(LeftOut(name + "/", HIDDEN, count=count))


def is_output(path: StrPath, names: Iterable[str] = (MANIFEST, FINGERPRINT)) -> bool:
    """Whether a folder's manifest or fingerprint says that a job of ours fills it.

    Args:
        path: The folder.
        names: What it holds, if that is known.
    """
    paths = {name: Path(path, name) for name in {MANIFEST, FINGERPRINT}.intersection(names)}
    fields = {name: read_json(path) for name, path in paths.items() if path.is_file()}
    format_name = fields.get(MANIFEST, {}).get("format")
    return "kind" in fields.get(FINGERPRINT, {}) or str(format_name).startswith("being-vl/")


def _count_files(path: str) -> int:
    """Files in a folder and its subfolders, links not followed."""
    return sum(len(files) for _, _, files in os.walk(path))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
