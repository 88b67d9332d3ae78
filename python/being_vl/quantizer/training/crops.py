"""What `being-vl quantizer train` sees: seeded crops of folders of images, and the images that it is measured on."""

import logging
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from being_vl.errors import ConfigError, ImageError
from being_vl.fingerprints import compute_fingerprint
from being_vl.images.decode import decode_image
from being_vl.images.encoded import ImageSource, NoImageError
from being_vl.images.sources import find_images
from being_vl.names import show_name
from being_vl.options import StrPath
from being_vl.quantizer.models.tiled import to_tensor
from being_vl.shards.ranks import rank_and_world_size

log = logging.getLogger(__name__)

HELD_OUT_SHARE = 0.05
"""Share of each folder's images that is never trained on, unless others are named for measuring."""
MAX_HELD_OUT = 128
MAX_DRAWS = 1000
"""Rows without an image that are drawn one after the other, at most."""
MIN_SIDE = 16
"""Least side of a crop, in pixels: what SSIM and VGG16 need."""


class CropBatch(NamedTuple):
    """Crops of one size.

    Args:
        pixels: (n, 3, side, side), float32, -1 to 1.
        chances: A random number of 0 to 1 for each tile, (n * tiles), raster order.
    """

    pixels: Tensor
    chances: Tensor


