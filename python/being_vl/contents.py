"""The content of files as SHA-256, taken once and remembered with what tells whether a file has changed."""

import hashlib
import json
import logging
import os
import stat
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from being_vl.files import sha256, write_aside
from being_vl.options import StrPath
from being_vl.outputs import read_json

log = logging.getLogger(__name__)

MIN_AGE = 0.1
"""Seconds since its last change from which on a file is remembered: clocks of file systems tick coarsely."""
_LOGGED_BYTES = 1 << 30
"""Bytes to read from which on a line says so."""


class _Version(NamedTuple):
    """What tells whether a file has changed: bytes, times of change of content and of status in ns, inode."""

    size: int
    modified: int
    changed: int
    inode: int


class FileHashes:
    """SHA-256 of files. A file is read again only if its size, inode, or one of its times of change is another one.

    The time of change of a file's status is the system's own, so a file is read again even where somebody has set back
    the time of its content.

    Args:
        path: The JSON file that keeps what is known from one process to the next; it need not exist.
    """

    def __init__(self, path: StrPath) -> None:
        self._path = Path(path)
        content = read_json(self._path)
        self._files: dict[str, list[int | str]] = content.get("files", {})
        self._disguised = set(content.get("disguised", ()))
        self._is_saved = True

    def hash(self, paths: Iterable[StrPath]) -> dict[str, str]:
        """Path → SHA-256 of each file.

        Raises:
            OSError: if one is missing or cannot be read.
        """
        names = list(dict.fromkeys(_name(path) for path in paths))
        versions = {name: _version(os.stat(name)) for name in names}  # noqa: PTH116 (faster, for many files)
        stale_names = [name for name in names if self._files.get(name, ())[:4] != [*versions[name]]]
        num_bytes = sum(versions[name].size for name in stale_names)
        if num_bytes >= _LOGGED_BYTES:
            log.info(
                "reading %d files, %.1f GB, once: their content counts", len(stale_names), num_bytes / 1e9
            )
        new_hashes = {}
        # Hashing leaves the interpreter's lock, so threads share the files.
        with ThreadPoolExecutor() as threads:
            for name, (version, digest) in zip(stale_names, threads.map(_read, stale_names), strict=True):
                new_hashes[name] = digest
                self._remember(name, version, digest)
        return {name: new_hashes.get(name) or str(self._files[name][4]) for name in names}

    def hash_below(self, path: StrPath) -> dict[str, str]:
        """Name → SHA-256 of a file, or of all files below a folder, also behind links; no hidden ones.

        A name is the file's path below the folder; that of a file itself is empty.
        """
        path = Path(path)
        names = {"": path} if path.is_file() else dict(_walk(path))
        hashes = self.hash(names.values())
        return {name: hashes[_name(file)] for name, file in sorted(names.items())}

    def has_disguised(self, paths: Iterable[StrPath]) -> bool:
        """Whether one of these files has been found to hold something else at the same size and time of change."""
        return not self._disguised.isdisjoint(_name(path) for path in paths)

    def forget_disguised(self, paths: Iterable[StrPath]) -> None:
        """Everything follows these files again."""
        names = self._disguised.intersection(_name(path) for path in paths)
        self._disguised -= names
        self._is_saved &= not names

    def save(self) -> None:
        """Write what is known, if it has changed."""
        if self._is_saved:
            return
        content = {"files": self._files, "disguised": sorted(self._disguised)}
        with write_aside(self._path) as aside:
            aside.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")
        self._is_saved = True

    def _remember(self, name: str, version: _Version | None, digest: str) -> None:
        old_entry = self._files.get(name)
        if old_entry and version and old_entry[:2] == [*version[:2]] and old_entry[4] != digest:
            self._disguised.add(name)
        if version and time.time_ns() - max(version.modified, version.changed) >= MIN_AGE * 1e9:
            self._files[name] = [*version, digest]
        else:
            self._files.pop(name, None)
        self._is_saved = False


def hash_files(paths: Iterable[Path], hashes: FileHashes | None = None) -> dict[Path, str]:
    """Path → SHA-256 of each file, several at a time.

    Args:
        paths: The files.
        hashes: What is known already.
    """
    paths = list(paths)
    if hashes is None:
        with ThreadPoolExecutor() as threads:
            return dict(zip(paths, threads.map(sha256, paths), strict=True))
    digests = hashes.hash(paths)
    return {path: digests[_name(path)] for path in paths}


def _name(path: StrPath) -> str:
    return os.path.abspath(path)  # noqa: PTH100 (faster, and links stay as they are)


def _version(status: os.stat_result) -> _Version:
    return _Version(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def _read(path: str) -> tuple[_Version | None, str]:
    """A file's version and SHA-256; no version if it was changed while it was read."""
    with Path(path).open("rb") as file:
        version = _version(os.fstat(file.fileno()))
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return version if _version(os.fstat(file.fileno())) == version else None, digest


def _walk(folder: Path) -> Iterator[tuple[str, Path]]:
    """Name and path of each regular file below a folder, each folder once even where links lead back to it."""
    seen_folders = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        status = Path(root).stat()
        if (status.st_dev, status.st_ino) in seen_folders:
            folders.clear()
            continue
        seen_folders.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            path = Path(root, name)
            if not name.startswith(".") and path.exists() and stat.S_ISREG(path.stat().st_mode):
                yield path.relative_to(folder).as_posix(), path
