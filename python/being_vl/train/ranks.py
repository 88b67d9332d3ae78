"""Starting the ranks of a training on this machine."""

import subprocess
import sys
from pathlib import Path

import torch

from being_vl.errors import BeingVLError
from being_vl.files import plain, write_json
from being_vl.train.options import TrainOptions


def train_on_ranks(options: TrainOptions, ranks: int | None = None) -> None:
    """Train in this process if one rank is asked for, else in `ranks` processes started by torchrun.

    Args:
        options: The training.
        ranks: Number of processes; by default one per GPU of this machine, or one on a CPU.

    Raises:
        BeingVLError: if a rank fails; it has said why.
    """
    ranks = ranks or max(1, torch.cuda.device_count())
    if ranks == 1:
        from being_vl.train.engine import train

        train(options)
        return
    recipe = Path(options.out) / "options.json"
    write_json(recipe, plain(options))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "being_vl", "train", "--recipe", str(recipe)]
    if subprocess.run(command, check=False).returncode:
        raise BeingVLError(
            f"training on {ranks} ranks failed; see the messages above. Command: {' '.join(command)}"
        )
