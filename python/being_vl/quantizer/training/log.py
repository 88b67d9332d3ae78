"""The log of a quantizer's training: `log.jsonl`, TensorBoard, and sheets of reconstructions."""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from being_vl.files import name_write_errors, write_aside

log = logging.getLogger(__name__)


class TrainingLog:
    """Writes what happens in each step, and goes on where a checkpoint was made; for a `with` statement.

    Args:
        folder: Where `log.jsonl`, `tensorboard/` and `reconstructions/` lie.
        step: The checkpoint's step; what was written of later steps is forgotten.
        steps: How many the training has.
    """

    def __init__(self, folder: Path, step: int, steps: int) -> None:
        self.folder, self.steps = folder, steps
        _cut_log(folder / "log.jsonl", step)
        self._file = (folder / "log.jsonl").open("a", encoding="utf-8", buffering=1)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._board.close()

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write a step's metrics: numbers, and numbers of each folder of images."""
        with name_write_errors(self.folder / "log.jsonl"):
            self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        with name_write_errors(self.folder / "tensorboard"):
            for name, value in _flatten(metrics):
                self._board.add_scalar(name, value, step)
        log.info("step %d/%d: %s", step, self.steps, dict(metrics))

    def draw(self, step: int, sheet: NDArray[np.uint8]) -> None:
        """Save a sheet of reconstructions, (height, width, 3)."""
        folder = self.folder / "reconstructions"
        folder.mkdir(exist_ok=True)
        with write_aside(folder / f"{step:07d}.png") as temporary_path:
            Image.fromarray(sheet).save(temporary_path, "PNG")
        self._board.add_image("reconstructions", sheet, step, dataformats="HWC")


def _cut_log(path: Path, step: int) -> None:
    """Remove lines that are cut off, and those of steps after `step`."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    valid_lines = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    with write_aside(path) as temporary_path:
        temporary_path.write_text("".join(valid_lines), encoding="utf-8")


def _flatten(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Names and numbers; of a folder's numbers, `name/folder`."""
    for name, value in metrics.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{Path(folder).name}", number) for folder, number in value.items())
        else:
            yield name, value
