"""Keys: what images are called, so that a record finds the grid of its image."""

import os

from being_vl.options import StrPath


def image_key(path: StrPath, root: StrPath) -> str:
    """The key of an image: its path relative to the root, normalised; its absolute path if it is outside the root.

    Links are not resolved, and nothing is looked up on disk.

    Args:
        path: The image's own path, absolute or relative to `root`. Of an image within a file: the file's path, `/`, and
            the image's place in the file.
        root: Folder that keys are relative to.
    """
    root = _normalise(os.path.abspath(root))
    path = _normalise(os.path.join(root, path))
    prefix = root.rstrip(os.sep) + os.sep
    return path.removeprefix(prefix).replace(os.sep, "/")


def _normalise(path: str) -> str:
    """An absolute path without `.`, `..` and doubled separators, also at its beginning, where POSIX keeps two."""
    return (
        os.path.normpath(os.sep + path.lstrip(os.sep)) if path.startswith(os.sep) else os.path.normpath(path)
    )
