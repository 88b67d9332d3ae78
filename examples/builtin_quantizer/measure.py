"""Measure a quantizer as docs/guide/quantize.md reports it.

    python examples/builtin_quantizer/measure.py [NAME] [--photographs runs/builtin/photographs/held-out]

On 1000 training and 400 held-out ShapesWorld pictures, and on photographs that it was not trained on (the six of the
demo and those of a folder): PSNR, SSIM, codes in use, how steadily a kind of tile gets one id, what a linear reader
makes of an object's ids, and visual BPE's tokens.
"""

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from make import draw
from numpy.typing import NDArray
from PIL import Image

from being_vl import VisualBPE
from being_vl.demo import shapesworld
from being_vl.images.decode import read_image
from being_vl.images.sources import find_images
from being_vl.quantizer.base import Quantizer, load_quantizer
from being_vl.quantizer.models.tiled import to_tensor
from being_vl.quantizer.training.losses import ssim
from being_vl.quantizer_names import describe_quantizer

Scenes = list[shapesworld.Scene]
Grids = list[NDArray[np.int64]]
NUM_CROPS = 1200
NUM_DRAWINGS = 400


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("name", nargs="?", default="builtin")
    parser.add_argument("--photographs", type=Path)
    parser.add_argument(
        "--sheet", type=Path, help="file for a figure of some images and their reconstructions"
    )
    arguments = parser.parse_args()
    quantizer = load_quantizer(arguments.name)
    train_scenes, _, train_grids = shapes(quantizer, "train", 1000)
    scenes, pictures, grids = shapes(quantizer, "held-out", 400)
    print(f"quantizer {describe_quantizer(quantizer.name, quantizer.fingerprint)}")
    print(f"ShapesWorld held-out: {quality(pictures, quantizer.decode(grids))}")
    print(f"codes in use, ShapesWorld: {len(used_ids(train_grids))} of {quantizer.codebook_size}")
    measure_steadiness(train_scenes, train_grids)
    read_objects(train_scenes, train_grids, scenes, grids, quantizer.codebook_size)
    bpe = VisualBPE.train(train_grids, quantizer.codebook_size, num_merges=300)
    tokens = bpe.encode_batch(grids)
    print(
        f"tokens per held-out picture: 64 without BPE, {len(tokens.values) / len(tokens):.1f} with 300 merges"
    )
    demo = Path(str(files("being_vl.demo"))) / "photographs"
    measure_photographs(arguments.name, demo, "the demo's")
    if arguments.sheet:
        large_quantizer = load_quantizer(arguments.name, size=256)
        photographs = [read_image(source.place) for source in find_images(demo).sources]
        rows = [
            (picture.resize((128, 128), Image.Resampling.NEAREST) for picture in row)
            for row in (pictures[:12], quantizer.decode(grids[:12]))
        ]
        rows += [photographs, large_quantizer.decode(large_quantizer.encode(photographs))]
        save_sheet(rows, arguments.sheet)
    if arguments.photographs:
        large_quantizer = measure_photographs(arguments.name, arguments.photographs, "held-out")
        ids = used_ids(grids) | used_ids(large_quantizer.encode(draw_crops(arguments.photographs, 256)))
        drawings = [draw(np.random.default_rng([8, n])) for n in range(NUM_DRAWINGS)]
        ids_with_drawings = ids | used_ids(quantizer.encode(drawings))
        print(
            f"codes in use, {len(pictures)} held-out ShapesWorld pictures, {NUM_CROPS} crops of held-out photographs: "
            f"{len(ids) / quantizer.codebook_size:.1%}; with {NUM_DRAWINGS} new drawings: "
            f"{len(ids_with_drawings) / quantizer.codebook_size:.1%}"
        )


def measure_photographs(name: str, folder: Path, name_of_set: str) -> Quantizer:
    """Print how well photographs come back, at two sizes; returns the quantizer at the larger one."""
    photographs = [middle_square(read_image(source.place)) for source in find_images(folder).sources]
    for size in (64, 256):
        quantizer = load_quantizer(name, size=size)
        images = [photograph.resize((size, size), Image.Resampling.BICUBIC) for photograph in photographs]
        grids = quantizer.encode(images)
        print(
            f"{name_of_set} {len(images)} photographs at {size}×{size}: {quality(images, quantizer.decode(grids))}, "
            f"codes in use {len(used_ids(grids))}"
        )
    return quantizer


def save_sheet(rows: Iterable[Iterable[Image.Image]], path: Path) -> None:
    """Save rows of pictures, one below the other."""
    sheet = np.concatenate([np.concatenate([np.asarray(image) for image in row], 1) for row in rows])
    Image.fromarray(sheet).save(path, quality=85)


