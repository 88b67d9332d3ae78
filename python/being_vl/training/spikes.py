"""Steps whose loss or gradient is not finite, or far from what it was: found before they reach the weights."""

import logging
import math
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from being_vl.errors import TrainingError
from being_vl.names import show_name
from being_vl.training.log import LOG_FILE
from being_vl.training.options import SpikeOptions

log = logging.getLogger(__name__)

WINDOW, MIN_STEPS = 100, 20
"""Steps looked back on, and steps before anything is called a spike."""
MAX_SKIPS = 10
"""Steps skipped one after another before training stops."""
SHOWN_RECORDS = 3
"""Records of a step that a message names; `log.jsonl` names all."""
MIN_DEVIATION = 0.01
"""Least standard deviation of the logarithms, for losses that hardly vary."""


class SpikeGuard:
    """Stands between DeepSpeed and the optimizer: a spike is not taken, if so asked, and a NaN never is.

    A spike is a loss or gradient norm whose logarithm is more than `deviations` robust standard deviations (1.4826
    times the median absolute deviation) above the median of the last 100 steps that were taken. DeepSpeed knows the
    norm only inside its own step, so it is there that the guard decides, from numbers that are the same on all ranks.

    Args:
        engine: DeepSpeed's engine.
        optimizer: The optimizer that it was given; its `step` is replaced.
        options: What a spike is, and what is done about it.
        entries: The log's entries of the steps so far, when resumed.
    """

    def __init__(
        self,
        engine: Any,
        optimizer: torch.optim.Optimizer,
        options: SpikeOptions,
        entries: Sequence[dict[str, Any]],
    ) -> None:
        self._engine, self._action, self._deviations = engine, options.action, options.deviations
        history = [(entry["loss"], entry["gradient_norm"]) for entry in entries if not entry["skipped"]]
        self._history = deque(history, maxlen=WINDOW)
        # How many of the last steps, one after another, were skipped.
        flags = [entry["skipped"] for entry in reversed(entries)]
        self._skips_in_a_row = flags.index(False) if False in flags else len(flags)
        self._optimizer_step = optimizer.step
        optimizer.step = self._step_unless_skipped  # type: ignore[method-assign]

    def step(self, loss: float) -> dict[str, Any]:
        """Have the engine take its step, unless it is to be skipped.

        Args:
            loss: Of the global batch, the same on all ranks.

        Returns:
            For the log: `gradient_norm` before clipping, whether the step was `skipped`, and `trouble` if there was.
        """
        # None until this step has been looked at: ZeRO calls the optimizer's step, and thus the guard, several times.
        self._trouble: str | None = None
        self._loss, self._norm = loss, _gradient_norm(self._engine)
        self._engine.step()
        # DeepSpeed does not call the optimizer if it finds the gradient not finite.
        trouble = self._find_trouble()
        skip = self._must_skip()
        if skip:
            self._skips_in_a_row += 1
        else:
            self._skips_in_a_row = 0
            self._history.append((loss, self._norm))
        entry = {"gradient_norm": self._norm, "skipped": skip}
        return entry | ({"trouble": trouble} if trouble else {})

    def report(self, stage: str, entry: dict[str, Any]) -> None:
        """Say what is wrong with a step, if something is.

        Raises:
            TrainingError: if that is asked for, or steps are skipped without end.
        """
        if "trouble" not in entry:
            return
        records = [show_name(record) for record in entry["records"][:SHOWN_RECORDS]]
        count = len(entry["records"]) - len(records)
        rest = f" and {count} more, see {LOG_FILE}" if count else ""
        message = f"{stage} step {entry['step']}: {entry['trouble']}; records: {'; '.join(records)}{rest}"
        if self._action == "stop":
            raise TrainingError(
                f"{message}. The step was not taken; spikes.action: skip would go on without it"
            )
        if self._skips_in_a_row > MAX_SKIPS:
            raise TrainingError(
                f"{message}. {self._skips_in_a_row} steps in a row were skipped; the model is beyond that"
            )
        log.warning("%s; the step was %s", message, "skipped" if entry["skipped"] else "taken")

    def _step_unless_skipped(self, *args: Any, **kwargs: Any) -> Any:
        """The optimizer's step; ZeRO 1 and 2 call it for each group of parameters."""
        self._find_trouble()
        return None if self._must_skip() else self._optimizer_step(*args, **kwargs)

    def _must_skip(self) -> bool:
        is_finite = math.isfinite(self._loss) and math.isfinite(self._norm)
        return not is_finite or (bool(self._trouble) and self._action != "warn")

    def _find_trouble(self) -> str:
        """What is wrong with this step; empty if nothing is."""
        if self._trouble is None:
            if math.isnan(self._norm) and hasattr(self._engine.optimizer, "_global_grad_norm"):
                self._norm = float(self._engine.optimizer._global_grad_norm)
            troubles = [self._judge("loss", self._loss, 0), self._judge("gradient norm", self._norm, 1)]
            self._trouble = "; ".join(filter(None, troubles))
        return self._trouble

    def _judge(self, name: str, value: float, column: int) -> str:
        """What is wrong with a value, given that column of the history; empty if nothing is."""
        if not math.isfinite(value):
            return f"{name} is {value}"
        if len(self._history) < MIN_STEPS:
            return ""
        # Median and median absolute deviation, of logarithms: neither moves when a few steps are far off.
        logs = [_log(entry[column]) for entry in self._history]
        middle = median(logs)
        deviation = max(1.4826 * median(abs(log - middle) for log in logs), MIN_DEVIATION)
        distance = (_log(value) - middle) / deviation
        if distance <= self._deviations:
            return ""
        return f"{name} {value:.4g} is {distance:.0f} deviations above the median {math.exp(middle):.4g}"


def _log(value: float) -> float:
    return math.log(max(value, 1e-12))


def _gradient_norm(engine: Any) -> float:
    """Norm of the gradient where DeepSpeed has no optimizer of its own that computes it (ZeRO 0 in fp32); else NaN."""
    if hasattr(engine.optimizer, "_global_grad_norm"):
        return math.nan
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))
