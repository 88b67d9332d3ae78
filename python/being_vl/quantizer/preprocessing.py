"""How an image becomes what a network sees: fitting it to a size, and normalising its pixels."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self

import torch
from PIL import Image
from torch import Tensor

from being_vl.images.decode import fit_square, to_rgb

Resample = Literal["lanczos", "bicubic", "bilinear"]
MAX_ASPECT = 200
"""Largest ratio of an image's sides; a more elongated one is cut or squeezed to it, so that it fits into memory."""


@dataclass(frozen=True)
class Crop:
    """Scale the shorter side to `size` and cut the square out of the middle.

    Args:
        size: Side of the square, in pixels.
        resample: Filter.
        truncate: Round the longer side down, as transformers does, and not to the nearest.
        halve: Halve the image with a box filter while its shorter side is at least 2 `size`, as ADM and LlamaGen do.
    """

    size: int
    resample: Resample = "lanczos"
    truncate: bool = False
    halve: bool = False

    def __call__(self, image: Image.Image) -> Image.Image:
        """RGB of any size → `size` × `size`."""
        image = _cut_ends(image)
        while self.halve and min(image.size) >= 2 * self.size:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        to_integer = int if self.truncate else round
        shorter_side = min(image.size)
        width, height = (to_integer(self.size * side / shorter_side) for side in image.size)
        image = image.resize((width, height), Image.Resampling[self.resample.upper()])
        left, top = (width - self.size) // 2, (height - self.size) // 2
        return image.crop((left, top, left + self.size, top + self.size))

    def with_size(self, size: int) -> Self:
        """The same for another size."""
        return replace(self, size=size)


@dataclass(frozen=True)
class Pad:
    """Scale the longer side to `size` (bicubic) and put the whole image in the middle of a plain square.

    Args:
        size: Side of the square, in pixels.
        background: RGB, 0 to 255.
        least: The shorter side is not made shorter than this.
    """

    size: int
    background: tuple[int, int, int] = (255, 255, 255)
    least: int = 1

    def __call__(self, image: Image.Image) -> Image.Image:
        """RGB of any size → `size` × `size`."""
        return fit_square(image, self.size, self.background, self.least)

    def with_size(self, size: int) -> Self:
        """The same for another size."""
        return replace(self, size=size)


@dataclass(frozen=True)
class Area:
    """Scale the whole image (bicubic) so that both sides are multiples of `factor`; proportions stay nearly the same.

    This is what [Emu3](https://github.com/baaivision/Emu3) does, and how every quantizer gives grids that are not
    square. Images more elongated than 200:1 are made 200:1.

    Args:
        factor: Pixels per id, on a side.
        min_pixels: A smaller image is enlarged to this area or a little more.
        max_pixels: A larger one is reduced to this area or a little less.
    """

    factor: int
    min_pixels: int
    max_pixels: int

    def __call__(self, image: Image.Image) -> Image.Image:
        """RGB of any size → (width, height) in multiples of `factor`."""
        width, height = image.size
        width, height = min(width, MAX_ASPECT * height), min(height, MAX_ASPECT * width)
        # The nearest multiples of `factor`; if their area is out of range, the next ones inside it.
        sides = [round(side / self.factor) * self.factor for side in (width, height)]
        if math.prod(sides) > self.max_pixels:
            scale = math.sqrt(width * height / self.max_pixels)
            sides = [
                max(self.factor, math.floor(side / scale / self.factor) * self.factor)
                for side in (width, height)
            ]
        elif math.prod(sides) < self.min_pixels:
            scale = math.sqrt(self.min_pixels / (width * height))
            sides = [math.ceil(side * scale / self.factor) * self.factor for side in (width, height)]
        return image.resize((sides[0], sides[1]), Image.Resampling.BICUBIC)

    def with_size(self, size: int) -> Self:
        """The same for an area of about `size`² pixels."""
        return replace(self, min_pixels=size**2, max_pixels=size**2)

    @property
    def size(self) -> int:
        """Side of a square of the largest area, in pixels."""
        return math.isqrt(self.max_pixels)


KINDS: dict[str, type[Crop | Pad | Area]] = {"crop": Crop, "pad": Pad, "area": Area}
"""Ways to fit an image to a size, by their names in manifests."""


@dataclass(frozen=True)
class Preprocessing:
    """An image processor: all of its fields decide ids and are part of the quantizer's fingerprint.

    Args:
        fit: How the image is brought to its size.
        rescale_factor: Factor of pixels of 0 to 255.
        image_mean: Mean of each channel (RGB), subtracted from the rescaled pixels.
        image_std: Deviation of each channel, by which the difference is divided.
    """

    fit: Crop | Pad | Area
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def prepare(self, image: Image.Image) -> Image.Image:
        """An image of any mode as the network sees it: fitted to its size, RGB."""
        return self.fit(to_rgb(image))

    def normalise(self, pixels: Tensor) -> Tensor:
        """A prepared image as the network's input: uint8 (height, width, 3) → float32 (3, height, width)."""
        mean, std = (pixels.new_tensor(v, dtype=torch.float32) for v in (self.image_mean, self.image_std))
        # In this order, and in float64 first, as transformers does.
        return (((pixels.double() * self.rescale_factor).float() - mean) / std).permute(2, 0, 1).contiguous()

    def with_size(self, size: int | None, aspect: bool, factor: int) -> Self:
        """The same for another size or, with `aspect`, for an area of that size in the image's own proportions."""
        fit = self.fit if size is None else self.fit.with_size(size)
        if aspect and not isinstance(fit, Area):
            fit = Area(factor, fit.size**2, fit.size**2)
        return replace(self, fit=fit)

    def suits(self, factor: int) -> bool:
        """Whether the sides of prepared images are multiples of `factor`."""
        return self.fit.size > 0 and (isinstance(self.fit, Area) or self.fit.size % factor == 0)

    def to_json(self) -> dict[str, Any]:
        """All fields as a dictionary for JSON."""
        kind = next(kind for kind, cls in KINDS.items() if isinstance(self.fit, cls))
        return asdict(self) | {"fit": {"kind": kind} | asdict(self.fit)}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        fit: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in fields["fit"].items()
        }
        kind = KINDS[fit.pop("kind")]
        return cls(
            kind(**fit), fields["rescale_factor"], tuple(fields["image_mean"]), tuple(fields["image_std"])
        )

    @classmethod
    def from_manifest(cls, manifest: dict[str, Any], default: Self) -> Self:
        """The preprocessing of a quantizer that `save_pretrained` wrote, `default` for what others published."""
        return cls.from_json(manifest["preprocessing"]) if "preprocessing" in manifest else default


def _cut_ends(image: Image.Image) -> Image.Image:
    """The middle of a very elongated image, which is all that `Crop` leaves of it."""
    width, height = min(image.width, MAX_ASPECT * image.height), min(image.height, MAX_ASPECT * image.width)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height)) if (width, height) != image.size else image
