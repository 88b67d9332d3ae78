"""What `being-vl quantizer train` sees: seeded crops of folders of images, and those that it is measured on."""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from being_vl.errors import ConfigError
from being_vl.images.decode import read_image
from being_vl.images.files import list_image_files
from being_vl.quantize.models.tiled import to_tensor

HELD_OUT = 0.05  # share of each folder's images that is never trained on, unless others are named
HELD_OUT_MOST = 128
LEAST = 16  # pixels: what SSIM and VGG16 need


class Group(NamedTuple):
    """Crops of one size.

    Args:
        pixels: (n, 3, side, side), float32, -1 to 1.
        chances: A random number of 0 to 1 for each tile, (n * tiles), raster order.
    """

    pixels: Tensor
    chances: Tensor


class Crops:
    """Seeded crops of folders of images, and whole images that are kept for measuring.

    A picture is square: `size` pixels or, where the image is smaller, the largest multiple of `tile` in it. Nothing is
    enlarged but images of less than 16 pixels.

    Args:
        folders: Of images to train on, which take turns.
        held_out: Of images to measure on; if there are none, a part of each of the others is kept for that.
        size: Side of the crops, in pixels.
        tile: Side of a tile, in pixels.
        seed: Of the choice of images and crops.

    Raises:
        ImageError: if a folder has no image, or an image can't be read.
        ConfigError: if a folder has too few.
    """

    def __init__(self, folders: Sequence[Path], held_out: Sequence[Path], size: int, tile: int, seed: int):
        self.size, self.tile, self.seed = size, tile, seed
        self.train: list[list[Path]] = []
        self.held_out = {str(folder): _images(folder) for folder in held_out}
        for folder in folders:
            paths = _images(folder)
            if not held_out:
                if len(paths) < 2:
                    raise ConfigError(
                        f"{folder}: has one image; expected at least 2, one of them to be held out"
                    )
                order = np.random.default_rng([seed, 0]).permutation(len(paths))
                count = min(HELD_OUT_MOST, max(1, round(HELD_OUT * len(paths))))
                self.held_out[str(folder)] = [paths[i] for i in order[:count]]
                paths = [paths[i] for i in order[count:]]
            self.train.append(paths)
        self._shrunk = lru_cache(4096)(self._read)

    def draw(self, folder: int, rng: np.random.Generator) -> Tensor:
        """A random crop (3, side, side) of a random image, flipped every other time.

        Its side in the image is anything from `size` (or the image's shorter side, if that is less) to the
        image's shorter side.
        """
        paths = self.train[folder]
        image = self._shrunk(paths[rng.integers(len(paths))])
        most = min(image.size)
        side = round(math.exp(rng.uniform(math.log(min(self.size, most)), math.log(most))))
        left = int(rng.integers(image.width - side + 1))
        top = int(rng.integers(image.height - side + 1))
        pixels = self._cut(image, left, top, side)
        return pixels.flip(2) if rng.random() < 0.5 else pixels

    def step(self, seeds: Sequence[int], numbers: range, count: int) -> list[Group]:
        """Crops `numbers` of the `count` that the seeds give, by size; each follows from seeds and number alone.

        The folders' crops come one folder after the other.
        """
        by_side: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for number in numbers:
            rng = np.random.default_rng([self.seed, *seeds, number])
            pixels = self.draw(number * len(self.train) // count, rng)
            side = pixels.shape[-1]
            chances = torch.from_numpy(rng.random((side // self.tile) ** 2))
            by_side.setdefault(side, []).append((pixels, chances))
        return [
            Group(torch.stack([pixels for pixels, _ in crops]), torch.cat([chances for _, chances in crops]))
            for _, crops in sorted(by_side.items())
        ]

    def whole(self, paths: Sequence[Path]) -> Iterator[Tensor]:
        """The middle squares (1, 3, side, side) of images, of the whole shorter side."""
        for path in paths:
            image = self._read(path)
            side = min(image.size)
            yield self._cut(image, (image.width - side) // 2, (image.height - side) // 2, side)[None]

    def _read(self, path: Path) -> Image.Image:
        """An image, shrunk to four times the crop's size if its shorter side is longer than that."""
        image = read_image(path)
        scale = 4 * self.size / min(image.size)
        if scale >= 1:
            return image
        size = round(image.width * scale), round(image.height * scale)
        return image.resize(size, Image.Resampling.BICUBIC)

    def _cut(self, image: Image.Image, left: int, top: int, side: int) -> Tensor:
        least = math.ceil(LEAST / self.tile) * self.tile
        to = max(least, min(self.size, side) // self.tile * self.tile)
        box = (left, top, left + side, top + side)
        return to_tensor(np.array(image.resize((to, to), Image.Resampling.BICUBIC, box))[None])[0]


class Steps(Dataset[list[Group]]):
    """The crops of each step, for one of several processes.

    Args:
        crops: Where they come from.
        count: Crops per step, of all processes together.
        rank: This process, from 0.
        ranks: How many there are.
    """

    def __init__(self, crops: Crops, count: int, rank: int = 0, ranks: int = 1) -> None:
        self.crops, self.count = crops, count
        self.numbers = range(rank, count, ranks)

    def __getitem__(self, step: int) -> list[Group]:
        """This process's crops of a step."""
        return self.crops.step((1, step), self.numbers, self.count)

    def batches(self, steps: range, workers: int) -> Iterator[list[Group]]:
        """Those of several steps, made ahead by `workers` processes if there are any."""
        loader: DataLoader[list[Group]] = DataLoader(
            self, batch_size=None, sampler=steps, num_workers=workers, persistent_workers=False
        )
        return iter(loader)


def _images(folder: Path) -> list[Path]:
    return [folder / key for key in list_image_files(folder)]
