"""Files that are either complete or absent, and the manifest that stands beside every step's output."""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from being_vl.errors import ManifestError

MANIFEST = "manifest.json"


@contextmanager
def write_aside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success fsync it (file or folder) and rename it to `path`.

    The caller creates the file or folder at the yielded path. If the body raises, what it wrote is removed and
    `path` is untouched; after kill -9 a `.tmp` leftover remains and the next attempt replaces it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary_path = path.with_name(path.name + ".tmp")
    remove(temporary_path)
    try:
        yield temporary_path
        for file in (
            [temporary_path, *temporary_path.rglob("*")] if temporary_path.is_dir() else [temporary_path]
        ):
            fsync(file)
        if path.is_dir():
            shutil.rmtree(path)
        temporary_path.replace(path)
        fsync(path.parent)
    except BaseException:
        remove(temporary_path)
        raise


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
