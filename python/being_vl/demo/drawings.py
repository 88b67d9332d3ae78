"""Drawings of a finished demo: reconstructions, token maps, losses, and what the model said."""

import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from being_vl.demo.exam import Answered
from being_vl.demo.figures import Asked, draw_answers, draw_losses, draw_reconstructions, draw_token_map
from being_vl.demo.scoring import normalised
from being_vl.quantize.base import load_quantizer
from being_vl.tokenizer import VisualBPE

PICTURES = 8
SHOWN = ("caption", "colour", "count", "higher")
"""Kinds of question that are shown, one of each."""


@dataclass
class DrawingsOptions:
    """Options of drawing.

    Args:
        demo: Folder of the demo.
        out: Folder for the drawings.
        quantizer: The quantizer of the demo.
    """

    demo: Path
    out: Path
    quantizer: str = "builtin"


def draw_all(options: DrawingsOptions) -> None:
    """Draw the first held-out pictures and the losses; nothing is chosen by how well it went."""
    answered = [
        Answered(**json.loads(line))
        for line in (options.demo / "exam" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    names = list(dict.fromkeys(answer.image for answer in answered))[:PICTURES]
    pictures = []
    for name in names:
        with Image.open(options.demo / "held-out" / "images" / name) as image:
            pictures.append(image.convert("RGB"))
    quantizer = load_quantizer(options.quantizer)
    grids = quantizer.encode(pictures)
    bpe = VisualBPE.load(options.demo / "vocabulary.json")
    options.out.mkdir(parents=True, exist_ok=True)
    draw_reconstructions(
        options.out / "reconstructions.png", {"picture": pictures, "from its ids": quantizer.decode(grids)}
    )
    regions = [bpe.encode(grid, return_regions=True)[1] for grid in grids]
    draw_token_map(options.out / "tokens.png", pictures, regions)
    draw_answers(options.out / "answers.png", pictures, [_shown(answered, name) for name in names])
    log = [
        json.loads(line)
        for folder in ("text", "training")
        for line in (options.demo / folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    draw_losses(options.out / "losses.png", [entry for entry in log if "loss" in entry])


def _shown(answered: list[Answered], image: str) -> list[Asked]:
    """One question of each kind in `SHOWN` about a picture, the first that was asked."""
    first: dict[str, Answered] = {}
    for answer in answered:
        if answer.image == image and answer.kind in SHOWN:
            first.setdefault(answer.kind, answer)
    return [
        Asked(first[kind].question, normalised(first[kind].right), normalised(first[kind].reference))
        for kind in SHOWN
        if kind in first
    ]
