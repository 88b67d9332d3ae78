"""Image files in folders."""

from pathlib import Path

from being_vl.errors import ImageError
from being_vl.images.formats import SUFFIXES, is_image_name
from being_vl.options import StrPath


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
