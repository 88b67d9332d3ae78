"""Grids for the benchmarks: from a file, made up, or generated from photographs in any number.

    python -m benchmarks.bpe.grids OUT.npy --count 1000000 [--codebook-size 8192] [--seed 0]
    python -m benchmarks.bpe.grids --describe GRIDS.npy|GRIDS.npz ...

Generated grids are crops of maps of ids. The photographs that come with scikit-image are enlarged, cut into 8×8
patches at many offsets, and every patch gets the id of the nearest codeword of a k-means codebook. A crop of 32×32
ids is then varied as another picture of such things would vary: all through one crop, each id goes to itself or to
one of the codewords nearest to it, so equal patches stay equal. The file is written through a memory map.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

SIDE = 32
PATCH = 8
PHOTOGRAPHS = [
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png"),
    *("gravel.png", "ihc.png", "motorcycle_left.png", "motorcycle_right.png", "rocket.jpg"),
]
ENLARGED = (2.1, 4.6)  # photographs are small, and large ones are mostly smooth at the scale of a patch
MAPS = 36
COMPONENTS = 16  # of a patch of 192 numbers; what else there is hardly moves the nearest codeword
NEAREST = 2


def generate(path, count, codebook_size=8192, seed=0):
    """Write `count` grids (uint16) to an .npy file, a part at a time."""
    rng = np.random.default_rng(seed)
    maps, nearest = label_maps(codebook_size, rng)
    grids = np.lib.format.open_memmap(path, "w+", np.uint16, (count, SIDE, SIDE))
    sizes = np.array([m.size for m in maps], float)
    codewords = np.arange(codebook_size, dtype=np.uint32)
    for start in range(0, count, 1024):
        part = grids[start : start + 1024]
        for grid, i in zip(part, rng.choice(len(maps), len(part), p=sizes / sizes.sum()), strict=True):
            row, column = (rng.integers(side - SIDE + 1) for side in maps[i].shape)
            crop = maps[i][row : row + SIDE, column : column + SIDE][:, :: rng.choice((-1, 1))]
            # A hash of codeword and crop decides which of the nearest codewords stands in for it here.
            mixed = (codewords * np.uint32(0x9E3779B1) ^ np.uint32(rng.integers(2**32))) * np.uint32(
                0x85EBCA6B
            )
            grid[:] = nearest[codewords, mixed >> np.uint32(31)][crop]
    grids.flush()


def label_maps(codebook_size, rng):
    """Maps of ids, and for each codeword itself and its nearest ones, (codebook_size, NEAREST)."""
    images = photographs()
    sample = np.concatenate([patches(enlarge(image, rng))[::7] for image in images])
    mean = sample.mean(0)
    _, axes = np.linalg.eigh(np.cov(sample, rowvar=False))
    axes = axes[:, -COMPONENTS:].astype(np.float32)
    points, shapes = [], []
    for i in range(MAPS):
        image = enlarge(images[i % len(images)], rng)
        shapes.append([side // PATCH for side in image.shape[:2]])
        points.append((patches(image) - mean) @ axes)
    every = np.concatenate([part[rng.choice(len(part), 3000)] for part in points])
    codebook = k_means(every, codebook_size, rng)
    maps = [assign(p, codebook).astype(np.uint16).reshape(s) for p, s in zip(points, shapes, strict=True)]
    nearest = np.concatenate(
        [
            np.argpartition(-closeness(part, codebook), NEAREST, 1)[:, :NEAREST]
            for part in np.array_split(codebook, -(-codebook_size // 1024))
        ]
    )
    return maps, nearest.astype(np.uint16)


def photographs():
    """The photographs, in colour."""
    try:
        import skimage
        from PIL import Image
    except ImportError as error:
        sys.exit(f"generating grids needs photographs: pip install scikit-image ({error})")
    folder = Path(skimage.__file__).parent / "data"
    return [Image.open(folder / name).convert("RGB") for name in PHOTOGRAPHS]


def enlarge(image, rng):
    """A photograph at a random scale, offset and tint, as floats; wider than it was, since most pictures are wide."""
    scale = rng.uniform(*ENLARGED)
    width, height = int(image.width * scale * 1.2), int(image.height * scale)
    top, left = rng.integers(0, PATCH, 2)
    pixels = np.asarray(image.resize((width, height), 3), np.float32)[top:, left:] / 255
    return pixels * rng.uniform(0.6, 1.1, 3).astype(np.float32)


def patches(image):
    """The image's patches as (n, 192), row after row."""
    height, width = (side // PATCH for side in image.shape[:2])
    cut = image[: height * PATCH, : width * PATCH].reshape(height, PATCH, width, PATCH, 3)
    return cut.transpose(0, 2, 1, 3, 4).reshape(height * width, -1)


def closeness(points, codebook):
    """Larger is nearer: minus half the squared distance, but for a number that depends on the point alone."""
    return points @ codebook.T - (codebook * codebook).sum(1) / 2


def assign(points, codebook):
    """The nearest codeword of each point."""
    parts = np.array_split(points, -(-len(points) // 512))
    return np.concatenate([closeness(part, codebook).argmax(1) for part in parts])


def k_means(points, size, rng, rounds=3):
    """A codebook by Lloyd's method; codewords that lose all points are drawn anew."""
    codebook = points[rng.choice(len(points), size, replace=False)]
    for _ in range(rounds):
        found = assign(points, codebook)
        counts = np.bincount(found, minlength=size)
        sums = np.stack([np.bincount(found, column, size) for column in points.T], 1)
        spare = points[rng.choice(len(points), size)]
        codebook = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], spare).astype(
            np.float32
        )
    return codebook


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
    parser.add_argument("--codebook-size", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--describe", nargs="+", type=Path, default=[])
    arguments = parser.parse_args()
    if arguments.out is not None:
        generate(arguments.out, arguments.count, arguments.codebook_size, arguments.seed)
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
