"""Decoding images, whatever their format, to plain RGB."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from being_vl.errors import ImageError
from being_vl.options import StrPath


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decode the bytes of an image file to upright RGB.

    The EXIF orientation is applied, transparency is composited on white, palettes and grey levels become RGB,
    16-bit grey levels are scaled to 8 bits. Of an animation the first frame is taken.

    Args:
        data: The file's bytes.
        name: What to call the file in an error.

    Raises:
        ImageError: if the bytes are no image, are cut off, or the image is too large to be decoded safely.
    """
    try:
        with Image.open(io.BytesIO(data)) as file:
            file.load()
            return to_rgb(ImageOps.exif_transpose(file))
    except UnidentifiedImageError as error:  # Pillow names the buffer, not the file
        raise ImageError(f"{name}: cannot be decoded (cannot identify the kind of image)") from error
    except Exception as error:  # decoders raise all kinds on damaged files
        raise ImageError(f"{name}: cannot be decoded ({str(error) or type(error).__name__})") from error


def read_image(path: StrPath) -> Image.Image:
    """Read one image file; see `decode_image`.

    Raises:
        ImageError: if the file is missing or cannot be decoded.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror})") from None
    return decode_image(data, str(path))


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` of any mode as RGB, transparent parts on white.

    Raises:
        ImageError: if its pixels are floating-point numbers, or integers outside 16 bits.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F":
        raise ImageError("floating-point pixels, whose range the file does not say")
    if image.mode.startswith("I"):  # 16 bits; Pillow would clip at 255 instead of scaling
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise ImageError(f"pixels from {levels.min()} to {levels.max()}; expected at most 16 bits")
        return Image.fromarray(((levels + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(background, image).convert("RGB")
    return image.convert("RGB")


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
