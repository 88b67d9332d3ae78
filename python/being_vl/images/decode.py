"""Decoding images, whatever their format, to plain RGB."""

import io
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from being_vl.errors import ImageError
from being_vl.images.files import read_file
from being_vl.images.formats import HEAD_SIZE, find_format, sniff_other_format
from being_vl.images.jpeg import append_end
from being_vl.images.metadata import strip_metadata
from being_vl.names import show_name
from being_vl.options import StrPath

_SUBFILE_TYPE = 254
_REFUSALS = (ImageError, MemoryError, Image.DecompressionBombError, Image.DecompressionBombWarning)

_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings an image upright, by its EXIF orientation."""


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decode the bytes of an image file to upright RGB.

    The EXIF orientation is applied, transparency is composited on white, palettes and grey levels become RGB,
    16-bit grey levels are scaled to 8 bits. Of an animation the first frame is taken. Metadata that is damaged or too
    large is ignored.

    Args:
        data: The file's bytes.
        name: What to call the file in an error; its suffix tells the format where the bytes do not.

    Raises:
        ImageError: if the bytes are no image of a format that is opened, are cut off, or the image is too large to be
            decoded safely.
    """
    head = data[:HEAD_SIZE]
    format = find_format(head, name)
    if format is None:
        other_format = sniff_other_format(head)
        reason = f"{other_format} is not opened" if other_format else "cannot identify the kind of image"
        raise ImageError(f"{name}: cannot be decoded ({reason})")
    fault: Exception | None = None
    for version in _versions(data, format):
        try:
            return _decode(version, format)
        except _REFUSALS as error:
            raise ImageError(f"{name}: cannot be decoded ({error or 'too large for the memory'})") from error
        except Exception as error:  # decoders raise all kinds on damaged files
            fault = fault or error
    assert fault is not None
    raise ImageError(f"{name}: cannot be decoded ({_describe_fault(fault, data, format)})") from fault


def _decode(data: bytes, format: str) -> Image.Image:
    with Image.open(io.BytesIO(data), formats=[format]) as file:
        file.load()
        if format == "PNG" and isinstance(file.info.get("transparency"), int | tuple):
            _scale_transparent_colour(file, depth=data[24])
        image = to_rgb(file)
        if image is file:
            image = file.copy()
    image.info = {}
    return image


def _versions(data: bytes, format: str) -> Iterator[bytes]:
    """A file, and what may be decoded where the one before is not: the same pixels with less metadata."""
    yield data
    stripped_data = (strip_metadata(data, format, keep_orientation) for keep_orientation in (True, False))
    for version in chain([data], stripped_data):
        if version is None:
            continue
        if version is not data:
            yield version
        if format == "JPEG" and (complete_version := append_end(version)):
            yield complete_version


def _describe_fault(error: Exception, data: bytes, format: str) -> str:
    """Why a file was not decoded."""
    if isinstance(error, UnidentifiedImageError):  # Pillow names the buffer, not the reason
        try:
            Image.OPEN[format][0](io.BytesIO(data), "")
        except Exception as fault:
            error = fault
        return f"{format} of a kind that Pillow does not read, or damaged: {error or type(error).__name__}"
    if isinstance(error, KeyError) and error.args == (format,):
        return f"this Pillow does not read {format}"
    return str(error) or type(error).__name__


def _scale_transparent_colour(file: Image.Image, depth: int) -> None:
    """Bring the transparent colour of a PNG of 2, 4 or 16 bits to the 8 bits of its decoded pixels."""
    colour = file.info["transparency"]
    if file.mode == "L" and depth < 8:
        file.info["transparency"] = colour * 255 // ((1 << depth) - 1)
    elif file.mode == "RGB" and depth == 16:
        is_near = np.all(np.asarray(file) == np.array(colour) >> 8, axis=-1)
        if is_near.any():
            raise ImageError("16-bit colours one of which is transparent; give the image an alpha channel")
        del file.info["transparency"]


