"""What training says: a JSON line per step, TensorBoard, and progress on the terminal."""

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import distributed as dist
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from being_vl.files import write_aside

log = logging.getLogger(__name__)


class TrainingLog:
    """Writes `log.jsonl` and `tensorboard/` in `out`, and shows progress of one stage; on rank 0, the others look on.

    Args:
        out: The run's folder.
        stage: Name of the stage.
        steps: Optimizer steps of the stage.
        done: Steps that a checkpoint holds; what an earlier run logged beyond them is removed, so that a resumed
            run leaves each step once.
        before: Optimizer steps of the earlier stages, the origin of TensorBoard's step.

    Attributes:
        entries: This stage's steps so far, on every rank.
    """

    def __init__(self, out: Path, stage: str, steps: int, done: int, before: int) -> None:
        self.stage, self.steps, self.before = stage, steps, before
        path = out / "log.jsonl"
        kept = [entry for entry in read_log(path) if entry["stage"] != stage or entry["step"] <= done]
        shared = [[entry for entry in kept if entry["stage"] == stage]]
        dist.broadcast_object_list(shared)
        self.entries = shared[0]
        self._writes = dist.get_rank() == 0
        if not self._writes:
            return
        with write_aside(path) as aside:
            aside.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=before + done + 1)
        self._every = max(1, steps // 20)
        self._bar = tqdm(desc=stage, total=steps, initial=done, unit="step", disable=not sys.stderr.isatty())

    def step(self, entry: dict[str, Any]) -> None:
        """Log one optimizer step; `entry` has at least step, loss and learning_rate."""
        if not self._writes:
            return
        self._file.write(json.dumps({"stage": self.stage, **entry}) + "\n")
        for name, value in _scalars(entry):
            self._board.add_scalar(name, value, self.before + entry["step"])
        self._bar.update()
        self._bar.set_postfix(loss=f"{entry['loss']:.4f}")
        if self._bar.disable and (entry["step"] % self._every == 0 or entry["step"] == self.steps):
            log.info(
                "%s step %d/%d: loss %.4f, learning rate %.2e, %.0f tokens/s, MFU %s",
                self.stage,
                entry["step"],
                self.steps,
                entry["loss"],
                entry["learning_rate"],
                entry["tokens_per_second"],
                "n/a" if entry["mfu"] is None else f"{entry['mfu']:.1%}",
            )

    def close(self) -> None:
        """Flush and close."""
        if not self._writes:
            return
        self._bar.close()
        self._board.close()
        self._file.close()


def _scalars(entry: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of an entry but `step`, those of a dict under `its key/their key`."""
    for key, value in entry.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and key != "step":
            yield prefix + key, value


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read `log.jsonl`; a last line that kill -9 cut short is left out."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries
