"""Draw pipeline.png from a finished demo: `python examples/pipeline_figure.py runs/demo docs/images/pipeline.png`."""

import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from PIL import Image

from being_vl import VisualBPE
from being_vl.quantize.base import load_quantizer

PICTURE = "held-out-00000.png"


def main(demo: Path, out: Path) -> None:
    """Draw the picture, its ids, its tokens, and the sequence."""
    picture = Image.open(demo / "held-out" / "images" / PICTURE)
    grid = load_quantizer("builtin").encode([picture])[0]
    tokens, regions = VisualBPE.load(demo / "vocabulary.json").encode(grid, return_regions=True)
    figure, axes = plt.subplots(1, 3, figsize=(11, 4.6))
    figure.subplots_adjust(left=0.01, right=0.99, top=0.9, bottom=0.24, wspace=0.12)
    cell = picture.width / grid.shape[1]
    pixels = np.asarray(picture.convert("RGB"))
    titles = ["image", f"VQ-GAN: {grid.size} ids", f"visual BPE: {len(tokens)} tokens"]
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=13)
        axis.axis("off")
        axis.imshow(pixels, extent=(0, grid.shape[1], grid.shape[0], 0), alpha=1 if axis is axes[0] else 0.45)
    colours = plt.get_cmap("tab20")
    for (row, column), value in np.ndenumerate(grid):
        axes[1].text(column + 0.5, row + 0.5, str(value), ha="center", va="center", fontsize=7)
        owner = regions[row, column]
        square = plt.Rectangle((column, row), 1, 1, color=colours(int(owner) % 20), alpha=0.55, linewidth=0)
        axes[2].add_patch(square)
    for line in range(grid.shape[0] + 1):
        axes[1].axhline(line, color="grey", linewidth=0.4)
        axes[1].axvline(line, color="grey", linewidth=0.4)
    for index, token in enumerate(tokens):
        rows, columns = np.nonzero(np.asarray(regions) == index)
        place = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
        axes[2].text(
            columns[place] + 0.5, rows[place] + 0.5, str(token), ha="center", va="center", fontsize=8
        )
    sequence = " ".join(map(str, tokens))
    figure.text(
        0.5,
        0.1,
        f"[BOS] [BOI] {sequence} [EOI] what is the colour of the square? → red",
        ha="center",
        fontsize=11,
        family="monospace",
    )
    figure.text(0.5, 0.03, "one sequence, one causal language model", ha="center", fontsize=11, color="grey")
    figure.savefig(out, dpi=100)
    print(f"{out}: {cell:.0f} pixels per id")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
