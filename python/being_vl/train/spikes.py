"""Steps whose loss or gradient is not finite, or far from what it was: found before they reach the weights."""

import logging
import math
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any, Literal

import torch

from being_vl.errors import TrainingError

log = logging.getLogger(__name__)

WINDOW, LEAST = 100, 20
"""Steps looked back on, and steps before anything is called a spike."""
LONGEST = 10
"""Steps skipped one after another before training stops."""
NARROWEST = 0.01
"""Least standard deviation of the logarithms, for losses that hardly vary."""


class Watch:
    """Stands between DeepSpeed and the optimizer: a bad step is not taken, if so asked, and a NaN never is.

    A spike is a loss or gradient norm whose logarithm is more than `deviations` robust standard deviations (1.4826
    times the median absolute deviation) above the median of the last 100 steps that were taken. DeepSpeed knows the
    norm only inside its own step, so it is there that the watch decides, from numbers that are the same on all ranks.

    Args:
        engine: DeepSpeed's engine.
        optimizer: The optimizer that it was given; its `step` is replaced.
        action: What is done about spikes.
        deviations: From where on it is a spike.
        before: The log's entries of the steps before, when resumed.
    """

    def __init__(
        self,
        engine: Any,
        optimizer: torch.optim.Optimizer,
        action: Literal["warn", "skip", "stop"],
        deviations: float,
        before: Sequence[dict[str, Any]],
    ) -> None:
        self._engine, self._action, self._deviations = engine, action, deviations
        taken = [(entry["loss"], entry["gradient_norm"]) for entry in before if not entry["skipped"]]
        self._history = deque(taken, maxlen=WINDOW)
        flags = [entry["skipped"] for entry in reversed(before)]
        self._skipped = flags.index(False) if False in flags else len(flags)
        self._take = optimizer.step
        optimizer.step = self._take_if_good  # type: ignore[method-assign]

    def step(self, loss: float) -> dict[str, Any]:
        """Have the engine take its step, unless it is a bad one.

        Args:
            loss: Of the global batch, the same on all ranks.

        Returns:
            For the log: `gradient_norm` before clipping, whether the step was `skipped`, and `trouble` if there was.
        """
        self._loss, self._norm, self._judged = loss, _norm_of_plain(self._engine), False
        self._engine.step()
        trouble = self._look()  # DeepSpeed does not call the optimizer if it finds the gradient not finite
        if self._skips():
            self._skipped += 1
        else:
            self._skipped = 0
            self._history.append((loss, self._norm))
        entry = {"gradient_norm": self._norm, "skipped": self._skips()}
        return entry | ({"trouble": trouble} if trouble else {})

    def report(self, stage: str, entry: dict[str, Any]) -> None:
        """Say what is wrong with a step, if something is.

        Raises:
            TrainingError: if that is asked for, or steps are skipped without end.
        """
        if "trouble" not in entry:
            return
        what = f"{stage} step {entry['step']}: {entry['trouble']}; records: {'; '.join(entry['records'])}"
        if self._action == "stop":
            raise TrainingError(f"{what}. The step was not taken; spikes.action: skip would go on without it")
        if self._skipped > LONGEST:
            raise TrainingError(
                f"{what}. {self._skipped} steps in a row were skipped; the model is beyond that"
            )
        log.warning("%s; the step was %s", what, "skipped" if entry["skipped"] else "taken")

    def _take_if_good(self, *args: Any, **kwargs: Any) -> Any:
        """The optimizer's step; ZeRO 1 and 2 call it for each group of parameters."""
        self._look()
        return None if self._skips() else self._take(*args, **kwargs)

    def _skips(self) -> bool:
        finite = math.isfinite(self._loss) and math.isfinite(self._norm)
        return not finite or (self._trouble != "" and self._action != "warn")

    def _look(self) -> str:
        """What is wrong with this step; empty if nothing is."""
        if not self._judged:
            self._judged = True
            if math.isnan(self._norm) and hasattr(self._engine.optimizer, "_global_grad_norm"):
                self._norm = float(self._engine.optimizer._global_grad_norm)
            found = [self._judge("loss", self._loss, 0), self._judge("gradient norm", self._norm, 1)]
            self._trouble = "; ".join(filter(None, found))
        return self._trouble

    def _judge(self, name: str, value: float, place: int) -> str:
        if not math.isfinite(value):
            return f"{name} is {value}"
        if len(self._history) < LEAST:
            return ""
        logs = [_log(entry[place]) for entry in self._history]
        middle = median(logs)
        deviation = max(1.4826 * median(abs(log - middle) for log in logs), NARROWEST)
        away = (_log(value) - middle) / deviation
        if away <= self._deviations:
            return ""
        return f"{name} {value:.4g} is {away:.0f} deviations above the median {math.exp(middle):.4g}"


def _log(value: float) -> float:
    return math.log(max(value, 1e-12))


def _norm_of_plain(engine: Any) -> float:
    """Norm of the gradient where DeepSpeed has no optimizer of its own that computes it (ZeRO 0 in fp32); else NaN."""
    if hasattr(engine.optimizer, "_global_grad_norm"):
        return math.nan
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))
