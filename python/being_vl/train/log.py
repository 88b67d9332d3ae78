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

from being_vl.errors import ConfigError
from being_vl.extras import install_hint
from being_vl.files import to_jsonable, write_aside
from being_vl.fingerprints import compute_fingerprint
from being_vl.train.options import TrainOptions

log = logging.getLogger(__name__)


class TrainingLog:
    """Writes `log.jsonl` and `tensorboard/` in `out`, and shows progress of one stage; on rank 0, the others look on.

    Args:
        options: Of the training, whose `out` is the run's folder.
        stage: Name of the stage.
        steps: Optimizer steps of the stage.
        done: Steps that a checkpoint holds; what an earlier run logged beyond them is removed, so that a resumed
            run leaves each step once.
        before: Optimizer steps of the earlier stages, the origin of TensorBoard's step.

    Attributes:
        entries: This stage's steps so far, on every rank.
        text_perplexity: What `probe` has logged last, in this stage or the one before; None at first.

    Raises:
        ConfigError: if Weights & Biases is asked for but not installed.
    """

    def __init__(self, options: TrainOptions, stage: str, steps: int, done: int, before: int) -> None:
        self.stage, self.steps, self.before = stage, steps, before
        out = options.out
        path = out / "log.jsonl"
        logged = read_log(path) if dist.get_rank() == 0 else []
        kept = [entry for entry in logged if entry["stage"] != stage or 0 < done >= entry["step"]]
        probes = [entry["text_perplexity"] for entry in kept if "text_perplexity" in entry]
        steps_taken = [entry for entry in kept if entry["stage"] == stage and "loss" in entry]
        shared: list[Any] = [steps_taken, probes[-1] if probes else None]
        dist.broadcast_object_list(shared)
        self.entries: list[dict[str, Any]] = shared[0]
        self.text_perplexity: float | None = shared[1]
        self._writes = dist.get_rank() == 0
        if not self._writes:
            return
        with write_aside(path) as aside:
            aside.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=before + done + 1)
        self._wandb = _wandb(options, stage) if options.logging.wandb else None
        self._every = max(1, steps // 20)
        self._bar = tqdm(desc=stage, total=steps, initial=done, unit="step", disable=not sys.stderr.isatty())

    def step(self, entry: dict[str, Any]) -> None:
        """Log one optimizer step; `entry` has at least step, loss and learning_rate."""
        if not self._writes:
            return
        self._write(entry)
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

    def probe(self, step: int, perplexity: float) -> None:
        """Log the perplexity on a text after a step, 0 for before the first."""
        self.text_perplexity = perplexity
        if self._writes:
            log.info("%s, after step %d: perplexity of the text %.4g", self.stage, step, perplexity)
            self._write({"step": step, "text_perplexity": perplexity})

    def _write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps({"stage": self.stage, **entry}) + "\n")
        scalars, step = dict(_scalars(entry)), self.before + entry["step"]
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(scalars, step=step)

    def close(self) -> None:
        """Flush and close."""
        if not self._writes:
            return
        self._bar.close()
        self._board.close()
        if self._wandb:
            self._wandb.finish()
        self._file.close()


def _wandb(options: TrainOptions, stage: str) -> Any:
    """A run of Weights & Biases, the same one for all stages and when resumed; where it goes, its environment says."""
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(f"logging.wandb: {install_hint('wandb')}") from error
    out = options.out.resolve()
    identity = compute_fingerprint([str(out), options.logging.wandb])[:16]
    return wandb.init(
        project=options.logging.wandb,
        name=out.name,
        id=identity,
        resume="allow",
        dir=str(out),
        config=to_jsonable(options),
    )


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
