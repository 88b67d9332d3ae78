"""Options of the demo; importable without torch."""

from dataclasses import dataclass, field
from pathlib import Path

from being_vl.options import MAY_CHANGE, Options


@dataclass
class DemoOptions(Options):
    """Options of `being-vl demo`.

    Args:
        out: Folder for everything that the demo makes; run again, finished steps are skipped.
        seed: Seed of pictures, questions and weights.
        quick: Run through every step in a minute, too short to learn much.
        overwrite: Do steps again that were finished with another seed or size, in place of refusing them.
    """

    out: Path = Path("runs/demo")
    seed: int = 0
    quick: bool = False
    overwrite: bool = field(default=False, metadata=MAY_CHANGE)
