"""Image files in folders: which there are, and opening them safely."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from being_vl.errors import ImageError
from being_vl.images.formats import SUFFIXES, is_image_name
from being_vl.options import StrPath

HIDDEN = "hidden"
NOT_REGULAR = "not a regular file"
NOT_UTF_8 = "a name that is not UTF-8"


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


def list_image_files(folder: StrPath) -> list[str]:
    """Paths of all images in `folder` and its subfolders, relative to it, in posix form, sorted.

    Raises:
        ImageError: if the folder is missing or holds no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ImageError(f"{folder}: no such folder; expected a folder of images")
    paths = (path.relative_to(folder) for path in folder.rglob("*") if is_image_name(path))
    keys = sorted(path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts))
    if not keys:
        raise ImageError(
            f"{folder}: no image found; expected files that end in {', '.join(sorted(SUFFIXES))}"
        )
    return keys
