"""Draw the diagrams of docs/internals as SVG files that need no network: `python docs/make_figures.py`.

Boxes are light and arrows grey on a transparent ground, so that they can be read in light and in dark mode.
"""

from html import escape
from pathlib import Path
from typing import NamedTuple

IMAGES = Path(__file__).parent / "images"
COLUMN, ROW, LINE = 190, 100, 16
"""Pixels from one column or row of boxes to the next, and from one line of text to the next."""
WIDTH, HEIGHT, MARGIN = 160, 66, 12


class Box(NamedTuple):
    """A box in a column and a row, which may be fractions; its first line is its title."""

    column: float
    row: float
    lines: tuple[str, ...]

    def middle(self) -> tuple[float, float]:
        """Pixels of its centre."""
        return MARGIN + self.column * COLUMN + WIDTH / 2, MARGIN + self.row * ROW + HEIGHT / 2


class Arrow(NamedTuple):
    """An arrow from one box to another, `curvature` pixels to the side of the straight line."""

    start: str
    end: str
    text: str = ""
    curvature: float = 0


def box_svg(box: Box) -> str:
    """A box as SVG."""
    x, y = box.middle()
    top = y - (len(box.lines) - 1) * LINE / 2 + 4
    texts = "".join(
        f'<text x="{x:g}" y="{top + number * LINE:g}" class="{"note" if number else "title"}">{escape(line)}</text>'
        for number, line in enumerate(box.lines)
    )
    corner = f'x="{x - WIDTH / 2:g}" y="{y - HEIGHT / 2:g}"'
    return f'<rect {corner} width="{WIDTH}" height="{HEIGHT}" rx="6"/>{texts}'


def arrow_svg(arrow: Arrow, boxes: dict[str, Box]) -> str:
    """An arrow as SVG, from edge to edge."""
    (x1, y1), (x2, y2) = boxes[arrow.start].middle(), boxes[arrow.end].middle()
    dx, dy = x2 - x1, y2 - y1
    length = (dx * dx + dy * dy) ** 0.5
    # The control point of the curve stands beside the middle of the straight line.
    cx, cy = (x1 + x2) / 2 - dy / length * arrow.curvature, (y1 + y2) / 2 + dx / length * arrow.curvature
    sx, sy = edge_point((x1, y1), (cx, cy))
    ex, ey = edge_point((x2, y2), (cx, cy))
    path = f'<path d="M{sx:.1f} {sy:.1f} Q{cx:.1f} {cy:.1f} {ex:.1f} {ey:.1f}" marker-end="url(#head)"/>'
    tx, ty = (sx + 2 * cx + ex) / 4, (sy + 2 * cy + ey) / 4
    return path + (
        f'<text x="{tx:.1f}" y="{ty - 5:.1f}" class="arrow">{escape(arrow.text)}</text>' if arrow.text else ""
    )


def edge_point(centre: tuple[float, float], target: tuple[float, float]) -> tuple[float, float]:
    """Where the line from a box's centre towards a point leaves the box, with a gap of 4 pixels."""
    dx, dy = target[0] - centre[0], target[1] - centre[1]
    half_width, half_height = WIDTH / 2 + 4, HEIGHT / 2 + 4
    scale = min(half_width / abs(dx) if dx else 1e9, half_height / abs(dy) if dy else 1e9)
    return centre[0] + dx * scale, centre[1] + dy * scale


STYLE = """
rect { fill: #eef2fb; stroke: #5b6fb5; }
path { fill: none; stroke: #8a8f9c; stroke-width: 1.6; }
marker path { fill: #8a8f9c; stroke: none; }
text { font: 12px system-ui, sans-serif; text-anchor: middle; fill: #1d2333; }
.title { font-weight: 600; }
.note { font-size: 11px; fill: #3c4357; }
.arrow { font-size: 11px; fill: #8a8f9c; }
"""


def draw(name: str, title: str, boxes: dict[str, Box], arrows: list[Arrow]) -> None:
    """Write one diagram."""
    width = 2 * MARGIN + WIDTH + COLUMN * max(box.column for box in boxes.values())
    height = 2 * MARGIN + HEIGHT + ROW * max(box.row for box in boxes.values())
    head = '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        f'<defs>{head}<path d="M0 0 L8 4 L0 8 z"/></marker></defs>',
        *(arrow_svg(arrow, boxes) for arrow in arrows),
        *(box_svg(box) for box in boxes.values()),
        "</svg>",
    ]
    (IMAGES / f"{name}.svg").write_text("\n".join(parts) + "\n", encoding="utf-8")


def draw_training_loop() -> None:
    """How the vocabulary's trainer works, merge after merge."""
    draw(
        "training-loop",
        "The loop of the vocabulary's trainer: count, select, join, update, repeat",
        {
            "count": Box(0, 0, ("1. count", "pairs from a threshold on", "are indexed")),
            "select": Box(1, 0, ("2. select", "the largest F + α·S", "one thread")),
            "join": Box(2, 0, ("3. join", "every occurrence", "each thread its shard")),
            "update": Box(3, 0, ("4. update", "differences of counts,", "lists of new pairs")),
            "repeat": Box(2, 1, ("5. repeat", "until enough merges", "or no candidate")),
        },
        [
            Arrow("count", "select"),
            Arrow("select", "join"),
            Arrow("join", "update"),
            Arrow("update", "repeat"),
            Arrow("repeat", "select"),
        ],
    )


