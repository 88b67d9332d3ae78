"""Decoding: which formats are opened, what of a file is ignored or refused, and what pixels come out."""

import io
import os
import struct
import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, TiffImagePlugin, features

from being_vl.errors import ImageError
from being_vl.images.decode import decode_image, read_image, to_rgb
from being_vl.images.formats import (
    FORMAT_SUFFIXES,
    HEAD_SIZE,
    SUFFIXES,
    find_format,
    sniff_format,
    sniff_other_format,
)

ORIENTATION = ExifTags.Base.Orientation
RNG = np.random.default_rng(7)


def smooth_image(width: int = 48, height: int = 32) -> Image.Image:
    """An image without symmetries, whose colours change little from pixel to pixel."""
    corners = np.array([[[230, 20, 20], [20, 220, 30]], [[30, 20, 210], [240, 240, 120]]], np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR)


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def decode(data: bytes, name: str = "x") -> np.ndarray:
    return np.asarray(decode_image(data, name))


def chunk(kind: bytes, content: bytes = b"", crc: int | None = None, length: int | None = None) -> bytes:
    crc = zlib.crc32(kind + content) if crc is None else crc
    return (
        struct.pack(">I", len(content) if length is None else length)
        + kind
        + content
        + struct.pack(">I", crc)
    )


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: bytes) -> bytes:
    """A PNG of unfiltered rows, each with its leading 0; `chunks` come in front of the pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def png_with(*chunks: bytes, behind: bool = False, exif: Image.Exif | None = None) -> bytes:
    """`smooth_image` as PNG, with more chunks in front of its pixels or behind them."""
    data = encode(smooth_image(), "PNG", **({"exif": exif} if exif else {}))
    place = data.index(b"IEND") - 4 if behind else data.index(b"IDAT") - 4
    return data[:place] + b"".join(chunks) + data[place:]


def jpeg_with(*segments: bytes, **options: Any) -> bytes:
    """`smooth_image` as JPEG, with more segments behind the first mark."""
    data = encode(smooth_image(), "JPEG", **options)
    return data[:2] + b"".join(segments) + data[2:]


def segment(marker: int, content: bytes, length: int | None = None) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2 if length is None else length) + content


def webp_with(*chunks: tuple[bytes, bytes], flags: int = 0, **options: Any) -> bytes:
    """`smooth_image` as lossless WebP with more chunks behind its pixels."""
    data = encode(smooth_image(), "WEBP", lossless=True, exif=b"II*\0\x08\0\0\0\0\0\0\0\0\0", **options)
    parts = [
        kind + struct.pack("<I", len(content)) + content + bytes(len(content) % 2) for kind, content in chunks
    ]
    data = data[:20] + bytes([data[20] | flags]) + data[21:] + b"".join(parts)
    return b"RIFF" + struct.pack("<I", len(data) - 8) + data[8:]


def tiff(image: np.ndarray, order: str = "<", **tags: int | tuple[int, ...] | bytes) -> bytes:
    """An uncompressed TIFF by hand: `image` of shape (height, width[, channels]); tags by their numbers as `t258`."""
    height, width = image.shape[:2]
    channels = 1 if image.ndim == 2 else image.shape[2]
    pixels = image.astype(image.dtype.newbyteorder(order)).tobytes()
    values: dict[int, Any] = {
        256: width,
        257: height,
        258: (image.dtype.itemsize * 8,) * channels,
        259: 1,
        262: 1 if channels == 1 else 2,
        277: channels,
        278: height,
        279: len(pixels),
    }
    values |= {int(name[1:]): value for name, value in tags.items()}
    values[273] = 0
    size = 8 + 2 + 12 * len(values) + 4
    entries, heap = b"", b""
    for tag in sorted(values):
        value = values[tag]
        if tag == 273:
            entries += b"%s"
            continue
        kind, items = (
            (1, value) if isinstance(value, bytes) else (3, value if isinstance(value, tuple) else (value,))
        )
        content = value if kind == 1 else struct.pack(f"{order}{len(items)}H", *items)
        count = len(items)
        if len(content) > 4:
            place = struct.pack(order + "I", size + len(heap))
            heap += content + bytes(len(content) % 2)
        else:
            place = content.ljust(4, b"\0")
        entries += struct.pack(order + "HHI", tag, kind, count) + place
    strip = struct.pack(order + "HHII", 273, 4, 1, size + len(heap))
    head, _, tail = entries.partition(b"%s")
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    return start + struct.pack(order + "H", len(values)) + head + strip + tail + bytes(4) + heap + pixels


def exif_with(orientation: int, **tags: Any) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    for name, value in tags.items():
        exif[ExifTags.Base[name]] = value
    return exif


# K. Formats


def test_every_format_that_pillow_writes_is_told_by_its_first_bytes_and_decoded() -> None:
    image, seen = smooth_image(32, 32), set()
    Image.init()
    for format, suffixes in FORMAT_SUFFIXES.items():
        if format not in Image.SAVE or (format == "AVIF" and not features.check("avif")):
            continue
        data = encode(image.convert("1") if format == "XBM" else image, format)
        name = f"image{suffixes[0].upper()}"
        assert find_format(data[:HEAD_SIZE], name) == format
        assert sniff_format(data[:HEAD_SIZE]) == (None if format in ("TGA", "XBM") else format)
        pixels = decode(data, name).astype(int)
        expected_pixels = np.asarray(
            (image.convert("1") if format == "XBM" else image).convert("RGB")
        ).astype(int)
        if format != "ICNS":  # in which it is enlarged
            assert np.abs(pixels - expected_pixels).mean() < 12, format
        seen.add(format)
    assert len(seen) >= 15


@pytest.mark.parametrize(
    ("head", "format"),
    [
        (b"\xff\xd8\xff\xe1\0\0Exif", "JPEG"),
        (b"MM\0+\0\x08\0\0", "TIFF"),
        (b"P5 # made by hand\n2 2\n255\n", "PPM"),
        (b"P6\n640 480\n255\n", "PPM"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", "AVIF"),
        (b"\xff\x4f\xff\x51\0\x29", "JPEG2000"),
        (b"8BPS\0\1\0\0\0\0\0\0\0\3", "PSD"),
        (b"/* XPM */\nstatic char", "XPM"),
        (b"\0\0\2\0\1\0\x20\x20\0\0\0\0\0\0\x30\1\0\0\x16\0\0\0", "CUR"),
    ],
)
def test_first_bytes_of_formats(head: bytes, format: str) -> None:
    assert sniff_format(head) == format


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"P",
        b"BMW sells cars, and this is a caption of one",
        b"P5 is a chapter of the book",
        b"\n\n\nnew lines",
        b"RIFF\x24\0\0\0WAVEfmt ",
        b"\0\0\2\0\0\0\0\0\0\0\0\0\x20\0\x20\0\x18\0",
        b"\0\1\0\0\0\x0e\0\x80",
        b"GIF is a format",
        b"\x28\0\0\0and something else of no picture",
        b"#define width_of_x 3\n#define",
        bytes(100),
    ],
)
def test_what_only_resembles_an_image_is_none(head: bytes) -> None:
    assert sniff_format(head) is None
    assert sniff_other_format(head) is None


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n", "PostScript"),
        (b"\xc5\xd0\xd3\xc6\x20\0\0\0" + bytes(60), "PostScript"),
        (b"%PDF-1.7\n", "PDF"),
        (b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- a -->\n<svg xmlns='x'/>", "SVG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIF"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIF"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"\xd7\xcd\xc6\x9a" + bytes(30), "Windows metafile"),
        (b"SIMPLE  =                    T", "FITS"),
        (b"II*\0\x10\0\0\0CR\2\0", "camera raw"),
    ],
)
@pytest.mark.parametrize("suffix", [".jpg", ".tga", ".tif"])
def test_a_format_that_is_not_opened_is_named_whatever_the_files_name(
    data: bytes, kind: str, suffix: str
) -> None:
    with pytest.raises(ImageError, match=rf"x\{suffix}: cannot be decoded \({kind} is not opened\)"):
        decode_image(data, "x" + suffix)


def test_postscript_starts_no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: object, **__: object) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr("subprocess.Popen", start)
    monkeypatch.setattr("subprocess.check_call", start)
    monkeypatch.setattr("os.system", start)
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    for data in (
        postscript,
        b"\xc5\xd0\xd3\xc6" + struct.pack("<6I", 30, len(postscript), 0, 0, 0, 0) + postscript,
    ):
        with pytest.raises(ImageError, match="PostScript"):
            decode_image(data, "picture.jpg")
        with pytest.raises(ImageError):
            decode_image(bytes(3) + data, "picture.tga")


def test_tga_is_opened_by_its_suffix_alone() -> None:
    data = encode(smooth_image(), "TGA")
    np.testing.assert_array_equal(decode(data, "a/b.TGA"), np.asarray(smooth_image()))
    with pytest.raises(ImageError, match=r"b\.png: cannot be decoded \(cannot identify"):
        decode_image(data, "b.png")
    np.testing.assert_array_equal(decode(encode(smooth_image(), "PNG"), "b.tga"), np.asarray(smooth_image()))


def test_suffixes_are_those_of_the_formats() -> None:
    assert {".jfif", ".jpe", ".mpo", ".apng", ".pgm", ".jp2", ".avif", ".tif"} <= SUFFIXES
    assert not SUFFIXES & {".eps", ".ps", ".svg", ".pdf", ".wmf", ".fits", ".txt", ".heic"}


def test_a_jpeg_of_several_pictures_gives_the_first() -> None:
    other_image = ImageOps.invert(smooth_image())
    data = encode(smooth_image(), "MPO", save_all=True, append_images=[other_image])
    np.testing.assert_array_equal(decode(data), decode(encode(smooth_image(), "JPEG")))


# F. Good pixels beside damaged metadata

BIG = zlib.compress(bytes(2 << 20))
PNG_NOTES = {
    "zTXt of 2 MB": chunk(b"zTXt", b"Comment\0\0" + BIG),
    "iTXt of 2 MB": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + BIG),
    "iCCP of 2 MB": chunk(b"iCCP", b"profile\0\0" + BIG),
    "zTXt of an unknown method": chunk(b"zTXt", b"Comment\0\7xyz"),
    "iCCP of an unknown method": chunk(b"iCCP", b"profile\0\7xyz"),
    "iCCP without a name": chunk(b"iCCP", b""),
    "iCCP that is cut off": chunk(b"iCCP", b"profile\0\0" + BIG[:20]),
    "text of a wrong checksum": chunk(b"tEXt", b"Title\0x", crc=1),
    "pHYs of a wrong checksum": chunk(b"pHYs", struct.pack(">IIB", 1, 1, 1), crc=1),
    "pHYs that is short": chunk(b"pHYs", b"\0\0"),
    "gAMA that is short": chunk(b"gAMA", b"\1"),
    "cHRM that is short": chunk(b"cHRM", b"\1\2"),
    "sRGB that is empty": chunk(b"sRGB"),
    "EXIF of zeros": chunk(b"eXIf", bytes(50)),
    "EXIF that is text": chunk(b"eXIf", b"no directory at all"),
    "EXIF of a wrong checksum": chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\0", crc=1),
    "EXIF as text that is not hexadecimal": chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 4\nzz"),
    "animation control that is short": chunk(b"acTL", b"\0"),
    "frame control that is short": chunk(b"fcTL", b"\0"),
    "frame control out of order": chunk(b"fcTL", struct.pack(">IIIIIHHBB", 5, 1, 1, 0, 0, 1, 1, 0, 0)),
    "a name of a chunk that is none": chunk(b"\0\1\2\3", b"abc"),
    "a chunk of a wrong length": chunk(b"tEXt", b"Title\0x", length=3),
    "a chunk as long as the file": chunk(b"tEXt", b"Title\0x", length=100_000),
    "bytes of no chunk": b"some bytes that are no chunk",
    "many texts": chunk(b"tEXt", b"a\0" + bytes(1 << 20)) * 65,
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("behind", [False, True], ids=["in front", "behind"])
@pytest.mark.parametrize("note", PNG_NOTES.values(), ids=PNG_NOTES.keys())
def test_pixels_of_a_png_with_damaged_or_large_notes(note: bytes, behind: bool) -> None:
    np.testing.assert_array_equal(decode(png_with(note, behind=behind)), np.asarray(smooth_image()))


@pytest.mark.parametrize(
    "note",
    [
        "zTXt of 2 MB",
        "iCCP of 2 MB",
        "text of a wrong checksum",
        "a chunk of a wrong length",
        "gAMA that is short",
    ],
)
def test_a_good_orientation_is_applied_beside_damaged_notes(note: str) -> None:
    data = png_with(PNG_NOTES[note], exif=exif_with(6))
    expected_image = smooth_image().transpose(Image.Transpose.ROTATE_270)
    np.testing.assert_array_equal(decode(data), np.asarray(expected_image))


def test_transparency_of_a_png_stays_beside_damaged_notes() -> None:
    rows = b"\0\0\1" + b"\0\1\0"
    palette = chunk(b"PLTE", bytes([200, 0, 0, 0, 0, 200]))
    transparency = chunk(b"tRNS", bytes([0, 255]))
    data = png(2, 2, 8, 3, rows, palette, transparency, PNG_NOTES["zTXt of 2 MB"])
    assert decode(data).tolist() == [[[255] * 3, [0, 0, 200]], [[0, 0, 200], [255] * 3]]
    damaged_transparency = chunk(b"tRNS", bytes([0, 255]), crc=1)
    with pytest.raises(ImageError, match="tRNS"):
        decode(png(2, 2, 8, 3, rows, palette, damaged_transparency))


def test_an_image_within_a_damaged_chunk_is_not_taken_for_the_image() -> None:
    inner = encode(Image.new("RGB", (4, 4), "red"), "PNG")
    data = png_with(chunk(b"teXt", inner), chunk(b"gAMA", b"\1"))
    np.testing.assert_array_equal(decode(data), np.asarray(smooth_image()))
    damaged_exif = segment(0xE1, b"Exif\0\0" + encode(Image.new("RGB", (16, 16), "red"), "JPEG"), length=8)
    try:
        pixels = decode(jpeg_with(damaged_exif))
    except ImageError:
        return
    np.testing.assert_array_equal(pixels, decode(jpeg_with()))


@pytest.mark.parametrize("cut", [13, 20, 100, 400])
def test_cut_pixels_of_a_png_are_refused(cut: int) -> None:
    noise = Image.fromarray(RNG.integers(0, 255, (32, 32, 3), np.uint8))
    data = encode(noise, "PNG")
    with pytest.raises(ImageError, match="cannot be decoded"):
        decode(data[: -12 - cut])
    place = data.index(b"IDAT") - 4
    with pytest.raises(ImageError, match="cannot be decoded"):
        decode((data[:place] + PNG_NOTES["zTXt of 2 MB"] + data[place:])[: -12 - cut])


JPEG_NOTES = {
    "EXIF of zeros": segment(0xE1, b"Exif\0\0" + bytes(40)),
    "EXIF that is text": segment(0xE1, b"Exif\0\0no directory"),
    "EXIF of a directory outside": segment(0xE1, b"Exif\0\0MM\0*\xff\xff\xff\xff"),
    "EXIF of many entries": segment(0xE1, b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12" * 200),
    "EXIF that is empty": segment(0xE1, b"Exif\0\0"),
    "profile of too few parts": segment(0xE2, b"ICC_PROFILE\0\1\7abc"),
    "profile without a number": segment(0xE2, b"ICC_PROFILE\0"),
    "several pictures, damaged": segment(0xE2, b"MPF\0II*\0\x08\0\0\0\1\0" + bytes(12)),
    "several pictures, none": segment(0xE2, b"MPF\0no directory"),
    "resources that are cut off": segment(0xED, b"Photoshop 3.0\x008BIM\3\xed\0"),
    "resources of a wrong size": segment(0xED, b"Photoshop 3.0\x008BIM\3\xed\0\0\xff\xff\xff\xff"),
    "JFIF that is cut off": segment(0xE0, b"JFIF\0"),
    "Adobe that is cut off": segment(0xEE, b"Adobe"),
    "a comment of 64 KB": segment(0xFE, bytes(65_000)),
    "a note shorter than its length": segment(0xE3, b"abc", length=0),
    "a note of length 1": segment(0xE5, b"abc", length=1),
    "bytes between segments": segment(0xFE, b"a comment") + b"no segment",
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("note", JPEG_NOTES.values(), ids=JPEG_NOTES.keys())
def test_pixels_of_a_jpeg_with_damaged_notes(note: bytes) -> None:
    expected_pixels = decode(jpeg_with())
    np.testing.assert_array_equal(decode(jpeg_with(note)), expected_pixels)
    np.testing.assert_array_equal(decode(jpeg_with(note)[:-2]), expected_pixels)
    np.testing.assert_array_equal(decode(jpeg_with(note) + b"something behind the end"), expected_pixels)


def test_a_good_orientation_of_a_jpeg_is_applied_beside_damaged_notes() -> None:
    expected_pixels = np.rot90(decode(jpeg_with()), -1)
    for note in (JPEG_NOTES["several pictures, damaged"], JPEG_NOTES["a note of length 1"]):
        np.testing.assert_array_equal(decode(jpeg_with(note, exif=exif_with(6))), expected_pixels)


JPEG_KINDS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 3},
    "progressive, restarts": {"progressive": True, "restart_marker_rows": 1},
    "full chroma": {"subsampling": 0, "quality": 97},
}


@pytest.mark.parametrize("options", JPEG_KINDS.values(), ids=JPEG_KINDS.keys())
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_without_its_end_mark_is_used_and_one_without_pixels_is_not(
    options: dict[str, Any], mode: str
) -> None:
    data = encode(smooth_image(130, 70).convert(mode), "JPEG", **options)
    pixels = decode(data)
    for cut in (1, 2):
        np.testing.assert_array_equal(decode(data[:-cut]), pixels)
    np.testing.assert_array_equal(decode(data[:-2] + b"and a page of html"), pixels)
    lengths = [len(data) - 4, *RNG.integers(len(data) // 3, len(data) - 4, 20).tolist()]
    # Also where a decoder may begin anew.
    marks = [
        m
        for m in range(data.index(b"\xff\xda"), len(data) - 2)
        if data[m] == 0xFF and 0xC0 < data[m + 1] < 0xDD
    ]
    lengths += [mark + end for mark in marks[-6:] for end in (0, 2)]
    refusals = 0
    for length in lengths:
        try:  # what is missing may be bits that change nothing
            np.testing.assert_array_equal(decode(data[:length]), pixels)
        except ImageError:
            refusals += 1
    assert refusals > len(lengths) / 2


def test_a_plain_image_without_its_last_blocks_is_refused() -> None:
    data = encode(Image.new("RGB", (256, 256), "white"), "JPEG")
    decode(data[:-2])
    with pytest.raises(ImageError, match="truncated"):
        decode(data[:-8])


WEBP_NOTES: dict[str, tuple[int, list[tuple[bytes, bytes]]]] = {
    "EXIF of zeros": (0x08, [(b"EXIF", bytes(40))]),
    "EXIF that is text": (0x08, [(b"EXIF", b"Exif\0\0nothing")]),
    "EXIF of 2 MB": (0x08, [(b"EXIF", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(2 << 20))]),
    "a profile of 2 MB": (0x20, [(b"ICCP", bytes(2 << 20))]),
    "a profile that is said and missing": (0x20, []),
    "XMP of zeros": (0x04, [(b"XMP ", bytes(41))]),
    "chunks of unknown names": (0, [(b"ABCD", b"abc"), (b"\0\0\0\0", b"")]),
}


@pytest.mark.parametrize("note", WEBP_NOTES.values(), ids=WEBP_NOTES.keys())
def test_pixels_of_a_webp_with_damaged_notes(note: tuple[int, list[tuple[bytes, bytes]]]) -> None:
    flags, chunks = note
    np.testing.assert_array_equal(decode(webp_with(*chunks, flags=flags)), np.asarray(smooth_image()))


def test_a_webp_that_is_cut_within_its_notes_is_used() -> None:
    data = webp_with((b"EXIF", bytes(1000)), flags=0x08)
    np.testing.assert_array_equal(decode(data[:-500]), np.asarray(smooth_image()))
    plain_data = encode(smooth_image(), "WEBP", lossless=True)
    with pytest.raises(ImageError, match="cannot be decoded"):
        decode(plain_data[:-10])
    with pytest.raises(ImageError, match="cannot be decoded"):
        decode(data[:100])


TIFF_NOTES: dict[str, dict[str, Any]] = {
    "a directory of EXIF outside of the file": {"t34665": (60000,)},
    "a directory of GPS outside of the file": {"t34853": (60000,)},
    "a profile of zeros": {"t34675": bytes(100)},
    "XMP of zeros": {"t700": bytes(100)},
    "a description that is no text": {"t270": b"\xff\xfe\xfd"},
    "resources that are cut off": {"t34377": b"8BIM\3\xed\0\0\xff\xff\xff\xff"},
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("note", TIFF_NOTES.values(), ids=TIFF_NOTES.keys())
def test_pixels_of_a_tiff_with_damaged_notes(note: dict[str, Any], order: str) -> None:
    pixels = np.asarray(smooth_image())
    np.testing.assert_array_equal(decode(tiff(pixels, order, **note)), pixels)
    turned_pixels = decode(tiff(pixels, order, t274=6, **note))
    np.testing.assert_array_equal(turned_pixels, np.rot90(pixels, -1))
    # An entry whose value is outside of the file.
    data = bytearray(tiff(pixels, order, t270=b"a long description"))
    place = data.index(struct.pack(order + "HH", 270, 1))
    data[place + 8 : place + 12] = b"\x7f\xff\xff\xff"
    np.testing.assert_array_equal(decode(bytes(data)), pixels)


def test_pixels_of_a_gif_with_damaged_extensions() -> None:
    palette_image = smooth_image().quantize(16)
    data = encode(palette_image, "GIF")
    pixels = decode(data)
    place = 13 + 3 * (2 << (data[10] & 7))
    for extension in (
        b"\x21\xfe\x05hello\x00",
        b"\x21\xff\x0bNETSCAPE2.0\x01\x01\x00",
        b"\x21\xff\x0bNETSCAPE2.0\x00",
        b"\x21\xff\x03abc\x00",
        b"\x21\xf9\x01\x00\x00",
        b"\x21\xf9\x00",
        b"\x21\xab" + (b"\xff" + bytes(255)) * 300 + b"\0",
    ):
        np.testing.assert_array_equal(decode(data[:place] + extension + data[place:]), pixels)
    np.testing.assert_array_equal(decode(data[:-1]), pixels)  # without its end mark


def test_bombs_of_pixels_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    for format in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"):
        with pytest.raises(
            ImageError, match=r"a\.img: cannot be decoded \(.*1536 pixels.* exceeds limit of 1000"
        ):
            decode_image(encode(smooth_image(), format), "a.img")
    with pytest.raises(ImageError, match="exceeds limit"):
        decode_image(png_with(PNG_NOTES["gAMA that is short"]), "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with pytest.raises(ImageError, match=r"a\.png: cannot be decoded \(.*600 pixels.* exceeds limit"):
            decode_image(encode(smooth_image(30, 20), "PNG"), "a.png")


def test_pillows_settings_stay_as_they_are_while_threads_decode() -> None:
    faults: list[object] = []

    def work() -> None:
        for _ in range(20):
            if not np.array_equal(decode(png_with(PNG_NOTES["zTXt of 2 MB"])), np.asarray(smooth_image())):
                faults.append("pixels")
            if PngImagePlugin.MAX_TEXT_CHUNK != 1 << 20 or TiffImagePlugin.ImageFile.LOAD_TRUNCATED_IMAGES:
                faults.append("settings")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


# G. Levels, colours, transparency: pixel values by hand

LEVELS = np.array([[0, 1, 128, 257], [4095, 32768, 65278, 65535]], np.uint16)
SCALED_LEVELS = np.round(LEVELS / 257).astype(np.uint8)


def grey(levels: Any) -> np.ndarray:
    return np.repeat(np.asarray(levels, np.uint8)[..., None], 3, axis=-1)


def rows_of(pixels: np.ndarray) -> bytes:
    return b"".join(b"\0" + row.tobytes() for row in pixels)


def pack_12_bits(levels: np.ndarray) -> np.ndarray:
    bits = (levels[..., None] >> np.arange(11, -1, -1)) & 1
    return np.packbits(bits.reshape(len(levels), -1).astype(np.uint8), axis=1)


BYTES = np.array([[0, 1, 128], [200, 254, 255]], np.uint8)
TWELVE_BITS = np.array([[0, 2048], [16, 4095]], np.uint16)
SIXTEEN_BIT_COLOURS = np.array([[[0, 32768, 65535], [256, 512, 65535]]], np.uint16)
PIXELS: dict[str, tuple[bytes, np.ndarray]] = {
    "16-bit grey PNG": (png(4, 2, 16, 0, rows_of(LEVELS.astype(">u2"))), grey(SCALED_LEVELS)),
    "16-bit grey PNG with a transparent level": (
        png(4, 2, 16, 0, rows_of(LEVELS.astype(">u2")), chunk(b"tRNS", struct.pack(">H", 257))),
        grey(np.where(LEVELS == 257, 255, SCALED_LEVELS)),
    ),
    "8-bit grey PNG with a transparent level": (
        png(3, 2, 8, 0, rows_of(BYTES), chunk(b"tRNS", struct.pack(">H", 1))),
        grey(np.where(BYTES == 1, 255, BYTES)),
    ),
    "2-bit grey PNG with a transparent level": (
        png(4, 1, 2, 0, b"\0\x1b", chunk(b"tRNS", struct.pack(">H", 1))),
        grey([[0, 255, 170, 255]]),
    ),
    "4-bit grey PNG with a transparent level": (
        png(2, 1, 4, 0, b"\0\x3c", chunk(b"tRNS", struct.pack(">H", 12))),
        grey([[51, 255]]),
    ),
    "1-bit grey PNG with a transparent level": (
        png(4, 1, 1, 0, b"\0\x50", chunk(b"tRNS", struct.pack(">H", 0))),
        grey([[255, 255, 255, 255]]),
    ),
    "8-bit colours with a transparent one": (
        png(2, 1, 8, 2, b"\0\1\2\3\4\5\6", chunk(b"tRNS", struct.pack(">3H", 1, 2, 3))),
        np.array([[[255, 255, 255], [4, 5, 6]]], np.uint8),
    ),
    "16-bit colours": (
        png(2, 1, 16, 2, rows_of(SIXTEEN_BIT_COLOURS.astype(">u2"))),
        (SIXTEEN_BIT_COLOURS >> 8).astype(np.uint8),
    ),
    "16-bit colours without the transparent one": (
        png(
            2,
            1,
            16,
            2,
            rows_of(SIXTEEN_BIT_COLOURS.astype(">u2")),
            chunk(b"tRNS", struct.pack(">3H", 9, 9, 9000)),
        ),
        (SIXTEEN_BIT_COLOURS >> 8).astype(np.uint8),
    ),
    "16-bit grey PNG with alpha": (
        png(2, 1, 16, 4, rows_of(np.array([[[0x8000, 0xFFFF], [0x8000, 0]]], ">u2"))),
        grey([[128, 255]]),
    ),
    "palette of alphas": (
        png(
            2, 1, 8, 3, b"\0\0\1", chunk(b"PLTE", bytes([200, 0, 0, 0, 0, 200])), chunk(b"tRNS", b"\x80\xff")
        ),
        np.array([[[227, 127, 127], [0, 0, 200]]], np.uint8),
    ),
    "16-bit PGM": (b"P5 4 2 65535\n" + LEVELS.astype(">u2").tobytes(), grey(SCALED_LEVELS)),
    "PGM up to 1000": (b"P2 3 1 1000\n0 500 1000\n", grey([[0, 127, 255]])),
    "PGM up to 15": (b"P2 2 1 15\n0 15\n", grey([[0, 255]])),
    "PBM": (b"P1 2 1\n0 1\n", grey([[255, 0]])),
    "8-bit TIFF": (tiff(BYTES), grey(BYTES)),
    "8-bit TIFF, white is 0": (tiff(BYTES, t262=0), grey(255 - BYTES)),
    "16-bit TIFF": (tiff(LEVELS), grey(SCALED_LEVELS)),
    "16-bit TIFF, big-endian": (tiff(LEVELS, ">"), grey(SCALED_LEVELS)),
    "16-bit TIFF, white is 0": (tiff(LEVELS, t262=0), grey(255 - SCALED_LEVELS)),
    "12-bit TIFF": (
        tiff(pack_12_bits(TWELVE_BITS), t256=2, t258=12),
        grey(np.round(TWELVE_BITS / 4095 * 255)),
    ),
    "16-bit colours, TIFF": (tiff(SIXTEEN_BIT_COLOURS), (SIXTEEN_BIT_COLOURS >> 8).astype(np.uint8)),
    "16-bit colours, TIFF, big-endian": (
        tiff(SIXTEEN_BIT_COLOURS, ">"),
        (SIXTEEN_BIT_COLOURS >> 8).astype(np.uint8),
    ),
    "grey with alpha, TIFF": (
        tiff(np.array([[[100, 255], [100, 0]]], np.uint8), t262=1, t338=2),
        grey([[100, 255]]),
    ),
    "grey multiplied by alpha, TIFF": (
        tiff(np.array([[[100, 255], [50, 128], [0, 0]]], np.uint8), t262=1, t338=1),
        grey([[100, 177, 255]]),
    ),
    "colours multiplied by alpha, TIFF": (
        tiff(np.array([[[100, 0, 0, 255], [64, 0, 0, 128]]], np.uint8), t338=1),
        np.array([[[100, 0, 0], [191, 127, 127]]], np.uint8),
    ),
    "CMYK, TIFF": (
        tiff(np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 0, 0, 255]]], np.uint8), t262=5),
        np.array([[[255, 255, 255], [0, 255, 255], [0, 0, 0]]], np.uint8),
    ),
}


@pytest.mark.parametrize(("data", "pixels"), PIXELS.values(), ids=PIXELS.keys())
def test_pixels_are_those_of_an_independent_reading(data: bytes, pixels: np.ndarray) -> None:
    decoded_pixels = decode(data).astype(int)
    assert decoded_pixels.shape == pixels.shape
    assert np.abs(decoded_pixels - pixels).max() <= 1, (decoded_pixels.tolist(), pixels.tolist())


REFUSALS = {
    "32-bit TIFF of 0 to 255": (tiff(BYTES.astype(np.uint32)), "32-bit integers, whose range"),
    "signed 32-bit TIFF": (tiff(BYTES.astype(np.int32), t339=2), "signed integers, whose range"),
    "signed 16-bit TIFF": (tiff(BYTES.astype(np.int16), t339=2), "signed integers, whose range"),
    "signed 16-bit TIFF, big-endian": (tiff(BYTES.astype(np.int16), ">", t339=2), "signed integers"),
    "signed 8-bit TIFF": (tiff(BYTES.astype(np.int8), t339=2), "signed integers"),
    "floating point TIFF": (tiff(BYTES.astype(np.float32), t339=3), "floating-point"),
    "PFM": (b"Pf\n1 1\n-1.0\n" + struct.pack("<f", 0.5), "floating-point"),
    "16-bit TIFF, white is 0, big-endian": (
        tiff(LEVELS, ">", t262=0),
        "TIFF of a kind that Pillow does not read",
    ),
    "64-bit TIFF": (tiff(BYTES.astype(np.uint64)), "TIFF of a kind that Pillow does not read"),
    "16-bit grey TIFF with alpha": (
        tiff(np.zeros((2, 2, 2), np.uint16), t262=1, t338=2),
        "TIFF of a kind that Pillow does not read",
    ),
    "thumbnail in front, as in a camera's raw file": (tiff(BYTES, t254=1), "thumbnail"),
    "CIELAB": (tiff(np.zeros((2, 2, 3), np.uint8), t262=8), "CIELAB"),
    "16-bit colours one of which is transparent": (
        png(
            2,
            1,
            16,
            2,
            rows_of(SIXTEEN_BIT_COLOURS.astype(">u2")),
            chunk(b"tRNS", struct.pack(">3H", 1, 32769, 65535)),
        ),
        "16-bit colours one of which is transparent",
    ),
    "12-bit JPEG": (jpeg_with().replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"), "12-bit"),
}


@pytest.mark.parametrize(("data", "reason"), REFUSALS.values(), ids=REFUSALS.keys())
def test_pixels_whose_meaning_nothing_says_are_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=rf"^a: cannot be decoded \(.*{reason}"):
        decode_image(data, "a")


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "YCbCr"])
def test_modes_of_tiff_are_the_same_in_all_compressions(mode: str, compression: str) -> None:
    image = Image.fromarray(LEVELS) if mode == "I;16" else smooth_image().convert(mode)
    if mode == "YCbCr" and compression != "raw":
        return  # Pillow writes such files so that no reader agrees with it
    expected_pixels = grey(SCALED_LEVELS) if mode == "I;16" else np.asarray(image.convert("RGB")).astype(int)
    pixels = decode(encode(image, "TIFF", compression=compression)).astype(int)
    assert np.abs(pixels - expected_pixels).max() <= 1


def test_the_first_page_of_a_tiff_and_the_largest_picture_of_an_icon_are_taken() -> None:
    pages = [smooth_image(), ImageOps.invert(smooth_image())]
    data = encode(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    np.testing.assert_array_equal(decode(data), np.asarray(pages[0]))
    icon = smooth_image(64, 64)
    pixels = decode(encode(icon, "ICO", sizes=[(16, 16), (64, 64), (32, 32)]))
    np.testing.assert_array_equal(pixels, np.asarray(icon))


def test_colours_of_cmyk_jpegs_are_adobes() -> None:
    image = Image.fromarray(np.full((16, 16, 3), (200, 60, 20), np.uint8)).convert("CMYK")
    assert np.abs(decode(encode(image, "JPEG", quality=95)).astype(int) - (200, 60, 20)).max() < 6


PIL_MODES = ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LA", "La", "RGBa", "PA", "RGBX"]


@pytest.mark.parametrize("mode", PIL_MODES)
def test_every_mode_of_pil_is_upright_rgb(mode: str) -> None:
    image = smooth_image()
    if mode in ("La", "PA"):
        image = image.convert("LA" if mode == "La" else "P")
    elif mode == "RGBa":
        image = image.convert("RGBA")
    rgb_image = to_rgb(image.convert(mode))
    assert rgb_image.mode == "RGB"
    expected_image = smooth_image().convert(
        {"L": "L", "La": "L", "LA": "L", "PA": "P", "1": "1", "P": "P"}.get(mode, "RGB")
    )
    expected_pixels = np.asarray(expected_image.convert("RGB")).astype(int)
    assert np.abs(np.asarray(rgb_image).astype(int) - expected_pixels).mean() < 3


@pytest.mark.parametrize("mode", ["I", "F", "LAB"])
def test_modes_of_pil_whose_range_nothing_says_are_refused(mode: str) -> None:
    with pytest.raises(ImageError, match=r"range|CIELAB"):
        to_rgb(Image.new(mode, (4, 4)))


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
def test_16_bit_images_of_pil(mode: str) -> None:
    order = ">" if mode == "I;16B" else "<"
    image = Image.frombytes(mode, (4, 2), LEVELS.astype(order + "u2").tobytes())
    np.testing.assert_array_equal(np.asarray(to_rgb(image)), grey(SCALED_LEVELS))


def test_an_opened_file_whose_pixels_are_damaged_is_named(tmp_path: Path) -> None:
    noise = Image.fromarray(RNG.integers(0, 255, (32, 32, 3), np.uint8))
    for format in ("PNG", "JPEG"):
        path = tmp_path / f"cut.{format.lower()}"
        path.write_bytes(encode(noise, format)[:-300])
        with pytest.raises(ImageError, match=rf"cut\.{format.lower()}: cannot be decoded \("):
            to_rgb(Image.open(path))


def test_a_format_that_this_pillow_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(smooth_image(), "QOI")
    Image.init()
    monkeypatch.delitem(Image.OPEN, "QOI")
    with pytest.raises(ImageError, match=r"a\.qoi: cannot be decoded \(this Pillow does not read QOI\)"):
        decode_image(data, "a.qoi")


# EXIF


def turn_back(image: Image.Image, orientation: int) -> Image.Image:
    """The image as a camera would store it with an orientation, by numpy alone."""
    pixels = np.asarray(image)
    turns: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda p: p,
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.swapaxes(0, 1),
        6: lambda p: np.rot90(p),
        7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
        8: lambda p: np.rot90(p, -1),
    }
    return Image.fromarray(np.ascontiguousarray(turns[orientation](pixels)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_an_image_of_pil_is_turned_as_its_file_is_and_only_once(orientation: int, format: str) -> None:
    options = (
        {"lossless": True}
        if format == "WEBP"
        else {"quality": 100, "subsampling": 0}
        if format == "JPEG"
        else {}
    )
    data = encode(turn_back(smooth_image(), orientation), format, exif=exif_with(orientation), **options)
    pixels = decode(data)
    assert np.abs(pixels.astype(int) - np.asarray(smooth_image())).max() <= (8 if format == "JPEG" else 0)

    def open_image() -> Image.Image:
        return Image.open(io.BytesIO(data))

    for image in (
        open_image(),
        open_image().copy(),
        open_image().convert("RGB"),
        ImageOps.exif_transpose(open_image()),
        to_rgb(open_image()),
        decode_image(data, "x"),
    ):
        size = image.size
        for _ in range(2):  # nor does it change the image that it was given
            np.testing.assert_array_equal(np.asarray(to_rgb(image)), pixels)
            np.testing.assert_array_equal(np.asarray(to_rgb(to_rgb(image))), pixels)
        assert image.size == size or format == "TIFF"
    mode_image = open_image().convert("RGBA")
    np.testing.assert_array_equal(np.asarray(to_rgb(mode_image)), pixels)


def test_an_orientation_in_xmp_or_beside_damaged_entries_is_applied() -> None:
    xmp = b'<x tiff:Orientation="6"/>'
    data = png_with(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp))
    np.testing.assert_array_equal(decode(data), np.rot90(np.asarray(smooth_image()), -1))
    exif = bytearray(exif_with(6, Software="x" * 100).tobytes())
    place = exif.index(struct.pack(">H", ExifTags.Base.Software))
    exif[place + 8 : place + 12] = b"\x7f\xff\xff\xff"
    data = encode(smooth_image(), "PNG", exif=bytes(exif))
    np.testing.assert_array_equal(decode(data), np.rot90(np.asarray(smooth_image()), -1))


# Files


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "image.png").write_bytes(encode(smooth_image(), "PNG"))
    (tmp_path / "link.png").symlink_to("image.png")
    for name, reason in {
        "pipe.png": "not a regular file",
        "folder.png": "not a regular file",
        "zero.png": "not a regular file",
        "loop.png": "symbolic links",
        "gone.png": "No such file",
        "n\0ul.png": "null",
        "long" * 200: "too long",
    }.items():
        with pytest.raises(ImageError, match=rf"(?s)cannot be read \(.*{reason}") as fault:
            read_image(tmp_path / name)
        assert len(str(fault.value)) < 500
        assert "\0" not in str(fault.value)
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "link.png")), np.asarray(smooth_image()))