def middle_square(image: Image.Image) -> Image.Image:
    """The square in the middle, of the whole shorter side."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def draw_crops(folder: Path, size: int) -> list[Image.Image]:
    """Random square crops of photographs, of any scale from `size` pixels to the shorter side, mirrored or not."""
    rng = np.random.default_rng(2)
    photographs = [read_image(source.place) for source in find_images(folder).sources]
    images = []
    for n in range(NUM_CROPS):
        image = photographs[n % len(photographs)]
        max_side = min(image.size)
        side = round(np.exp(rng.uniform(np.log(min(size, max_side)), np.log(max_side))))
        left, top = (int(rng.integers(length - side + 1)) for length in image.size)
        crop = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)
        images.append(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop)
    return images


def used_ids(grids: Grids) -> set[int]:
    """The ids that occur."""
    return set(np.unique(np.concatenate([grid.ravel() for grid in grids])).tolist())


def quality(images: list[Image.Image], reconstructions: list[Image.Image]) -> str:
    """Mean PSNR and SSIM."""
    pairs = (images, reconstructions)
    a, b = (to_tensor(np.stack([np.asarray(image) for image in part])) for part in pairs)
    return f"PSNR {psnr(images, reconstructions):.2f} dB, SSIM {float(ssim(a, b).mean()):.3f}"


def shapes(
    quantizer: Quantizer, split: shapesworld.Split, count: int
) -> tuple[Scenes, list[Image.Image], Grids]:
    """Scenes, their pictures and grids."""
    scenes, pictures = [], []
    for n in range(count):
        rng = np.random.default_rng([99, split == "held-out", n])
        scenes.append(shapesworld.sample_scene(rng, split))
        pictures.append(shapesworld.draw(scenes[-1], rng))
    return scenes, pictures, quantizer.encode(pictures)


def psnr(images: list[Image.Image], reconstructions: list[Image.Image]) -> float:
    """Mean PSNR in dB."""
    errors = [
        np.square(np.asarray(a, float) - np.asarray(b, float)).mean()
        for a, b in zip(images, reconstructions, strict=True)
    ]
    return float(np.mean(10 * np.log10(255**2 / np.array(errors))))


def measure_steadiness(scenes: Scenes, grids: Grids) -> None:
    """How often a kind of tile (same part of the same object, or same background) has its most frequent id."""
    kinds: dict[tuple[object, ...], Counter[int]] = defaultdict(Counter)
    for scene, grid in zip(scenes, grids, strict=True):
        labels = np.full(grid.shape, None, dtype=object)
        for thing in scene.things:
            for row in range(thing.cells):
                for column in range(thing.cells):
                    kind = (thing.shape, thing.colour, thing.size, thing.texture, row, column)
                    labels[thing.row + row, thing.column + column] = kind
        for label, number in zip(labels.ravel(), grid.ravel().tolist(), strict=True):
            kinds[(scene.background, label)][number] += 1
    for is_plain in (True, False):
        counts = [count for (_, label), count in kinds.items() if (label is None) == is_plain]
        share = sum(max(count.values()) for count in counts) / sum(count.total() for count in counts)
        print(
            f"tiles with their kind's most frequent id, {'background' if is_plain else 'objects'}: {share:.1%}"
        )


def read_objects(train: Scenes, train_grids: Grids, test: Scenes, test_grids: Grids, ids: int) -> None:
    """Accuracy of a linear reader of the 3×3 ids from an object's corner on."""

    def make_samples(scenes: Scenes, grids: Grids) -> tuple[torch.Tensor, list[shapesworld.Thing]]:
        windows, things = [], []
        for scene, grid in zip(scenes, grids, strict=True):
            padded_grid = np.pad(grid, (0, 1), constant_values=ids)
            for thing in scene.things:
                windows.append(
                    padded_grid[thing.row : thing.row + 3, thing.column : thing.column + 3].ravel()
                )
                things.append(thing)
        return torch.from_numpy(np.stack(windows) + np.arange(9) * (ids + 1)), things

    (x, things), (test_x, test_things) = make_samples(train, train_grids), make_samples(test, test_grids)
    for attribute in ("shape", "colour", "size", "texture"):
        values = sorted({getattr(thing, attribute) for thing in things})
        y = torch.tensor([values.index(getattr(thing, attribute)) for thing in things])
        reader = torch.nn.EmbeddingBag(9 * (ids + 1), len(values), mode="sum")
        torch.nn.init.zeros_(reader.weight)
        optimizer = torch.optim.Adam(reader.parameters(), 0.05)
        for _ in range(60):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(reader(x), y).backward()
            optimizer.step()
        answers = [values[n] for n in reader(test_x).argmax(1).tolist()]
        accuracy = np.mean(
            [a == getattr(thing, attribute) for a, thing in zip(answers, test_things, strict=True)]
        )
        print(
            f"{attribute} read from an object's ids, held-out: {accuracy:.1%} (one in {len(values)} by chance)"
        )


if __name__ == "__main__":
    main()
