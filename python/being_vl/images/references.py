"""The images that an item of a file of records names or holds: one reading, for records and for `quantize`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from being_vl.errors import RecordError


@dataclass(frozen=True, slots=True)
class ImageReference:
    """An image of a record.

    Args:
        name: What `GridStores.find` takes. Of an image file: its path as the record gives it. Of an image that the file
            of records itself holds (a tar's member, a table's row, a data URI): the file's absolute path, `/`, and its
            place in the file.
        data: The encoded image where the item itself holds it; None where it is elsewhere, or was not asked for.
    """

    name: str
    data: bytes | None = None


def read_references(item: dict[str, Any], location: str, path: Path, index: int) -> list[ImageReference]:
    """The images of a record, in their order.

    Args:
        item: The record as it was decoded.
        location: The record's place, for errors.
        path: The file of records.
        index: The record's number in it, from 0.

    Raises:
        RecordError: if a field that names images holds something else.
    """
    field = "image" if "image" in item else "images"
    images = item.get(field, [])
    images = images if isinstance(images, list) else [images]
    for image in images:
        if not isinstance(image, str) or not image:
            raise RecordError(
                f"{location}: {field!r} holds {image!r:.80}; expected a file name or a list of file names"
            )
    return [ImageReference(image) for image in images]
