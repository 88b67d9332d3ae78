"""Figures of what the chain does, as PNG files. They need matplotlib, which is imported when it is used."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from being_vl.errors import ConfigError
from being_vl.extras import install_hint
from being_vl.files import write_aside
from being_vl.options import StrPath

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

RIGHT_COLOUR, WRONG_COLOUR, UNKNOWN_COLOUR, REFERENCE_COLOUR = "#1a7f37", "#b42318", "#0b5ed7", "#667085"


@dataclass(frozen=True)
class FigureQuestion:
    """A question about an image, the model's answer, and the right one (None if it is not known)."""

    question: str
    answer: str
    reference: str | None = None


def draw_reconstructions(path: StrPath, rows: Mapping[str, Sequence["Image"]]) -> None:
    """One column per image, one row per version of it: for example the originals, and what VQ gives back.

    Args:
        path: The PNG file.
        rows: Label → images; all rows have the same number of them.

    Raises:
        ConfigError: if matplotlib is not installed.
    """
    columns = max(len(images) for images in rows.values())
    figure, axes = _make_axes(len(rows), columns, 1.5, 1.5)
    for row, (label, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(row, images, strict=True):
            _draw_image(axis, image)
        row[0].set_ylabel(label, fontsize=9)
    _save(figure, path)


def draw_token_map(
    path: StrPath,
    images: Sequence["Image"],
    regions: Sequence[ArrayLike],
    titles: Sequence[str] | None = None,
) -> None:
    """Which token covers which cells: each image, and below it the same one with its tokens outlined.

    Args:
        path: The PNG file.
        images: What the quantizer saw.
        regions: Per image, an array (height, width) with the number of the token that covers each cell, as
            `VisualBPE.encode(…, return_regions=True)` gives it.
        titles: Per image; the number of cells and tokens by default.

    Raises:
        ConfigError: if matplotlib is not installed.
    """
    figure, axes = _make_axes(2, len(images), 2.2, 2.2)
    for n, (image, tokens) in enumerate(zip(images, map(np.asarray, regions), strict=True)):
        title = f"{tokens.size} cells, {len(np.unique(tokens))} tokens" if titles is None else titles[n]
        _draw_image(axes[0][n], image)
        axes[0][n].set_title(title, fontsize=8)
        _draw_image(axes[1][n], image)
        _outline(axes[1][n], tokens, image.size)
    _save(figure, path)


def draw_losses(path: StrPath, log: Sequence[Mapping[str, Any]]) -> None:
    """The loss of each stage over its optimizer steps.

    Args:
        path: The PNG file.
        log: Entries of `log.jsonl`, each with `stage`, `step` and `loss`.

    Raises:
        ConfigError: if matplotlib is not installed.
    """
    stages = list(dict.fromkeys(str(entry["stage"]) for entry in log))
    figure, axes = _make_axes(1, max(1, len(stages)), 3.2, 2.6)
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
    path: StrPath,
    images: Sequence["Image"],
    questions: Sequence[Sequence[FigureQuestion]],
    columns: int = 4,
) -> None:
    """Images with questions and the model's answers: green if right, red with the right answer if not.

    Args:
        path: The PNG file.
        images: The images.
        questions: Per image, its questions.
        columns: Images side by side.

    Raises:
        ConfigError: if matplotlib is not installed.
    """
    # All cells are as high as the one with the most lines needs.
    texts = [
        [line for question in questions_of_image for line in _lines(question)]
        for questions_of_image in questions
    ]
    max_lines = max((len(lines) for lines in texts), default=0)
    text_height = 0.17 * max_lines
    rows = -(-len(images) // columns)
    figure, axes = _make_axes(rows, columns, 3.0, 2.2 + text_height)
    cells = [axis for row in axes for axis in row]
    for axis in cells[len(images) :]:
        axis.remove()
    # The image above, its lines below.
    image_share = 2.2 / (2.2 + text_height)
    for axis, image, lines in zip(cells, images, texts, strict=False):
        axis.axis("off")
        _draw_image(axis.inset_axes((0.0, 1 - image_share, 1.0, image_share)), image)
        for n, (text, colour) in enumerate(lines):
            y = (1 - image_share) - (n + 1) * (1 - image_share) / (max_lines + 0.5)
            axis.text(0.02, y, text, color=colour, fontsize=8, transform=axis.transAxes)
    _save(figure, path)


def _lines(question: FigureQuestion) -> list[tuple[str, str]]:
    """The lines (text, colour) of one question."""
    answer, reference = question.answer.strip(), question.reference
    is_right = reference is None or answer == reference.strip()
    colour = UNKNOWN_COLOUR if reference is None else RIGHT_COLOUR if is_right else WRONG_COLOUR
    lines = [(line, "black") for line in textwrap.wrap(question.question, 44)]
    lines += [(line, colour) for line in textwrap.wrap("→ " + (answer or "(nothing)"), 44)]
    if not is_right:
        lines += [(line, REFERENCE_COLOUR) for line in textwrap.wrap(f"right: {reference}", 44)]
    return lines


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Exponential moving average over about a twentieth of the values, without a slow start."""
    decay = 1 - 1 / max(1.0, len(values) / 20)
    averages, total, weight = np.empty_like(values), 0.0, 0.0
    for n, value in enumerate(values):
        total, weight = decay * total + value, decay * weight + 1
        averages[n] = total / weight
    return averages


def _outline(axis: "Axes", tokens: NDArray[Any], size: tuple[int, int]) -> None:
    """Lines between cells of different tokens."""
    from matplotlib.collections import LineCollection

    width, height = size[0] / tokens.shape[1], size[1] / tokens.shape[0]
    rows, columns = np.nonzero(tokens[1:] != tokens[:-1])  # below these cells
    y, x = (rows + 1) * height - 0.5, columns * width - 0.5
    lines = [np.stack([x, y, x + width, y], axis=1)]
    rows, columns = np.nonzero(tokens[:, 1:] != tokens[:, :-1])  # right of these
    y, x = rows * height - 0.5, (columns + 1) * width - 0.5
    lines.append(np.stack([x, y, x, y + height], axis=1))
    segments = np.concatenate(lines).reshape(-1, 2, 2)
    for colour, thickness in (("black", 2.4), ("#ffd60a", 1.3)):
        axis.add_collection(
            LineCollection(list(segments), colors=colour, linewidths=thickness, capstyle="round")
        )


def _draw_image(axis: "Axes", image: "Image") -> None:
    axis.imshow(np.asarray(image), interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)


def _make_axes(rows: int, columns: int, width: float, height: float) -> tuple["Figure", list[list["Axes"]]]:
    """A figure of `rows` × `columns` axes, each `width` × `height` inches; drawn without a display."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(f"figures: {install_hint('matplotlib')} ({error})") from None
    figure = Figure(figsize=(width * columns + 0.4, height * rows + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [list(row) for row in figure.subplots(rows, columns, squeeze=False)]


def _save(figure: "Figure", path: StrPath) -> None:
    with write_aside(Path(path)) as temporary_path:
        figure.savefig(temporary_path, format="png", dpi=130)
