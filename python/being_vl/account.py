"""What became of everything that a job has seen; every job prints and stores one."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

LEFT_OUT = "left-out.jsonl"
"""Name of the file in a job's output that lists what was left out: `name` and `reason` of each, as JSON lines."""


@dataclass
class Account:
    """Counts of what a job used, and of what it left out, by reason.

    Args:
        unit: What is counted, in the plural: `images`, `records`, `grids`.
        used: How many went into the output.
        left_out: Reason → how many did not.
    """

    unit: str
    used: int = 0
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def seen(self) -> int:
        """How many there were."""
        return self.used + self.left_out.total()

    def describe(self) -> str:
        """One line, such as `images: 812 seen, 785 used, 27 left out (20 not an image, 7 hidden)`."""
        line = f"{self.unit}: {self.seen:,} seen, {self.used:,} used, {self.left_out.total():,} left out"
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.left_out.most_common() if count)
        return f"{line} ({reasons})" if reasons else line

    def to_json(self) -> dict[str, Any]:
        """All fields and `seen`, for a manifest."""
        left_out = dict(self.left_out.most_common())
        return {"unit": self.unit, "seen": self.seen, "used": self.used, "left_out": left_out}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        return cls(fields["unit"], fields["used"], Counter(fields["left_out"]))
