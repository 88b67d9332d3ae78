"""Formats of image files: those that are opened, and how each is told by its first bytes or its suffix.

Only formats of this list are given to Pillow, and each only to its own decoder. Others that Pillow knows start outside
programs (PostScript), need a plugin, or hold no picture.
"""

import re
from collections.abc import Callable
from pathlib import PurePath

HEAD_SIZE = 256
"""Bytes of a file that `sniff_format` and `sniff_other_format` look at; a file may be shorter."""

FORMAT_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".mpo"),
    "PNG": (".png", ".apng"),
    "GIF": (".gif",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "JPEG2000": (".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"),
    "AVIF": (".avif",),
    "ICO": (".ico",),
    "CUR": (".cur",),
    "TGA": (".tga", ".icb", ".vda", ".vst"),
    "PCX": (".pcx",),
    "DCX": (".dcx",),
    "SGI": (".sgi", ".rgb", ".rgba", ".bw"),
    "QOI": (".qoi",),
    "DDS": (".dds",),
    "ICNS": (".icns",),
    "PSD": (".psd",),
    "SUN": (".ras",),
    "XPM": (".xpm",),
    "XBM": (".xbm",),
}
"""Formats that are opened, by Pillow's names, and the suffixes of their files, in lower case."""

SUFFIXES = frozenset(suffix for suffixes in FORMAT_SUFFIXES.values() for suffix in suffixes)
"""Suffixes of image files, in lower case."""

_BY_SUFFIX_ALONE = {suffix: name for name in ("TGA", "XBM") for suffix in FORMAT_SUFFIXES[name]}
"""Suffixes of the formats whose files do not begin with bytes of their own."""

_DIB_HEADERS = (12, 40, 52, 56, 64, 108, 124)
"""Sizes of the header of a Windows bitmap."""


def _number(head: bytes, start: int, size: int) -> int:
    return int.from_bytes(head[start : start + size], "little")


def _is_dib(head: bytes) -> bool:
    planes = _number(head, 8, 2) if head[:1] == b"\x0c" else _number(head, 12, 2)
    return len(head) >= 16 and _number(head, 0, 4) in _DIB_HEADERS and planes == 1


def _is_icon(head: bytes) -> bool:
    """Whether the directory of a Windows icon or cursor begins here: it has entries, and the first lies behind it."""
    count, size, offset = _number(head, 4, 2), _number(head, 14, 4), _number(head, 18, 4)
    return count > 0 and size > 0 and offset >= 6 + 16 * count


def _has_avif_brand(head: bytes) -> bool:
    """Whether the box `ftyp` names AVIF, be it among the brands that the file is compatible with."""
    box = head[: max(16, int.from_bytes(head[:4], "big"))]
    return any(box[start : start + 4] in (b"avif", b"avis") for start in range(8, len(box), 4))


