"""Keys: what images are called, so that a record finds the grid of its image."""

import os
from pathlib import Path

from being_vl.options import StrPath


def image_key(path: StrPath, root: StrPath) -> str:
    """The key of an image: its path relative to the root, normalised; its absolute path if it is outside the root.

    Links are not resolved, and nothing is looked up on disk.

    Args:
        path: The image's own path, absolute or relative to `root`. Of an image within a file: the file's path, `/`, and
            the image's place in the file.
        root: Folder that keys are relative to.
    """
    return key_below(os.fspath(path), folder_prefix(root))


def image_path(key: str, root: str) -> str:
    """The absolute path of the image that has a key.

    Args:
        key: The key.
        root: Folder that it is relative to, an absolute path.
    """
    return _normalise(key if key.startswith(os.sep) else f"{root}{os.sep}{key}")


def folder_prefix(folder: StrPath) -> str:
    """What the absolute, normalised paths of all that is in a folder begin with."""
    return _normalise(str(Path(folder).absolute())).rstrip(os.sep) + os.sep


def key_below(path: str, root_prefix: str) -> str:
    """`image_key` for many paths below one root, whose `folder_prefix` is given."""
    path = _normalise(path if path.startswith(os.sep) else root_prefix + path)
    return path.removeprefix(root_prefix).replace(os.sep, "/")


def _normalise(path: str) -> str:
    """An absolute path without `.`, `..` and doubled separators, also at its beginning, where POSIX keeps two."""
    return os.path.normpath(os.sep + path.lstrip(os.sep))