def read_image(path: StrPath) -> Image.Image:
    """Read one image file; see `decode_image`.

    Raises:
        ImageError: if the file is missing, is no regular file, or cannot be decoded.
    """
    try:
        data = read_file(path)
    except (OSError, ValueError, MemoryError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or error or "too large for the memory"
        raise ImageError(f"{show_name(path)}: cannot be read ({reason})") from None
    return decode_image(data, show_name(path))


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` of any mode as upright RGB, transparent parts on white.

    Raises:
        ImageError: if its pixels are floating-point numbers or integers whose range nothing says, of colours that
            cannot be converted, or in a file that is damaged.
    """
    try:
        image.load()
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # a file that was opened and not yet read
        name = getattr(image, "filename", "") or "an image"
        raise ImageError(f"{show_name(name)}: cannot be decoded ({error})") from error
    rgb_image = _flatten(image)
    if (transposition := _find_transposition(image)) is not None:
        rgb_image = rgb_image.transpose(transposition)
    if rgb_image is not image:
        rgb_image.info = {}  # with its orientation, which is applied by now
    return rgb_image


def _find_transposition(image: Image.Image) -> Image.Transpose | None:
    """What brings an image upright; None if it is, or if its EXIF data cannot be read."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        return _TRANSPOSITIONS.get(orientation)
    except Exception:  # Pillow raises all kinds on damaged EXIF data
        return None


def _flatten(image: Image.Image) -> Image.Image:
    """`image` as RGB, transparent parts on white."""
    if image.format == "TIFF":
        _check_tiff(getattr(image, "tag_v2", {}))
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F":
        raise ImageError("floating-point pixels, whose range the file does not say")
    if image.mode.startswith("I"):
        return _reduce_levels(image).convert("RGB")
    if image.mode == "LAB":
        raise ImageError("colours of CIELAB; convert them to RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(background, image).convert("RGB")
    return image.convert("RGB")


def _check_tiff(tags: Mapping[int, Any]) -> None:
    """Raise unless the first image of a TIFF file is an image whose levels begin at 0."""
    if tags.get(_SUBFILE_TYPE, 0) & 1:
        raise ImageError("the file's first image is a thumbnail, as in a camera's raw files")
    if 2 in tags.get(TiffImagePlugin.SAMPLEFORMAT, ()):
        raise ImageError("signed integers, whose range the file does not say; convert them to 8 or 16 bits")


def _reduce_levels(image: Image.Image) -> Image.Image:
    """Grey levels of more than 8 bits as 8 bits, the transparent one white; Pillow would clip them at 255."""
    bits, is_inverted = 16, False
    tags = getattr(image, "tag_v2", None)
    if tags is not None:
        bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
        is_inverted = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    elif image.mode == "I" and image.format not in ("PNG", "PPM"):  # Pillow's mode of these for 16 bits
        bits = 32
    if bits > 16:
        raise ImageError("32-bit integers, whose range the file does not say; convert them to 8 or 16 bits")
    levels, largest = np.asarray(image).astype(np.int64), (1 << bits) - 1
    reduced_levels = (510 * levels + largest) // (2 * largest)
    if is_inverted:
        reduced_levels = 255 - reduced_levels
    if isinstance(transparent_level := image.info.get("transparency"), int):
        reduced_levels[levels == transparent_level] = 255
    return Image.fromarray(reduced_levels.astype(np.uint8))


def fit_square(
    image: Image.Image, size: int, background: tuple[int, int, int] = (255, 255, 255), min_side: int = 1
) -> Image.Image:
    """The whole image, scaled (bicubic) so that its longer side is `size`, in the middle of a plain square.

    Nothing is cropped. The proportions stay, except where the shorter side would be less than `min_side`. An image of
    `size` by `size` pixels is returned as it is. The square is of the colour `background`, RGB of 0 to 255; by default
    white.
    """
    image = to_rgb(image)
    if image.size == (size, size):
        return image
    scale = size / max(image.size)
    width, height = (max(min_side, round(side * scale)) for side in image.size)
    square = Image.new("RGB", (size, size), background)
    square.paste(
        image.resize((width, height), Image.Resampling.BICUBIC), ((size - width) // 2, (size - height) // 2)
    )
    return square
