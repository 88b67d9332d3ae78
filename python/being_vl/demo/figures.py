"""Pictures of what the chain does, written as PNG files. Needs matplotlib, which is imported when it is used."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from being_vl.errors import ConfigError
from being_vl.files import write_aside

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

GOOD, BAD = "#1a7f37", "#b42318"


@dataclass(frozen=True)
class Asked:
    """A question about a picture, what the model said, and what is right (None if nobody knows)."""

    question: str
    said: str
    answer: str | None = None


def draw_reconstructions(path: Path, rows: Mapping[str, Sequence["Image"]]) -> None:
    """One column per picture, one row per way it went: for example the originals, and what VQ gives back.

    Args:
        path: The PNG file.
        rows: Label → pictures; all rows have the same number of them.

    Raises:
        ConfigError: if matplotlib is not installed.
    """
    columns = max(len(pictures) for pictures in rows.values())
    figure, axes = _grid(len(rows), columns, 1.5, 1.5)
    for row, (label, pictures) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(row, pictures, strict=True):
            _show(axis, picture)
        row[0].set_ylabel(label, fontsize=9)
    _save(figure, path)


def draw_token_map(
    path: Path, pictures: Sequence["Image"], regions: Sequence[ArrayLike], titles: Sequence[str] | None = None
) -> None:
    """Which token covers which cells: each picture, and below it the same one with its tokens outlined.

    Args:
        path: The PNG file.
        pictures: What the quantizer saw.
        regions: Per picture, an array (height, width) with the number of the token that covers each cell, as
            `VisualBPE.encode(…, return_regions=True)` gives it.
        titles: Per picture; the number of cells and tokens by default.

    Raises:
        ConfigError: if matplotlib is not installed.
    """
    figure, axes = _grid(2, len(pictures), 2.2, 2.2)
    for n, (picture, region) in enumerate(zip(pictures, regions, strict=True)):
        owners = np.asarray(region)
        title = f"{owners.size} cells, {len(np.unique(owners))} tokens" if titles is None else titles[n]
        _show(axes[0][n], picture)
        axes[0][n].set_title(title, fontsize=8)
        _show(axes[1][n], picture)
        _outline(axes[1][n], owners, picture.size)
    _save(figure, path)


def draw_losses(path: Path, log: Sequence[Mapping[str, Any]]) -> None:
    """The loss of each stage over its optimiser steps.

    Args:
        path: The PNG file.
        log: Entries of `log.jsonl`, each with `stage`, `step` and `loss`.

    Raises:
        ConfigError: if matplotlib is not installed.
    """
    stages = list(dict.fromkeys(str(entry["stage"]) for entry in log))
    figure, axes = _grid(1, max(1, len(stages)), 3.2, 2.6)
    for axis, stage in zip(axes[0], stages, strict=False):
        entries = [entry for entry in log if entry["stage"] == stage]
        steps = np.array([entry["step"] for entry in entries])
        losses = np.array([entry["loss"] for entry in entries], float)
        axis.plot(steps, losses, color="#9ec5fe", linewidth=0.8)
        axis.plot(steps, _smooth(losses), color="#0b5ed7", linewidth=1.6)
        axis.set_title(stage, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("loss", fontsize=8)
    _save(figure, path)


def draw_answers(
    path: Path, pictures: Sequence["Image"], asked: Sequence[Sequence[Asked]], columns: int = 4
) -> None:
    """Pictures with questions and what the model said: green if it is right, red with the right answer if not.

    Args:
        path: The PNG file.
        pictures: The pictures.
        asked: Per picture, its questions.
        columns: Pictures side by side.

    Raises:
        ConfigError: if matplotlib is not installed.
    """
    texts = [[line for one in questions for line in _lines(one)] for questions in asked]
    deepest = max((len(lines) for lines in texts), default=0)
    rows = -(-len(pictures) // columns)
    figure, axes = _grid(rows, columns, 3.0, 2.2 + 0.17 * deepest)
    flat = [axis for row in axes for axis in row]
    share = 2.2 / (2.2 + 0.17 * deepest)
    for axis in flat[len(pictures) :]:
        axis.remove()
    for axis, picture, lines in zip(flat, pictures, texts, strict=False):
        axis.axis("off")
        _show(axis.inset_axes((0.0, 1 - share, 1.0, share)), picture)
        for n, (text, colour) in enumerate(lines):
            y = (1 - share) - (n + 1) * (1 - share) / (deepest + 0.5)
            axis.text(0.02, y, text, color=colour, fontsize=8, transform=axis.transAxes)
    _save(figure, path)


def _lines(one: Asked) -> list[tuple[str, str]]:
    """The lines (text, colour) of one question."""
    lines = [(line, "black") for line in textwrap.wrap(one.question, 44)]
    right = one.answer is None or one.said.strip() == one.answer.strip()
    colour = "#0b5ed7" if one.answer is None else GOOD if right else BAD
    lines += [(line, colour) for line in textwrap.wrap("→ " + (one.said.strip() or "(nothing)"), 44)]
    if not right:
        lines += [(line, "#667085") for line in textwrap.wrap(f"right: {one.answer}", 44)]
    return lines


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Exponential moving average over about a twentieth of the values, without a slow start."""
    keep = 1 - 1 / max(1.0, len(values) / 20)
    smooth, total, weight = np.empty_like(values), 0.0, 0.0
    for n, value in enumerate(values):
        total, weight = keep * total + value, keep * weight + 1
        smooth[n] = total / weight
    return smooth


def _outline(axis: "Axes", owners: NDArray[Any], size: tuple[int, int]) -> None:
    """Lines between cells of different tokens."""
    from matplotlib.collections import LineCollection

    width, height = size[0] / owners.shape[1], size[1] / owners.shape[0]
    rows, columns = np.nonzero(owners[1:] != owners[:-1])  # below these cells
    y, x = (rows + 1) * height - 0.5, columns * width - 0.5
    lines = [np.stack([x, y, x + width, y], axis=1)]
    rows, columns = np.nonzero(owners[:, 1:] != owners[:, :-1])  # right of these
    y, x = rows * height - 0.5, (columns + 1) * width - 0.5
    lines.append(np.stack([x, y, x, y + height], axis=1))
    segments = np.concatenate(lines).reshape(-1, 2, 2)
    for colour, thickness in (("black", 2.4), ("#ffd60a", 1.3)):
        axis.add_collection(
            LineCollection(list(segments), colors=colour, linewidths=thickness, capstyle="round")
        )


def _show(axis: "Axes", picture: "Image") -> None:
    axis.imshow(np.asarray(picture), interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)


def _grid(rows: int, columns: int, width: float, height: float) -> tuple["Figure", list[list["Axes"]]]:
    """A figure of `rows` × `columns` axes, each `width` × `height` inches; drawn without a display."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(f"figures need matplotlib ({error}); pip install 'being-vl[train]'") from None
    figure = Figure(figsize=(width * columns + 0.4, height * rows + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [list(row) for row in figure.subplots(rows, columns, squeeze=False)]


def _save(figure: "Figure", path: Path) -> None:
    with write_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=130)
