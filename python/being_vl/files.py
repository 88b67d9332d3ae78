"""Files that are either complete or absent, and the manifest that stands beside every step's output."""

import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from being_vl.errors import BeingVLError, ManifestError, OutputError
from being_vl.names import show_name

MANIFEST = "manifest.json"
TEMPORARY = ".being-vl-tmp"
"""How the name of what is not complete yet ends; it begins with a dot."""

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
"""Errors of a disk, not of what is written to it."""


def temporary_path(path: str | os.PathLike[str]) -> Path:
    """Where a file or folder is written before it is complete; nobody else gives such a name to anything."""
    path = Path(path)
    return path.with_name(f".{path.name}{TEMPORARY}")


@contextmanager
def write_aside(
    path: str | os.PathLike[str], kind: str | None = None, make_parents: bool = True
) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success fsync it (file or folder) and rename it to `path`.

    The caller creates the file or folder at the yielded path. If the body raises, what it wrote is removed and
    `path` is untouched; after kill -9 a leftover remains and the next attempt replaces it. A link stands for what it
    points to.

    Args:
        path: The file or folder.
        kind: Of a folder's manifest; None for a file.
        make_parents: Make the folders above it where they are missing.

    Raises:
        OutputError: if there is something that must not be replaced, as `check_replaceable` says, or it can't be
            written: the disk is full, the file too large, the folder was deleted meanwhile.
    """
    path = resolve_link(path)
    check_replaceable(path, kind)
    if make_parents:
        path.parent.mkdir(parents=True, exist_ok=True)
    aside = temporary_path(path)
    with name_write_errors(path):
        remove(aside)
        try:
            yield aside
            for file in [aside, *aside.rglob("*")] if aside.is_dir() else [aside]:
                fsync(file)
            check_replaceable(path, kind)
            if path.is_dir():
                shutil.rmtree(path)
            aside.replace(path)
            fsync(path.parent)
        except BaseException:
            with suppress(OSError):  # what went wrong first is told
                remove(aside)
            raise


@contextmanager
def write_into(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder in `folder`; on success move the files that are in it there, the manifest last.

    Raises:
        OutputError: as `write_aside` does.
    """
    aside = temporary_path(folder / "files")
    with name_write_errors(folder):
        remove(aside)
        try:
            aside.mkdir()
            yield aside
            files = sorted(aside.iterdir(), key=lambda file: file.name == MANIFEST)
            for file in files:
                fsync(file)
            for file in files:
                file.replace(folder / file.name)
            fsync(folder)
        finally:
            with suppress(OSError):
                remove(aside)


def resolve_link(path: str | os.PathLike[str]) -> Path:
    """The path, or what it points to if it is a link.

    Raises:
        OutputError: if that is not there.
    """
    path = Path(path)
    if not path.is_symlink():
        return path
    target = Path(os.path.realpath(path))
    if not target.exists():
        raise OutputError(
            f"{path}: is a link to {show_name(str(path.readlink()))}, which is not there; remove the link"
        )
    return target


def check_replaceable(path: Path, kind: str | None = None) -> None:
    """Refuse what may not be replaced: folders and devices by a file, by a folder all but an output of its kind.

    Args:
        path: Where the file or folder is to be.
        kind: Of the folder's manifest; None for a file.

    Raises:
        OutputError: if something else is there.
    """
    if kind is None:
        if path.is_dir():
            raise OutputError(f"{path}: is a folder; expected the name of a file")
        if path.exists() and not path.is_file():
            raise OutputError(
                f"{path}: is no regular file, but a pipe, socket or device; expected the name of a file"
            )
    elif path.is_dir():
        files = list_files_below(path)
        if files and (foreign_files := files - _read_file_list(path, kind)):
            raise OutputError(
                f"{path}: holds {list_names(foreign_files)}, which is no part of an earlier output; choose another "
                "folder, or move that away"
            )
    elif path.exists():
        raise OutputError(f"{path}: is a file; expected a folder")


def list_files_below(folder: Path) -> set[str]:
    """Names of all that is in a folder and in the folders in it, but those themselves unless they are empty."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir() or not any(path.iterdir())
    }


def _read_file_list(folder: Path, kind: str) -> set[str]:
    """The files that a folder's manifest names as parts of the output; none if it is no such output."""
    try:
        return {*read_manifest(folder, kind)["files"]}
    except (ManifestError, KeyError, TypeError):
        return set()


