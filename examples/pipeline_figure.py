"""Draw pipeline.png from a finished demo: `python examples/pipeline_figure.py runs/demo docs/images/pipeline.png`."""

import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from numpy.typing import NDArray

from being_vl import VisualBPE
from being_vl.images.decode import read_image
from being_vl.quantizer.base import load_quantizer

PICTURE = "held-out-00000.png"
QUESTION = "what is the colour of the square? → red"


def main(demo: Path, out: Path) -> None:
    """Draw the picture, its ids, its tokens, and the sequence."""
    picture = read_image(demo / "held-out" / "images" / PICTURE)
    grid = load_quantizer("builtin").encode([picture])[0]
    tokens, regions = VisualBPE.load(demo / "vocabulary.json").encode(grid, return_regions=True)
    figure, axes = plt.subplots(1, 3, figsize=(11, 4.6))
    figure.subplots_adjust(left=0.01, right=0.99, top=0.9, bottom=0.24, wspace=0.12)
    # The picture three times, twice of them pale.
    height, width = grid.shape
    titles = ["image", f"VQ-GAN: {grid.size} ids", f"visual BPE: {len(tokens)} tokens"]
    for axis, title, alpha in zip(axes, titles, (1, 0.45, 0.45), strict=True):
        axis.set_title(title, fontsize=13)
        axis.axis("off")
        axis.imshow(np.asarray(picture), extent=(0, width, height, 0), alpha=alpha)
    draw_ids(axes[1], grid)
    draw_tokens(axes[2], tokens, regions)
    # The sequence below them.
    sequence = f"[BOS] [BOI] {' '.join(map(str, tokens))} [EOI] {QUESTION}"
    figure.text(0.5, 0.1, sequence, ha="center", fontsize=11, family="monospace")
    figure.text(0.5, 0.03, "one sequence, one causal language model", ha="center", fontsize=11, color="grey")
    figure.savefig(out, dpi=100)
    print(f"{out}: {picture.width // width} pixels per id")


def draw_ids(axis: Axes, grid: NDArray[np.int64]) -> None:
    """A number in each cell, and lines between the cells."""
    for (row, column), number in np.ndenumerate(grid):
        axis.text(column + 0.5, row + 0.5, str(number), ha="center", va="center", fontsize=7)
    for line in range(grid.shape[0] + 1):
        axis.axhline(line, color="grey", linewidth=0.4)
        axis.axvline(line, color="grey", linewidth=0.4)


def draw_tokens(axis: Axes, tokens: NDArray[np.integer], regions: NDArray[np.integer]) -> None:
    """A colour for each token's region, and its number in the cell that is nearest to the region's middle."""
    colours = plt.get_cmap("tab20")
    for (row, column), index in np.ndenumerate(regions):
        square = plt.Rectangle((column, row), 1, 1, color=colours(index % 20), alpha=0.55, linewidth=0)
        axis.add_patch(square)
    for index, token in enumerate(tokens):
        rows, columns = np.nonzero(regions == index)
        middle = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
        x, y = columns[middle] + 0.5, rows[middle] + 0.5
        axis.text(x, y, str(token), ha="center", va="center", fontsize=8)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
