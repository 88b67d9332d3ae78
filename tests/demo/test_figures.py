"""Figures: each is written whole, as a picture that shows what it was given."""

import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from being_vl.demo.figures import (
    FigureQuestion,
    draw_answers,
    draw_losses,
    draw_reconstructions,
    draw_token_map,
)

RED, BLUE = Image.new("RGB", (64, 64), (215, 40, 45)), Image.new("RGB", (64, 64), (45, 80, 220))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).reshape(-1, 3)


def count(path: Path, colour: tuple[int, int, int]) -> int:
    return int((np.abs(pixels(path).astype(int) - colour) < 12).all(1).sum())


def test_reconstructions_show_all_pictures(tmp_path: Path) -> None:
    path = tmp_path / "new" / "back.png"
    draw_reconstructions(path, {"original": [RED, BLUE], "VQ": [BLUE, BLUE]})
    assert count(path, (45, 80, 220)) > 2.5 * count(path, (215, 40, 45)) > 0


def test_token_map_outlines_tokens(tmp_path: Path) -> None:
    one_token, many_tokens = np.zeros((8, 8), int), np.arange(64).reshape(8, 8)
    for name, regions in (("one", one_token), ("many", many_tokens)):
        draw_token_map(tmp_path / f"{name}.png", [RED], [regions])
    assert count(tmp_path / "one.png", (255, 214, 10)) == 0
    assert count(tmp_path / "many.png", (255, 214, 10)) > 1000


def test_losses_of_each_stage(tmp_path: Path) -> None:
    log = [{"stage": s, "step": n, "loss": 1 / n} for s in ("stage1", "stage2") for n in range(1, 40)]
    draw_losses(str(tmp_path / "two.png"), log)
    draw_losses(tmp_path / "one.png", log[:39])
    two_stages, one_stage = (Image.open(tmp_path / f"{name}.png").size for name in ("two", "one"))
    assert two_stages[0] > 1.5 * one_stage[0]
    assert count(tmp_path / "two.png", (11, 94, 215)) > 100


def test_answers_are_green_or_red(tmp_path: Path) -> None:
    right_answer, wrong_answer = (
        FigureQuestion("what?", "a red circle", "a red circle"),
        FigureQuestion("how many?", "two", "three"),
    )
    for name, question in (("right", right_answer), ("wrong", wrong_answer)):
        draw_answers(tmp_path / f"{name}.png", [BLUE] * 5, [[question]] * 5)
    green, red = (26, 127, 55), (180, 35, 24)
    assert count(tmp_path / "right.png", green) > 20
    assert count(tmp_path / "right.png", red) == 0
    assert count(tmp_path / "wrong.png", red) > 20
    assert count(tmp_path / "wrong.png", green) == 0


def test_matplotlib_is_imported_when_it_is_used() -> None:
    code = "import being_vl.demo.figures, sys; assert 'matplotlib' not in sys.modules, 'imported'"
    subprocess.run([sys.executable, "-c", code], check=True)
