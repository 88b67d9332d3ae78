"""Measures a quantizer as docs/quantize.md reports it: `python examples/builtin_quantizer/measure.py [NAME]`.

On 1000 training and 400 held-out ShapesWorld pictures and on the shipped photographs: PSNR, codes in use, how
steadily a kind of tile gets one id, what a linear reader makes of an object's ids, and visual BPE's tokens.
"""

import sys
from collections import Counter, defaultdict
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from being_vl import VisualBPE
from being_vl.demo import shapesworld
from being_vl.quantize.base import load_quantizer
from being_vl.quantize.images import read_image

Scenes = list[shapesworld.Scene]
Grids = list[NDArray[np.int64]]


def main(name: str) -> None:
    """Measure and print."""
    quantizer = load_quantizer(name)
    train, _, train_grids = shapes(quantizer, "train", 1000)
    held_out, pictures, grids = shapes(quantizer, "held-out", 400)
    print(f"quantizer {quantizer.name}, fingerprint {quantizer.fingerprint[:12]}")
    print(f"PSNR, ShapesWorld held-out: {psnr(pictures, quantizer.decode(grids)):.2f} dB")
    for size in (64, 256):
        sized = load_quantizer(name, size=size)
        folder = Path(str(files("being_vl.demo"))) / "photographs"
        photographs = [sized.prepare(read_image(path)) for path in sorted(folder.glob("*.jpg"))]
        found = sized.encode(photographs)
        print(f"PSNR, photographs at {size}×{size}: {psnr(photographs, sized.decode(found)):.2f} dB")
        print(f"  codes in use: {len(np.unique(np.concatenate([g.ravel() for g in found])))}")
    print(f"codes in use, ShapesWorld: {len(np.unique(np.stack(train_grids)))} of {quantizer.codebook_size}")
    steadiness(train, train_grids)
    read_objects(train, train_grids, held_out, grids, quantizer.codebook_size)
    bpe = VisualBPE.train(train_grids, quantizer.codebook_size, num_merges=300)
    tokens = bpe.encode_batch(grids)
    print(
        f"tokens per held-out picture: 64 without BPE, {len(tokens.values) / len(tokens):.1f} with 300 merges"
    )


def shapes(quantizer, split: shapesworld.Split, count: int) -> tuple[Scenes, list[Image.Image], Grids]:  # type: ignore[no-untyped-def]
    """Scenes, their pictures and grids."""
    scenes, pictures = [], []
    for n in range(count):
        rng = np.random.default_rng([99, split == "held-out", n])
        scenes.append(shapesworld.sample_scene(rng, split))
        pictures.append(shapesworld.draw(scenes[-1], rng))
    return scenes, pictures, quantizer.encode(pictures)


def psnr(originals: list[Image.Image], others: list[Image.Image]) -> float:
    """Mean PSNR in dB."""
    errors = [
        np.square(np.asarray(a, float) - np.asarray(b, float)).mean()
        for a, b in zip(originals, others, strict=True)
    ]
    return float(np.mean(10 * np.log10(255**2 / np.array(errors))))


def steadiness(scenes: Scenes, grids: Grids) -> None:
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
    for plain in (True, False):
        counts = [count for (_, label), count in kinds.items() if (label is None) == plain]
        share = sum(max(count.values()) for count in counts) / sum(count.total() for count in counts)
        print(
            f"tiles with their kind's most frequent id, {'background' if plain else 'objects'}: {share:.1%}"
        )


def read_objects(train: Scenes, train_grids: Grids, test: Scenes, test_grids: Grids, ids: int) -> None:
    """Accuracy of a linear reader of the 3×3 ids from an object's corner on."""

    def examples(scenes: Scenes, grids: Grids) -> tuple[torch.Tensor, list[shapesworld.Thing]]:
        windows, things = [], []
        for scene, grid in zip(scenes, grids, strict=True):
            padded = np.pad(grid, (0, 1), constant_values=ids)
            for thing in scene.things:
                windows.append(padded[thing.row : thing.row + 3, thing.column : thing.column + 3].ravel())
                things.append(thing)
        return torch.from_numpy(np.stack(windows) + np.arange(9) * (ids + 1)), things

    (x, things), (test_x, test_things) = examples(train, train_grids), examples(test, test_grids)
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
        said = [values[n] for n in reader(test_x).argmax(1).tolist()]
        right = np.mean([a == getattr(thing, attribute) for a, thing in zip(said, test_things, strict=True)])
        print(
            f"{attribute} read from an object's ids, held-out: {right:.1%} (one in {len(values)} by chance)"
        )


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["builtin"]))
