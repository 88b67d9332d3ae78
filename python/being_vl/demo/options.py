"""Options of the demo; importable without torch."""

from dataclasses import dataclass
from pathlib import Path

from being_vl.options import Options


@dataclass
class DemoOptions(Options):
    """Options of `being-vl demo`.

    Args:
        out: Folder for everything that the demo makes; run again, finished steps are skipped.
        seed: Seed of pictures, questions and weights.
        quick: Run through every step in a minute, too short to learn much.
    """

    out: Path = Path("runs/demo")
    seed: int = 0
    quick: bool = False
