"""What training says: a JSON line per step, TensorBoard, and progress on the terminal."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from being_vl.files import write_aside

log = logging.getLogger(__name__)


class TrainingLog:
    """Writes `log.jsonl` and `tensorboard/` in `out`, and shows progress of one stage.

    Args:
        out: The run's folder.
        stage: Name of the stage.
        steps: Optimizer steps of the stage.
        done: Steps that a checkpoint holds; what an earlier run logged beyond them is removed, so that a resumed
            run leaves each step once.
        before: Optimizer steps of the earlier stages, the origin of TensorBoard's step.
    """

    def __init__(self, out: Path, stage: str, steps: int, done: int, before: int) -> None:
        self.stage, self.steps, self.before = stage, steps, before
        path = out / "log.jsonl"
        kept = [entry for entry in read_log(path) if entry["stage"] != stage or entry["step"] <= done]
        with write_aside(path) as aside:
            aside.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=before + done + 1)
        self._every = max(1, steps // 20)
        self._bar = tqdm(desc=stage, total=steps, initial=done, unit="step", disable=not sys.stderr.isatty())

    def step(self, entry: dict[str, Any]) -> None:
        """Log one optimizer step; `entry` has at least step, loss and learning_rate."""
        self._file.write(json.dumps({"stage": self.stage, **entry}) + "\n")
        for key, value in entry.items():
            if isinstance(value, int | float) and key != "step":
                self._board.add_scalar(key, value, self.before + entry["step"])
        self._bar.update()
        self._bar.set_postfix(loss=f"{entry['loss']:.4f}")
        if self._bar.disable and (entry["step"] % self._every == 0 or entry["step"] == self.steps):
            log.info(
                "%s step %d/%d: loss %.4f, learning rate %.2e, %.0f tokens/s",
                self.stage,
                entry["step"],
                self.steps,
                entry["loss"],
                entry["learning_rate"],
                entry["tokens_per_second"],
            )

    def close(self) -> None:
        """Flush and close."""
        self._bar.close()
        self._board.close()
        self._file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read `log.jsonl`; a last line that kill -9 cut short is left out."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries
