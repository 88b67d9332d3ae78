"""What training says: a JSON line per step, TensorBoard, a progress bar or log lines."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import distributed as dist
from torch.utils.tensorboard import SummaryWriter

from being_vl.errors import ConfigError
from being_vl.extras import install_hint
from being_vl.files import name_write_errors, write_aside
from being_vl.fingerprints import compute_fingerprint
from being_vl.options import StrPath
from being_vl.progress import progress_bar

log = logging.getLogger(__name__)

LOG_FILE = "log.jsonl"
LINES_PER_STAGE = 20
"""About how many log lines a stage writes where nobody sees a progress bar."""


class TrainingLog:
    """Writes `log.jsonl` and `tensorboard/` in `out`, and shows progress of one stage; on rank 0, the others look on.

    Args:
        out: Folder of the training.
        stage: Name of the stage.
        steps: Optimizer steps of the stage.
        resumed_step: Steps that a checkpoint holds, 0 without one. What an earlier start logged beyond them is
            removed, so that each step is logged once.
        steps_before: Optimizer steps of the earlier stages, the origin of TensorBoard's step.
        wandb: Project of Weights & Biases; None for none.
        settings: What Weights & Biases shows as the training's options, plain JSON.

    Attributes:
        entries: This stage's steps so far, on every rank.
        text_perplexity: What `add_perplexity` has logged last, in this stage or the one before; None at first.

    Raises:
        ConfigError: if Weights & Biases is asked for but not installed.
    """

    def __init__(
        self,
        out: StrPath,
        stage: str,
        steps: int,
        resumed_step: int,
        steps_before: int,
        wandb: str | None = None,
        settings: Any = None,
    ) -> None:
        self.stage, self.steps, self.steps_before = stage, steps, steps_before
        out = Path(out)
        path = out / LOG_FILE
        self._out = out
        self._is_writer = dist.get_rank() == 0
        # Rank 0 reads what earlier starts have logged, without the steps that are taken again.
        entries = read_log(path) if self._is_writer else []
        entries = [e for e in entries if e["stage"] != stage or 0 < resumed_step >= e["step"]]
        perplexities = [entry["text_perplexity"] for entry in entries if "text_perplexity" in entry]
        steps_logged = [entry for entry in entries if entry["stage"] == stage and "loss" in entry]
        message: list[Any] = [steps_logged, perplexities[-1] if perplexities else None]
        dist.broadcast_object_list(message)
        self.entries: list[dict[str, Any]] = message[0]
        self.text_perplexity: float | None = message[1]
        if not self._is_writer:
            return
        # The log goes on behind what is left of it.
        with write_aside(path) as temporary_path:
            temporary_path.write_text(
                "".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8"
            )
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=steps_before + resumed_step + 1)
        self._wandb = _start_wandb(out.resolve(), wandb, settings) if wandb else None
        self._line_interval = max(1, steps // LINES_PER_STAGE)
        self._bar = progress_bar(steps, "step", stage, resumed_step)

    def add_step(self, entry: dict[str, Any]) -> None:
        """Log one optimizer step; `entry` has at least step, loss, learning_rate, tokens_per_second and mfu."""
        if not self._is_writer:
            return
        self._write(entry)
        self._bar.set_postfix(loss=f"{entry['loss']:.4f}", refresh=False)
        self._bar.update()
        if self._bar.disable and (entry["step"] % self._line_interval == 0 or entry["step"] == self.steps):
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

    def add_perplexity(self, step: int, perplexity: float) -> None:
        """Log the perplexity on a text after a step, 0 for before the first."""
        self.text_perplexity = perplexity
        if self._is_writer:
            log.info("%s, after step %d: perplexity of the text %.4g", self.stage, step, perplexity)
            self._write({"step": step, "text_perplexity": perplexity})

    def _write(self, entry: dict[str, Any]) -> None:
        with name_write_errors(self._out / LOG_FILE):
            self._file.write(json.dumps({"stage": self.stage, **entry}) + "\n")
        scalars, step = dict(_scalars(entry)), self.steps_before + entry["step"]
        with name_write_errors(self._out / "tensorboard"):
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(scalars, step=step)

    def close(self) -> None:
        """Flush and close."""
        if not self._is_writer:
            return
        self._bar.close()
        self._board.close()
        if self._wandb:
            self._wandb.finish()
        self._file.close()


def _start_wandb(out: Path, project: str, settings: Any) -> Any:
    """A run of Weights & Biases, the same one for all stages and when resumed; where it goes, its environment says."""
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(f"logging.wandb: {install_hint('wandb')}") from error
    return wandb.init(
        project=project,
        name=out.name,
        id=compute_fingerprint([str(out), project])[:16],
        resume="allow",
        dir=str(out),
        config=settings,
    )


def _scalars(entry: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of an entry but `step`, those of a dict under `outer/inner`."""
    for key, value in entry.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and key != "step":
            yield prefix + key, value


def read_log(path: StrPath) -> list[dict[str, Any]]:
    """Read `log.jsonl`; a last line that kill -9 cut short is left out."""
    path = Path(path)
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries
