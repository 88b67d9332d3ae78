"""Make the built-in quantizer: gathers its training images and trains it.

    python examples/builtin_quantizer/make.py --packages FOLDER --out runs/builtin

README.md beside this file says what the folder holds. Run again, it goes on from its last checkpoint.
"""

import argparse
import logging
from pathlib import Path

import numpy as np
import torch
from gather import gather
from PIL import Image, ImageDraw

from being_vl.demo import shapesworld
from being_vl.quantizer.training.options import (
    AdversarialOptions,
    CheckpointOptions,
    CodebookOptions,
    NetworkOptions,
    QuantizerTrainOptions,
)
from being_vl.quantizer.training.trainer import train_quantizer


def main() -> None:
    """Parse the arguments, gather, train."""
    parser = argparse.ArgumentParser(description="Make the built-in quantizer.")
    parser.add_argument("--packages", type=Path, required=True, help="folder with the unpacked packages")
    parser.add_argument("--out", type=Path, required=True, help="folder for images, checkpoint and quantizer")
    parser.add_argument("--steps", type=int, default=2000)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)

    out: Path = arguments.out
    if not (out / "quantizer").is_dir():  # else this goes on with an earlier run
        gather(arguments.packages, out / "photographs")
        shapesworld.generate(out / "shapes", 6000, seed=1)
        shapesworld.generate(out / "shapes-held-out", 100, seed=1, split="held-out")
        draw_all(2000, out / "drawings")
    train_quantizer(options(out, arguments.steps))


def options(out: Path, steps: int) -> QuantizerTrainOptions:
    """What the built-in quantizer is trained with."""
    photographs = out / "photographs" / "training"
    return QuantizerTrainOptions(
        images=[*[out / "shapes" / "images"] * 3, *[photographs] * 4, out / "drawings"],
        held_out_images=[out / "photographs" / "held-out", out / "shapes-held-out" / "images"],
        out=out / "quantizer",
        name="builtin",
        crop=128,
        network=NetworkOptions(width=128, layers=1),
        codebook=CodebookOptions(size=4096, dim=24, reserved_share=576 / 4096),
        adversarial=AdversarialOptions(weight=0.05, start=0.8),
        steps=steps,
        batch_size=8,
        encoder_share=0.0,
        precision="bfloat16",
        checkpoint=CheckpointOptions(every=200),
        device="cpu",
    )


def draw_all(count: int, out: Path) -> None:
    """Write `count` drawings."""
    out.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        draw(np.random.default_rng([7, n])).save(out / f"{n:05d}.png")


def draw(rng: np.random.Generator) -> Image.Image:
    """Shapes, lines and shaded ellipses of any colour, with and without outlines, every other time on white.

    64×64 pixels. They stand for drawings and cartoons, and give the quantizer colours that are in neither
    ShapesWorld nor the photographs.
    """

    side = 128
    image = Image.new("RGB", (side, side), "white" if rng.random() < 0.5 else random_colour(rng))
    pen = ImageDraw.Draw(image)
    for _ in range(rng.integers(1, 6)):
        points = [(x, y) for x, y in rng.integers(-16, side + 16, (5, 2)).tolist()]
        (x0, x1), (y0, y1) = sorted(p[0] for p in points[:2]), sorted(p[1] for p in points[:2])
        box = x0, y0, x1 + 4, y1 + 4
        outline = (0, 0, 0) if rng.random() < 0.5 else None
        match int(rng.integers(5)):
            case 0:
                pen.ellipse(box, fill=random_colour(rng), outline=outline, width=2)
            case 1:
                pen.rectangle(box, fill=random_colour(rng), outline=outline, width=2)
            case 2:
                pen.polygon(points[:3], fill=random_colour(rng), outline=outline, width=2)
            case 3:
                pen.line(
                    points[: rng.integers(2, 6)], fill=random_colour(rng), width=int(rng.integers(2, 12))
                )
            case _:
                draw_shaded_ellipse(image, box, rng)
    return image.resize((side // 2, side // 2), Image.Resampling.BOX)


def draw_shaded_ellipse(image: Image.Image, box: tuple[int, int, int, int], rng: np.random.Generator) -> None:
    """An ellipse whose colour changes evenly from one side of the image to the other."""
    side = image.width
    slope = np.linspace(np.array(random_colour(rng)), np.array(random_colour(rng)), side)[:, None]
    shades = np.broadcast_to(slope, (side, side, 3)).round().astype(np.uint8)
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).ellipse(box, fill=255)
    image.paste(Image.fromarray(shades if rng.random() < 0.5 else shades.swapaxes(0, 1)), mask=mask)


def random_colour(rng: np.random.Generator) -> tuple[int, int, int]:
    """Any RGB colour."""
    red, green, blue = rng.integers(0, 256, 3).tolist()
    return red, green, blue


if __name__ == "__main__":
    main()