def list_names(names: set[str], count: int = 3) -> str:
    """A few names of many for a message."""
    shown_names = ", ".join(show_name(name) for name in sorted(names)[:count])
    return shown_names + (f" and {len(names) - count} more" if len(names) > count else "")


@contextmanager
def name_write_errors(path: Path) -> Iterator[None]:
    """Turn what is raised where a file or folder can't be written into an error that names it and the reason.

    Raises:
        OutputError: if the disk is full, the file too large, the folder deleted meanwhile.
    """
    try:
        yield
    except BeingVLError:
        raise
    except Exception as error:
        if reason := _find_reason(error, path):
            raise OutputError(f"{path}: cannot be written: {reason}") from error
        raise


def _find_reason(error: BaseException | None, path: Path) -> str | None:
    """Why a file could not be written; None if the error is none of the disk's."""
    if error is None:
        return None
    text = str(error)
    # Rust's and Arrow's errors have the number in their text alone.
    match = re.search(r"(?:os error|errno) (\d+)", text, re.IGNORECASE)
    number = getattr(error, "errno", None) or (int(match[1]) if match else None)
    places = str(path), str(temporary_path(path))
    is_here = isinstance(error, OSError) and str(error.filename or "").startswith(places)
    if number == errno.ENOENT and not path.parent.is_dir():
        return f"the folder {path.parent} is gone"
    if number in _DISK_ERRORS or (number is not None and is_here):
        free_bytes = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
        space = f"; {free_bytes / 1e6:,.0f} MB are free there" if number == errno.ENOSPC else ""
        return os.strerror(number) + space
    return _find_reason(error.__cause__ or error.__context__, path)


def remove(path: str | os.PathLike[str]) -> None:
    """Remove a file or a folder with all that is in it, if it exists."""
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def fsync(path: str | os.PathLike[str]) -> None:
    """Flush a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON; the file appears only when complete."""
    with write_aside(path) as temporary_path:
        temporary_path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_shared_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write what several processes, also of several machines, write at the same time with the same content."""
    path = resolve_link(path)
    check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = temporary_path(path.with_name(f"{path.name}.{os.uname().nodename}-{os.getpid()}"))
    with name_write_errors(path):
        try:
            aside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            fsync(aside)
            aside.replace(path)
        finally:
            with suppress(OSError):
                aside.unlink(missing_ok=True)


def sha256(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_version(path: str | os.PathLike[str]) -> tuple[int, ...]:
    """Size in bytes and time of change in nanoseconds, which tell whether a file has changed; empty without a file."""
    try:
        status = Path(path).stat()
    except OSError:
        return ()
    return status.st_size, status.st_mtime_ns


def to_jsonable(value: Any) -> Any:
    """Convert an options dataclass, or any value, to plain JSON types: paths to strings, tuples to lists."""

    def convert(value: Any) -> Any:
        return dataclasses.asdict(value) if dataclasses.is_dataclass(type(value)) else str(value)

    return json.loads(json.dumps(value, default=convert))


def write_manifest(folder: str | os.PathLike[str], kind: str, fields: dict[str, Any]) -> None:
    """Write `folder/manifest.json`: format `being-vl/<kind>`, the version that made it, and `fields`.

    Written last, it is what makes the folder count as finished.
    """
    head = {"format": f"being-vl/{kind}", "format_version": 1, "being_vl": version("being-vl")}
    write_json(Path(folder) / MANIFEST, head | fields)


def read_manifest(folder: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """Read `folder/manifest.json`.

    Raises:
        ManifestError: if it is missing, is no JSON, or is of another kind or a newer format version.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ManifestError(f"{folder}: no {MANIFEST}; expected a finished folder of kind {kind!r}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        format_name, format_version = manifest["format"], manifest["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ManifestError(f"{path}: not a being-vl manifest ({error})") from None
    if format_name != f"being-vl/{kind}":
        raise ManifestError(f"{path}: holds {format_name!r}, expected 'being-vl/{kind}'")
    if format_version != 1:
        raise ManifestError(f"{path}: format version {format_version}; this being-vl reads version 1")
    return dict(manifest)
