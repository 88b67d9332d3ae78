"""Drawings of a finished demo: reconstructions, token maps, losses, and the model's answers."""

import json
from dataclasses import dataclass
from pathlib import Path

from being_vl.demo.exam import ExamAnswer
from being_vl.demo.figures import (
    FigureQuestion,
    draw_answers,
    draw_losses,
    draw_reconstructions,
    draw_token_map,
)
from being_vl.demo.scoring import normalise
from being_vl.images.decode import read_image
from being_vl.options import Options
from being_vl.quantizer.base import load_quantizer
from being_vl.tokenizer import VisualBPE

NUM_PICTURES = 8
QUESTION_KINDS = ("caption", "colour", "count", "higher")
"""Kinds of question that are drawn, one of each."""


@dataclass
class DrawingsOptions(Options):
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
    lines = (options.demo / "exam" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [ExamAnswer(**json.loads(line)) for line in lines]
    names = list(dict.fromkeys(answer.image for answer in answers))[:NUM_PICTURES]
    pictures = [read_image(options.demo / "held-out" / "images" / name) for name in names]
    # Pictures through the quantizer and back, and the tokens that cover them.
    quantizer = load_quantizer(options.quantizer)
    grids = quantizer.encode(pictures)
    bpe = VisualBPE.load(options.demo / "vocabulary.json")
    options.out.mkdir(parents=True, exist_ok=True)
    draw_reconstructions(
        options.out / "reconstructions.png", {"picture": pictures, "from its ids": quantizer.decode(grids)}
    )
    regions = [bpe.encode(grid, return_regions=True)[1] for grid in grids]
    draw_token_map(options.out / "tokens.png", pictures, regions)
    # Questions about them, and how the training went.
    questions = [_select_questions(answers, name) for name in names]
    draw_answers(options.out / "answers.png", pictures, questions)
    log = [
        json.loads(line)
        for folder in ("text/training", "training")
        for line in (options.demo / folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    draw_losses(options.out / "losses.png", [entry for entry in log if "loss" in entry])


def _select_questions(answers: list[ExamAnswer], image: str) -> list[FigureQuestion]:
    """One question of each kind in `QUESTION_KINDS` about a picture, the first that was asked."""
    first_of_kind: dict[str, ExamAnswer] = {}
    for answer in answers:
        if answer.image == image:
            first_of_kind.setdefault(answer.kind, answer)
    selection = [first_of_kind[kind] for kind in QUESTION_KINDS if kind in first_of_kind]
    return [FigureQuestion(a.question, normalise(a.right), normalise(a.reference)) for a in selection]
