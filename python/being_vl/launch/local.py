"""Starting the ranks of a training on this machine."""

import subprocess
import sys
from pathlib import Path

import torch

from being_vl.errors import BeingVLError
from being_vl.files import MANIFEST, to_jsonable, write_json
from being_vl.train.options import TrainOptions
from being_vl.train.signals import forward_signals


def train_on_ranks(options: TrainOptions, ranks: int | None = None) -> None:
    """Train in this process if one rank is asked for, else in `ranks` processes started by torchrun.

    Args:
        options: The training.
        ranks: Number of processes; by default one per GPU of this machine, or one on a CPU.

    Raises:
        BeingVLError: if a rank fails; it has said why.
        SystemExit: with status 0, if a signal stopped the training before its end; it is saved.
    """
    ranks = ranks or max(1, torch.cuda.device_count())
    if ranks == 1:
        from being_vl.train.engine import train

        train(options)
        return
    recipe = Path(options.out) / "options.json"
    write_json(recipe, to_jsonable(options))
    command = torchrun(ranks, recipe)
    with forward_signals():
        failed = subprocess.run(command, check=False).returncode
    if failed:
        raise BeingVLError(
            f"training on {ranks} ranks failed; see the messages above. Command: {' '.join(command)}"
        )
    if not (Path(options.out) / options.stages[-1].name / MANIFEST).is_file():
        raise SystemExit(0)


def torchrun(ranks: int, recipe: Path) -> list[str]:
    """The command that trains a recipe on so many ranks of this machine."""
    launcher = ["-m", "being_vl.launch.torchrun", "--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, *launcher, "-m", "being_vl", "train", "--recipe", str(recipe)]
