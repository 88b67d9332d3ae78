"""JPEG files that lack only their end mark, told apart from those that lack pixels."""

import io
import struct

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_FRAMES = (0xC0, 0xC1, 0xC2, 0xC9, 0xCA)
_NO_MARKERS = (b"\0", b"\xff", *(bytes([number]) for number in range(0xD0, 0xD8)))
_END = b"\xff\xd9"
_NOISE = np.random.default_rng(0).integers(1, 255, 64, np.uint8).tobytes()
_PADDINGS = [
    b"\xfe"
    + _NOISE
    + b"".join(bytes([0xFF, 0xD0 + number % 8]) + _NOISE for number in range(first, first + 16))
    for first in (0, 4)
]
"""Bits that a decoder reads where the file's own are too few, also behind each mark at which it may begin anew.

Of two marks that are not the one which is due at least one makes the decoder go on.
"""


def append_end(data: bytes) -> bytes | None:
    """A JPEG file with an end mark, or None if pixels are missing as well.

    libjpeg fills up what is missing: with zeros if the end mark follows, else with what is there. So the pixels depend
    on what stands between the file and an end mark, unless none is missing.
    """
    data = data.removesuffix(b"\xff")
    try:
        if not _has_all_scans(data):
            return None
        pixels, *padded_pixels = (_decode(data + padding + _END) for padding in (b"", *_PADDINGS))
    except (OSError, SyntaxError, ValueError, IndexError, struct.error):
        return None
    return data + _END if all(np.array_equal(pixels, other) for other in padded_pixels) else None


def _decode(data: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
        return np.asarray(image)


def _has_all_scans(data: bytes) -> bool:
    """Whether the scans of a JPEG file give all bits of all coefficients of all its components."""
    position, missing = 2, set()
    while 0 <= position < len(data) - 3:
        marker, length = struct.unpack_from(">xBH", data, position)
        segment = data[position + 4 : position + 2 + length]
        if marker in _FRAMES:
            missing = {(segment[6 + 3 * n], k) for n in range(segment[5]) for k in range(64)}
        elif marker == 0xDA:
            count = segment[0]
            first, last, bits = segment[1 + 2 * count : 4 + 2 * count]
            if bits & 15 == 0:
                components = segment[1 : 1 + 2 * count : 2]
                missing -= {(component, k) for component in components for k in range(first, last + 1)}
        # Go to the next marker. In the bits of a scan 0xFF is followed by 0 or belongs to a restart.
        position += 2 + length
        while (position := data.find(b"\xff", position)) >= 0 and data[
            position + 1 : position + 2
        ] in _NO_MARKERS:
            position += 1
    return not missing