def draw_encoding() -> None:
    """How a grid becomes tokens."""
    draw(
        "encoding",
        "Encoding a grid: list pairs, take marked merges in order, put out tokens",
        {
            "grid": Box(0, 0, ("grid", "height × width ids")),
            "pairs": Box(1, 0, ("1. pairs of cells", "bit filter, then table", "marks merges")),
            "merges": Box(2, 0, ("2. marked merges", "in order of learning", "each marks later ones")),
            "tokens": Box(3, 0, ("3. tokens", "in reading order", "of their anchors")),
        },
        [Arrow("grid", "pairs"), Arrow("pairs", "merges"), Arrow("merges", "tokens")],
    )


def draw_steps_and_files() -> None:
    """Which step reads and writes which files."""
    draw(
        "steps-and-files",
        "The steps of a run and the files through which they meet",
        {
            "images": Box(0, 0, ("images", "folders, tars, tables")),
            "grids": Box(1, 0, ("grids", "quantize", "Arrow shards, manifest")),
            "vocabulary": Box(2, 0, ("vocabulary", "vocab train", "one JSON file")),
            "expanded": Box(3, 0, ("expanded LLM", "expand", "plain weights")),
            "records": Box(0, 1, ("records", "LLaVA JSON and others")),
            "prepared": Box(2, 1, ("prepared records", "prepare", "Arrow shards, manifest")),
            "trained": Box(3, 1, ("trained LLM", "train", "plain weights per stage")),
        },
        [
            Arrow("images", "grids"),
            Arrow("grids", "vocabulary"),
            Arrow("vocabulary", "expanded"),
            Arrow("records", "prepared"),
            Arrow("grids", "prepared"),
            Arrow("expanded", "prepared"),
            Arrow("prepared", "trained"),
            Arrow("expanded", "trained"),
        ],
    )


def draw_training_step() -> None:
    """What happens in one optimizer step."""
    draw(
        "training-step",
        "One optimizer step of the LLM's training",
        {
            "schedule": Box(0, 0, ("schedule", "mixture, packing, rates", "from the seed alone")),
            "batch": Box(1, 0, ("micro-batches", "this rank's rows", "workers read ahead")),
            "sum": Box(2, 0, ("label tokens", "summed over all ranks")),
            "backward": Box(3, 0, ("forward, backward", "logits in chunks", "at label tokens only")),
            "watch": Box(3, 1, ("watch", "take, skip or stop", "inside DeepSpeed's step")),
            "log": Box(2, 1, ("log", "log.jsonl, TensorBoard")),
            "checkpoint": Box(1, 1, ("checkpoint", "copied, then written", "in the background")),
        },
        [
            Arrow("schedule", "batch"),
            Arrow("batch", "sum"),
            Arrow("sum", "backward"),
            Arrow("backward", "watch"),
            Arrow("watch", "log"),
            Arrow("log", "checkpoint"),
            Arrow("checkpoint", "batch"),
        ],
    )


def draw_sharded_job() -> None:
    """How ranks share a job."""
    draw(
        "sharded-job",
        "A sharded job: ranks write their shards aside, rank 0 writes the manifest last",
        {
            "claim": Box(0, 0.5, ("1. claim", "fingerprint, the same", "shards on every rank")),
            "rank0": Box(1, 0, ("2. rank 0", "shards 0, 2, 4, …", "aside, sync, rename")),
            "rank1": Box(1, 1, ("2. rank 1", "shards 1, 3, 5, …", "aside, sync, rename")),
            "wait": Box(2, 0.5, ("3. rank 0 waits", "until all shards are there,", "removes stale files")),
            "manifest": Box(3, 0.5, ("manifest", "counts, checksums, faults", "finished")),
        },
        [
            Arrow("claim", "rank0"),
            Arrow("claim", "rank1"),
            Arrow("rank0", "wait"),
            Arrow("rank1", "wait"),
            Arrow("wait", "manifest"),
        ],
    )


def draw_rooms() -> None:
    """Which part of the package imports from which."""
    draw(
        "rooms",
        "Imports point one way: each room imports from rooms further down the arrows only",
        {
            "cli": Box(0, 0, ("cli", "commands, completion")),
            "run": Box(1, 0, ("run, demo", "the chain")),
            "launch": Box(2, 0, ("launch, estimate", "and recipes")),
            "training": Box(3, 0, ("training", "stages, checkpoints")),
            "model": Box(3, 1, ("model", "expand, ask")),
            "data": Box(2, 1, ("data", "records, sequences")),
            "quantizer": Box(1, 1, ("quantizer", "images to grids")),
            "tokenizer": Box(0, 1, ("tokenizer", "visual BPE")),
            "shards": Box(0, 2, ("images, shards", "decoding, jobs, grids")),
            "ground": Box(1, 2, ("ground", "layout, options, files,", "fingerprints, errors")),
            "core": Box(2, 2, ("_core", "Rust")),
        },
        [
            Arrow("cli", "run"),
            Arrow("run", "launch"),
            Arrow("launch", "training"),
            Arrow("training", "model"),
            Arrow("model", "data"),
            Arrow("data", "quantizer"),
            Arrow("quantizer", "tokenizer"),
            Arrow("tokenizer", "shards"),
            Arrow("shards", "ground"),
            Arrow("ground", "core"),
        ],
    )


def main() -> None:
    """Draw all of them."""
    draw_training_loop()
    draw_encoding()
    draw_steps_and_files()
    draw_training_step()
    draw_sharded_job()
    draw_rooms()


if __name__ == "__main__":
    main()
