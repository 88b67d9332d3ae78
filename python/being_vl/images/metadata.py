"""Image files without their metadata, for decoders that stop at a note beside the pixels which is damaged or too large.

Every function gives a file whose pixels are those of the original, byte for byte: what is cut off or damaged in them
stays so, and is for the decoder to refuse.
"""

import re
import struct
import zlib
from collections.abc import Callable

_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_PNG_CHUNK = re.compile(rb"(?=(....)(?:%s))" % b"|".join(_PNG_PIXELS), re.DOTALL)
_MAX_MATCHES = 100
"""Places at which the chunk behind a damaged one is looked for."""
_PNG_ORIENTATION = re.compile(
    rb"eXIf|[ziT]TXt(Raw profile type exif|XML:com\.adobe\.xmp)\0|tEXtRaw profile type exif\0"
)

_JPEG_TABLES = (*range(0xC0, 0xD0), 0xDB, 0xDD)
_JPEG_SEGMENT = re.compile(rb"\xff[\xc0-\xcf\xda\xdb\xdd\xe0-\xef\xfe]")

_WEBP_PIXELS = (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF")
_WEBP_FLAGS = {b"ICCP": 0x20, b"EXIF": 0x08, b"XMP ": 0x04}

_TIFF_ORIENTATION = 274
_TIFF_PIXELS = (
    *(
        254,
        255,
        256,
        257,
        258,
        259,
        262,
        266,
        273,
        277,
        278,
        279,
        284,
        292,
        293,
        317,
        320,
        322,
        323,
        324,
        325,
    ),
    *(
        330,
        332,
        334,
        338,
        339,
        340,
        341,
        347,
        512,
        513,
        514,
        515,
        517,
        518,
        519,
        520,
        521,
        529,
        530,
        531,
        532,
    ),
    50674,
)


def strip_metadata(data: bytes, format: str, keep_orientation: bool) -> bytes | None:
    """An image file without what is not needed for its pixels.

    Args:
        data: The file's bytes.
        format: Its format, a key of `FORMAT_SUFFIXES`.
        keep_orientation: Leave in it what may say how the image is turned, as EXIF does.

    Returns:
        The bytes of the file, or None if the format is another one than PNG, JPEG, WebP, GIF and TIFF, or the file's
        parts cannot be told apart.
    """
    strip = _STRIPPERS.get(format)
    try:
        return strip(data, keep_orientation) if strip else None
    except (struct.error, IndexError):
        return None


def _strip_png(data: bytes, keep_orientation: bool) -> bytes:
    parts, position = [data[:8]], 8
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        is_intact = end <= len(data) and _has_crc(data, position, length)
        if kind in _PNG_PIXELS:
            parts.append(data[position:end])
        elif not is_intact and not data[end + 4 : end + 8].isalpha():
            # Its length is damaged as well: go on at the next chunk that is needed.
            starts = (match.start() for match in _PNG_CHUNK.finditer(data, position + 1))
            end = next(
                (s for s in starts if _has_crc(data, s, *struct.unpack_from(">I", data, s))), len(data)
            )
        elif is_intact and keep_orientation and _PNG_ORIENTATION.match(data, position + 4):
            parts.append(data[position:end])
        position = end
    return b"".join(parts)


def _has_crc(data: bytes, position: int, length: int) -> bool:
    end = position + 8 + length
    return (
        end + 4 <= len(data)
        and zlib.crc32(memoryview(data)[position + 4 : end]).to_bytes(4, "big") == data[end : end + 4]
    )


def _strip_jpeg(data: bytes, keep_orientation: bool) -> bytes | None:
    parts, position, is_damaged = [data[:2]], 2, False
    while data[position : position + 2] != b"\xff\xda":
        if data[position + 1] == 0xFF:  # fill
            position += 1
            continue
        marker, length = struct.unpack_from(">xBH", data, position)
        end = position + 2 + length
        if data[position] != 0xFF or length < 2 or data[end : end + 1] != b"\xff":
            # A note of a wrong length: go on at the next segment behind which another one begins.
            if data[position] == 0xFF and marker in _JPEG_TABLES:
                return None
            is_damaged, end = True, _find_jpeg_segment(data, position + 1)
        elif marker in _JPEG_TABLES or _is_needed_note(data[position:end], keep_orientation):
            parts.append(data[position:end])
        position = end
    image_end = data.find(b"\xff\xd9", position)
    if is_damaged and image_end >= 0 and b"\xff\xda" in data[image_end:]:
        return None  # these may be the scans of a thumbnail within the damaged note
    return b"".join([*parts, data[position:]])


def _is_needed_note(segment: bytes, keep_orientation: bool) -> bool:
    """Whether a decoder needs an application segment of JPEG: for its colours or, if asked for, its orientation."""
    is_jfif = segment[1] == 0xE0 and segment[4:9] == b"JFIF\0" and len(segment) >= 16
    is_adobe = segment[1] == 0xEE and segment[4:9] == b"Adobe" and len(segment) >= 16
    is_orientation = segment[1] == 0xE1 and segment[4:10] == b"Exif\0\0"
    return is_jfif or is_adobe or (keep_orientation and is_orientation)


def _find_jpeg_segment(data: bytes, position: int) -> int:
    for match in _JPEG_SEGMENT.finditer(data, position):
        start = match.start()
        end = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        if end - start >= 4 and (data[start + 1] == 0xDA or data[end : end + 1] == b"\xff"):
            return start
    raise IndexError


def _strip_webp(data: bytes, keep_orientation: bool) -> bytes:
    parts, position, flags = [b"WEBP"], 12, 0
    while position + 8 <= len(data):
        kind, size = struct.unpack_from("<4sI", data, position)
        end = position + 8 + size
        is_orientation = kind == b"EXIF" and keep_orientation and end <= len(data)
        if kind in _WEBP_PIXELS or is_orientation:
            parts.append(data[position:end] + bytes(size % 2))
            flags |= _WEBP_FLAGS.get(kind, 0)
        position = end + size % 2
    if len(parts) > 1 and parts[1][:4] == b"VP8X":
        kept_flags = parts[1][8] & ~sum(_WEBP_FLAGS.values()) | flags
        parts[1] = parts[1][:8] + bytes([kept_flags]) + parts[1][9:]
    body = b"".join(parts)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _strip_gif(data: bytes, _: bool) -> bytes:
    position = 13 + _gif_palette_size(data[10])
    parts = [data[:position]]
    while data[position] != 0x2C:  # extensions in front of the first image
        if data[position] == 0x3B:
            return b"".join(parts)
        if data[position] == 0x21:
            end = _skip_gif_blocks(data, position + 2)
            if data[position + 1 : position + 3] == b"\xf9\x04":  # the image's transparency
                parts.append(data[position:end])
            position = end
        else:
            position += 1
    end = _skip_gif_blocks(data, position + 11 + _gif_palette_size(data[position + 9]))
    return b"".join([*parts, data[position:end], b";"])


def _gif_palette_size(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _skip_gif_blocks(data: bytes, position: int) -> int:
    while position < len(data) and data[position]:
        position += 1 + data[position]
    return position + 1


def _strip_tiff(data: bytes, keep_orientation: bool) -> bytes:
    order = "<" if data[:2] == b"II" else ">"
    is_big = 43 in data[2:4]
    number, size_of_entry = ("Q", 20) if is_big else ("I", 12)
    count_format = order + ("Q" if is_big else "H")
    (start,) = struct.unpack_from(order + number, data, 8 if is_big else 4)
    (count,) = struct.unpack_from(count_format, data, start)
    first_entry = start + struct.calcsize(count_format)
    last_start = len(data) - size_of_entry + 1
    entries = [
        data[position : position + size_of_entry]
        for position in range(
            first_entry, min(first_entry + count * size_of_entry, last_start), size_of_entry
        )
    ]
    kept_tags = (*_TIFF_PIXELS, *([_TIFF_ORIENTATION] if keep_orientation else []))
    kept_entries = [
        entry
        for entry in entries
        if len(entry) == size_of_entry and struct.unpack(order + "H", entry[:2])[0] in kept_tags
    ]
    directory = (
        struct.pack(count_format, len(kept_entries)) + b"".join(kept_entries) + bytes(struct.calcsize(number))
    )
    return data[:start] + directory + data[start + len(directory) :]


_STRIPPERS: dict[str, Callable[[bytes, bool], bytes | None]] = {
    "PNG": _strip_png,
    "JPEG": _strip_jpeg,
    "WEBP": _strip_webp,
    "GIF": _strip_gif,
    "TIFF": _strip_tiff,
}