class Crops:
    """Seeded crops of folders of images, and whole images that are kept for measuring.

    A crop is square: `size` pixels or, where the image is smaller, the largest multiple of `tile` in it. Nothing is
    enlarged but images of less than 16 pixels.

    Args:
        folders: Of images to train on, which take turns; or what else `find_images` takes.
        held_out_folders: Of images to measure on; if there are none, a part of each of the others is kept for that.
        size: Side of the crops, in pixels.
        tile: Side of a tile, in pixels.
        seed: Of the choice of images and crops.

    Raises:
        ImageError: if a folder has no image, or an image can't be read.
        ConfigError: if a folder has too few.
    """

    def __init__(
        self,
        folders: Sequence[StrPath],
        held_out_folders: Sequence[StrPath],
        size: int,
        tile: int,
        seed: int,
    ) -> None:
        self.size, self.tile, self.seed = size, tile, seed
        self.training_images: list[list[ImageSource]] = []
        self.held_out_images = {str(folder): _find_images(folder) for folder in held_out_folders}
        for folder in folders:
            images = _find_images(folder)
            if not held_out_folders:
                if len(images) < 2:
                    raise ConfigError(
                        f"{folder}: has one image; expected at least 2, one of them to be held out"
                    )
                order = np.random.default_rng([seed, 0]).permutation(len(images))
                count = min(MAX_HELD_OUT, max(1, round(HELD_OUT_SHARE * len(images))))
                self.held_out_images[str(folder)] = [images[i] for i in order[:count]]
                images = [images[i] for i in order[count:]]
            self.training_images.append(images)
        self._read_from_cache = lru_cache(4096)(self._read_for_training)

    def draw(self, folder: int, rng: np.random.Generator) -> Tensor:
        """A random crop (3, side, side) of a random image, flipped every other time.

        Its side in the image is anything from `size` (or the image's shorter side, if that is less) to the
        image's shorter side.
        """
        # The image, then the crop's side (by its logarithm, evenly), then its place.
        image = self._draw_image(folder, rng)
        max_side = min(image.size)
        side = round(math.exp(rng.uniform(math.log(min(self.size, max_side)), math.log(max_side))))
        left = int(rng.integers(image.width - side + 1))
        top = int(rng.integers(image.height - side + 1))
        pixels = self._cut(image, left, top, side)
        return pixels.flip(2) if rng.random() < 0.5 else pixels

    def draw_step(self, seeds: Sequence[int], numbers: range, count: int) -> list[CropBatch]:
        """Crops `numbers` of the `count` that the seeds give, by size; each follows from seeds and number alone.

        The folders' crops come one folder after the other.
        """
        crops_by_side: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for number in numbers:
            rng = np.random.default_rng([self.seed, *seeds, number])
            pixels = self.draw(number * len(self.training_images) // count, rng)
            side = pixels.shape[-1]
            chances = torch.from_numpy(rng.random((side // self.tile) ** 2))
            crops_by_side.setdefault(side, []).append((pixels, chances))
        return [
            CropBatch(
                torch.stack([pixels for pixels, _ in crops]), torch.cat([chances for _, chances in crops])
            )
            for _, crops in sorted(crops_by_side.items())
        ]

    def middle_squares(self, images: Sequence[ImageSource]) -> Iterator[Tensor]:
        """The middle squares (1, 3, side, side) of images, of the whole shorter side."""
        for source in images:
            try:
                image = self._read(source)
            except NoImageError:
                continue
            side = min(image.size)
            yield self._cut(image, (image.width - side) // 2, (image.height - side) // 2, side)[None]

    def _draw_image(self, folder: int, rng: np.random.Generator) -> Image.Image:
        """A random image; rows of tables without one are drawn again."""
        for _ in range(MAX_DRAWS):
            try:
                return self._read_from_cache(folder, int(rng.integers(len(self.training_images[folder]))))
            except NoImageError:
                continue
        raise ImageError(f"none of {MAX_DRAWS} rows that were drawn has an image; take out those without one")

    def _read_for_training(self, folder: int, number: int) -> Image.Image:
        return self._read(self.training_images[folder][number])

    def _read(self, source: ImageSource) -> Image.Image:
        """An image, shrunk to four times the crop's size if its shorter side is longer than that."""
        image = _read_image(source)
        scale = 4 * self.size / min(image.size)
        if scale >= 1:
            return image
        size = round(image.width * scale), round(image.height * scale)
        return image.resize(size, Image.Resampling.BICUBIC)

    def _cut(self, image: Image.Image, left: int, top: int, side: int) -> Tensor:
        """A square of an image as pixels (3, side, side), its side reduced to at most `size`."""
        min_side = math.ceil(MIN_SIDE / self.tile) * self.tile
        crop_side = max(min_side, min(self.size, side) // self.tile * self.tile)
        box = (left, top, left + side, top + side)
        crop = image.resize((crop_side, crop_side), Image.Resampling.BICUBIC, box)
        return to_tensor(np.array(crop)[None])[0]


class CropDataset(Dataset[list[CropBatch]]):
    """The crops of each step, for one of several ranks.

    Args:
        crops: Where they come from.
        count: Crops per step, of all ranks together.
        rank: This process, from 0.
        ranks: How many there are.
    """

    def __init__(self, crops: Crops, count: int, rank: int = 0, ranks: int = 1) -> None:
        self.crops, self.count = crops, count
        self.numbers = range(rank, count, ranks)

    def __getitem__(self, step: int) -> list[CropBatch]:
        """This rank's crops of a step."""
        return self.crops.draw_step((1, step), self.numbers, self.count)

    def iterate(self, steps: range, workers: int) -> Iterator[list[CropBatch]]:
        """The crops of several steps, one step after the other, made ahead by `workers` processes if there are any."""
        loader: DataLoader[list[CropBatch]] = DataLoader(
            self, batch_size=None, sampler=steps, num_workers=workers, persistent_workers=False
        )
        return iter(loader)


def fingerprint_folders(folders: Sequence[StrPath]) -> dict[str, str]:
    """Folder → fingerprint of the names and sizes of its images.

    Raises:
        ImageError: if a folder has no image.
    """
    return {
        str(folder): compute_fingerprint([(image.key, image.size) for image in find_images(folder).sources])
        for folder in folders
    }


def _find_images(folder: StrPath) -> list[ImageSource]:
    """The images of a folder; what is left out is logged."""
    findings = find_images(folder)
    if rank_and_world_size()[0] == 0:
        log.info("%s: %s", folder, findings.account().describe())
    return findings.sources


def _read_image(source: ImageSource) -> Image.Image:
    name = source.place if source.place.endswith(source.key) else f"{source.place}: {source.key}"
    try:
        data = source.read()
    except OSError as error:
        raise ImageError(f"{show_name(name)}: cannot be read ({error.strerror})") from None
    return decode_image(data, name)
