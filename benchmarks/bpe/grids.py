"""Grids for the benchmarks: of real images in any number, through a quantizer.

    python -m benchmarks.bpe.grids OUT.npy --count 20000 [--images FOLDER] [--quantizer builtin] [--seed 0]
    python -m benchmarks.bpe.grids --describe GRIDS.npy|GRIDS.npz ...

The images are the demo's photographs, unless a folder is given. Each is taken at many scales and offsets, flipped or
not, and quantised as a whole; the grids are windows of 32×32 ids of that. Since the built-in quantizer sees one tile
at a time, a window is what it would make of that crop of 256×256 pixels. The file is written through a memory map.
"""

import argparse
import math
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 32
MAPS = 256, 4096  # at least (or one for each grid), at most
GRIDS_PER_MAP = 32


def generate(path, count, images=None, quantizer="builtin", seed=0):
    """Write `count` grids (uint16) to an .npy file."""
    from being_vl.demo import shapesworld
    from being_vl.images.decode import read_image
    from being_vl.images.sources import find_images
    from being_vl.quantizer.base import load_quantizer

    rng = np.random.default_rng(seed)
    folder = images or Path(shapesworld.__file__).parent / "photographs"
    photographs = [read_image(source.place) for source in find_images(folder).sources]
    quantizer = load_quantizer(quantizer)
    grids = np.lib.format.open_memmap(path, "w+", np.uint16, (count, SIDE, SIDE))
    order = rng.permutation(count)  # or neighbours in the file would be of one image
    maps = min(count, max(MAPS[0], min(MAPS[1], count // GRIDS_PER_MAP)))
    for n, part in enumerate(np.array_split(order, maps)):
        pixels = scale_photograph(
            photographs[n % len(photographs)], SIDE * quantizer.downsample, quantizer.downsample, rng
        )
        (grid_map,) = quantizer.encode_prepared([pixels])
        for number in part:
            row, column = (int(rng.integers(side - SIDE + 1)) for side in grid_map.shape)
            grids[number] = grid_map[row : row + SIDE, column : column + SIDE]
    grids.flush()


def scale_photograph(photograph, min_side, tile, rng):
    """Pixels of a photograph at a random scale and offset, flipped every other time, in whole tiles.

    Its shorter side becomes `min_side` pixels or more: up to its own length, 2 to 4 times `min_side`.
    """
    short_side = min(photograph.size)
    max_side = min(4 * min_side, max(2 * min_side, short_side))
    scale = math.exp(rng.uniform(math.log(min_side + tile), math.log(max_side))) / short_side
    size = [math.ceil(side * scale) for side in photograph.size]
    pixels = np.asarray(photograph.resize(size, Image.Resampling.BICUBIC))[:, :: rng.choice((-1, 1))]
    top, left = rng.integers(0, tile, 2)
    height, width = (
        (side - offset) // tile * tile for side, offset in zip(pixels.shape, (top, left), strict=False)
    )
    return np.array(pixels[top : top + height, left : left + width])


def describe(grids):
    """Statistics that decide how hard grids are: entropy, and how alike neighbours are."""
    grids = grids[:: max(1, len(grids) // 20_000)]
    k = int(grids.max()) + 1

    def bits(values):
        share = np.unique(values, return_counts=True)[1] / values.size
        return float(-(share * np.log2(share)).sum())

    return {
        "grids": len(grids),
        "ids used": len(np.unique(grids)),
        "bits per id": bits(grids),
        "bits per horizontal pair": bits(grids[:, :, 1:].astype(np.int64) * k + grids[:, :, :-1]),
        "equal to the right": float((grids[:, :, 1:] == grids[:, :, :-1]).mean()),
        "equal below": float((grids[:, 1:] == grids[:, :-1]).mean()),
    }


def load(path):
    """The (N, H, W) array of an .npy file (memory-mapped), or `grids` of an .npz file."""
    if Path(path).suffix == ".npz":
        with np.load(path) as file:
            return file["grids"]
    return np.load(path, mmap_mode="r")


def worst_cases():
    """Grids that could turn something quadratic, by name: each is (grids, codebook size)."""
    row, column = np.indices((256, 256))
    return {
        "blank 256×256": (np.zeros((1, 256, 256), np.uint16), 8192),
        "striped 256×256": ((row % 2)[None].astype(np.uint16), 8192),
        "checkered 256×256": (((row + column) % 2)[None].astype(np.uint16), 8192),
        "50 blank 256×256": (np.zeros((50, 256, 256), np.uint16), 8192),
        "2,000 of uniform noise 32×32": (
            np.random.default_rng(0).integers(0, 8192, (2000, SIDE, SIDE), np.uint16),
            8192,
        ),
    }


def main():
    """Generate a file, or print the statistics of files as a markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--quantizer", default="builtin")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--describe", nargs="+", type=Path, default=[])
    arguments = parser.parse_args()
    if arguments.out is not None:
        generate(arguments.out, arguments.count, arguments.images, arguments.quantizer, arguments.seed)
    for i, path in enumerate(arguments.describe):
        statistics = describe(load(path))
        if i == 0:
            print("| | " + " | ".join(statistics) + " |\n|---" + "|---" * len(statistics) + "|")
        print(
            f"| {path.name} | "
            + " | ".join(f"{v:.4g}" if isinstance(v, float) else f"{v:,}" for v in statistics.values())
            + " |"
        )


if __name__ == "__main__":
    main()