_TESTS: tuple[tuple[str, Callable[[bytes], object]], ...] = (
    ("JPEG", re.compile(rb"\xff\xd8\xff").match),
    ("PNG", re.compile(rb"\x89PNG\r\n\x1a\n").match),
    ("GIF", re.compile(rb"GIF8[79]a").match),
    ("WEBP", re.compile(rb"RIFF....WEBPVP8[ LX]", re.DOTALL).match),
    (
        "TIFF",
        re.compile(rb"II\*\x00(?!.{4}CR)|MM\x00\*|MM\*\x00|II\x00\*|MM\x00\+|II\+\x00", re.DOTALL).match,
    ),
    ("BMP", lambda head: head[:2] == b"BM" and _number(head, 14, 4) in _DIB_HEADERS),
    ("PPM", re.compile(rb"P[1-6](\s*#|\s+\d)|P7\s+WIDTH|Pf\s|P[0y]\s").match),
    ("JPEG2000", re.compile(rb"\xff\x4f\xff\x51|\x00\x00\x00\x0cjP  \r\n\x87\n").match),
    ("AVIF", lambda head: head[4:8] == b"ftyp" and _has_avif_brand(head)),
    ("ICO", lambda head: head[:4] == b"\x00\x00\x01\x00" and _is_icon(head)),
    ("CUR", lambda head: head[:4] == b"\x00\x00\x02\x00" and _is_icon(head)),
    ("PCX", re.compile(rb"\n[\x00\x02\x03\x05][\x00\x01][\x01\x02\x04\x08]", re.DOTALL).match),
    ("DCX", re.compile(rb"\xb1\x68\xde\x3a").match),
    ("SGI", re.compile(rb"\x01\xda[\x00\x01][\x01\x02]\x00[\x01\x02\x03]", re.DOTALL).match),
    ("QOI", re.compile(rb"qoif").match),
    ("DDS", re.compile(rb"DDS \x7c\x00\x00\x00").match),
    ("ICNS", re.compile(rb"icns").match),
    ("PSD", re.compile(rb"8BPS\x00\x01").match),
    ("SUN", re.compile(rb"\x59\xa6\x6a\x95").match),
    ("XPM", re.compile(rb"/\* XPM \*/").match),
    ("DIB", _is_dib),
)

_OTHER_TESTS: tuple[tuple[str, re.Pattern[bytes]], ...] = (
    ("PostScript", re.compile(rb"%!PS|\xc5\xd0\xd3\xc6")),
    ("PDF", re.compile(rb"%PDF-")),
    ("SVG", re.compile(rb"(\xef\xbb\xbf)?\s*<.*?(?<=<)(svg[\s>]|!DOCTYPE svg)", re.DOTALL)),
    ("HEIF", re.compile(rb"....ftyp(hei[cfmsx]|hev[cmsx]|mif1|msf1|mif2)", re.DOTALL)),
    ("JPEG XL", re.compile(rb"\xff\x0a|\x00\x00\x00\x0cJXL ")),
    ("JPEG XR", re.compile(rb"II\xbc")),
    ("OpenEXR", re.compile(rb"\x76\x2f\x31\x01")),
    ("Radiance HDR", re.compile(rb"#\?(RADIANCE|RGBE)")),
    ("colour PFM", re.compile(rb"PF\s")),
    ("FITS", re.compile(rb"SIMPLE  =")),
    ("Windows metafile", re.compile(rb"\xd7\xcd\xc6\x9a|\x01\x00\x00\x00.{36} EMF", re.DOTALL)),
    ("camera raw", re.compile(rb"II\*\x00.{4}CR|FUJIFILMCCD-RAW|IIRO|IIRS|IIU\x00|....ftypcrx", re.DOTALL)),
    ("GIMP", re.compile(rb"gimp xcf")),
    ("DjVu", re.compile(rb"AT&TFORM")),
)


def sniff_format(head: bytes) -> str | None:
    """The format of an image file by its first `HEAD_SIZE` bytes: a key of `FORMAT_SUFFIXES`.

    None where they are those of no format that is opened, or of one that cannot be told so (TGA, XBM).
    """
    return next((name for name, test in _TESTS if test(head)), None)


def sniff_other_format(head: bytes) -> str | None:
    """The name of an image format that is not opened, such as SVG, by a file's first `HEAD_SIZE` bytes.

    Asked where `sniff_format` knows none.
    """
    return next((name for name, pattern in _OTHER_TESTS if pattern.match(head)), None)


def find_format(head: bytes, name: str | PurePath) -> str | None:
    """The format of an image file by its first `HEAD_SIZE` bytes or, where its files have none, by its suffix."""
    if (name_of_format := sniff_format(head)) or sniff_other_format(head):
        return name_of_format
    return _BY_SUFFIX_ALONE.get(_suffix(name))


def is_image_name(name: str | PurePath) -> bool:
    """Whether a file's name ends as that of an image which is opened."""
    return _suffix(name) in SUFFIXES


def _suffix(name: str | PurePath) -> str:
    return PurePath(name).suffix.lower()
