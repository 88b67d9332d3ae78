"""Makes the built-in quantizer: gathers its training images and trains it.

    python examples/builtin_quantizer/make.py --wallpapers FOLDER --out runs/quantizer

README.md beside this file says where the photographs come from.
"""

import argparse
import logging
from pathlib import Path

import numpy as np
import skimage
import torch
from PIL import Image, ImageDraw

from being_vl.demo import shapesworld
from being_vl.quantize.images import read_image
from being_vl.quantize.options import QuantizerTrainOptions
from being_vl.quantize.training import train_quantizer

WALLPAPERS = (
    "Picture_0B_by_freespace",
    "Picture_1A_by_freespace",
    "Wine_by_Jakkub_Mede",
    "aitzgorri_by_Aitzol_Berasategi",
    "friends_by_Aitzol_Berasategi",
    "life_by_Aitzol_Berasategi",
    "picosdeeuropa_by_Aitzol_Berasategi",
    "seeding_by_Clements_Engelhardt",
    "sunset_by_Aitzol_Berasategi",
    "umang_by_Abhishek_Mudgal",
)
SKIMAGE = ("brick.png", "camera.png", "grass.png", "hubble_deep_field.jpg", "retina.jpg")


def main() -> None:
    """Parse the arguments, gather, train."""
    parser = argparse.ArgumentParser(description="Make the built-in quantizer.")
    parser.add_argument(
        "--wallpapers", type=Path, required=True, help="folder with the Debian package's JPEGs"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for images, checkpoint and quantizer")
    parser.add_argument("--steps", type=int, default=4000)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)

    out: Path = arguments.out
    shapesworld.generate(out / "shapes", 6000, seed=1)
    gather_photographs(arguments.wallpapers, out / "photographs")
    draw_all(2000, out / "drawings")
    shapes = out / "shapes" / "images"
    options = QuantizerTrainOptions(
        images=[
            *[shapes] * 8,
            out / "photographs",
            out / "drawings",
            *[shapes] * 6,
        ],  # the order decides the ids
        out=out / "quantizer",
        name="builtin",
        steps=arguments.steps,
        adversarial_start=0.8,
        settle=0.0,
        checkpoint_every=500,
    )
    train_quantizer(options)


def gather_photographs(wallpapers: Path, out: Path) -> None:
    """Copy the photographs, shrunk so that the shorter side is at most 512 pixels."""
    out.mkdir(parents=True, exist_ok=True)
    data = Path(skimage.__file__).parent / "data"
    for path in [wallpapers / f"{name}.jpg" for name in WALLPAPERS] + [data / name for name in SKIMAGE]:
        image = read_image(path)
        scale = min(1.0, 512 / min(image.size))
        size = round(image.width * scale), round(image.height * scale)
        image.resize(size, Image.Resampling.BICUBIC).save(out / f"{path.stem}.png")


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

    def colour() -> tuple[int, int, int]:
        red, green, blue = rng.integers(0, 256, 3).tolist()
        return red, green, blue

    side = 128
    image = Image.new("RGB", (side, side), "white" if rng.random() < 0.5 else colour())
    pen = ImageDraw.Draw(image)
    for _ in range(rng.integers(1, 6)):
        points = [(x, y) for x, y in rng.integers(-16, side + 16, (5, 2)).tolist()]
        (x0, x1), (y0, y1) = sorted(p[0] for p in points[:2]), sorted(p[1] for p in points[:2])
        box = x0, y0, x1 + 4, y1 + 4
        outline = (0, 0, 0) if rng.random() < 0.5 else None
        match int(rng.integers(5)):
            case 0:
                pen.ellipse(box, fill=colour(), outline=outline, width=2)
            case 1:
                pen.rectangle(box, fill=colour(), outline=outline, width=2)
            case 2:
                pen.polygon(points[:3], fill=colour(), outline=outline, width=2)
            case 3:
                pen.line(points[: rng.integers(2, 6)], fill=colour(), width=int(rng.integers(2, 12)))
            case _:
                slope = np.linspace(np.array(colour()), np.array(colour()), side)[:, None]
                shaded = np.broadcast_to(slope, (side, side, 3)).round().astype(np.uint8)
                mask = Image.new("L", (side, side))
                ImageDraw.Draw(mask).ellipse(box, fill=255)
                image.paste(
                    Image.fromarray(shaded if rng.random() < 0.5 else shaded.swapaxes(0, 1)), mask=mask
                )
    return image.resize((side // 2, side // 2), Image.Resampling.BOX)


if __name__ == "__main__":
    main()
