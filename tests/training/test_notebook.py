"""What a training shows where nobody has set up logging: in a notebook, and in a script."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.ranks import ENVIRONMENT

CODE = """
from being_vl.training.engine import train
from being_vl.training.options import StageOptions, TrainOptions

stage = StageOptions("one", 0, 1e-3, max_steps=3)
train(TrainOptions({model!r}, [{records!r}], {out!r}, {grids!r}, stages=[stage]))
"""


@pytest.fixture
def code(chain: Path, tmp_path: Path) -> str:
    """A training of three steps; its paths are strings."""
    paths = {"model": chain / "tied", "records": chain / "data" / "train.json", "grids": chain / "grids"}
    return CODE.format(out=str(tmp_path / "run"), **{name: str(path) for name, path in paths.items()})


def test_a_notebook_shows_a_bar_with_the_loss(code: str, tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("ipywidgets")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    client = nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3")
    client.execute(env=os.environ | ENVIRONMENT, cwd=str(tmp_path))
    (cell,) = notebook.cells
    lines = "".join(output.get("text", "") for output in cell.outputs)
    assert "one: what trains" in lines
    assert "one: saved to" in lines
    widgets = notebook.metadata["widgets"]["application/vnd.jupyter.widget-state+json"]["state"]
    texts = [str(widget["state"].get("value")) for widget in widgets.values()]
    assert any("3/3" in text and "loss=" in text for text in texts), texts
    assert "step 3/3" not in lines


@pytest.mark.parametrize(
    "setup", ["", "import logging; logging.basicConfig(level='INFO', format='%(message)s')"]
)
def test_a_script_shows_lines_with_the_losses_once(code: str, setup: str, tmp_path: Path) -> None:
    environment = os.environ | ENVIRONMENT
    words = [sys.executable, "-c", setup + code]
    process = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert process.returncode == 0, process.stderr[-4000:]
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    for step, loss in enumerate(losses, start=1):
        assert process.stderr.count(f"one step {step}/3: loss {loss:.4f}") == 1
