"""Options of `being-vl launch`; importable without torch."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from being_vl.errors import ConfigError
from being_vl.options import Options, check_minimum

STARTUP = 60
"""Seconds that a job needs to start; and Slurm may warn it a minute early."""


@dataclass
class LaunchOptions(Options):
    """Options of `being-vl launch`.

    Args:
        recipe: Recipe of a training or of a run: a file, or the name of a shipped one. On several nodes it must be
            where every node sees it under the same path, and so must all that it names.
        launcher: `torchrun` starts this node's ranks (run it on every node); `deepspeed` starts those of all nodes from
            here, by pdsh and ssh; `slurm` submits a job; `print` prints the line for each node.
        nodes: Number of machines; by default all of the hostfile, or one.
        gpus_per_node: Processes on each node, one per GPU; by default the hostfile's slots, or this machine's GPUs.
        cpu: Train on CPUs: no GPU is asked of Slurm or shown to the ranks.
        hostfile: File with a line `HOST slots=GPUS` per node, as DeepSpeed and MPI have it; the first is the master.
        master: Address of the node where the ranks meet; by default the hostfile's first, or this machine.
        port: Port where they meet; by default a free one if this machine chooses for all, else 29500.
        interface: Network interface that the ranks talk through, such as `eth0`; by default the one that leads to the
            master, where that can be seen from here.
        env: Further variables to pass on, `NAME` or `NAME=VALUE`.
        max_restarts: How often all ranks are started again after one has failed; they go on at the last checkpoint.
        time: Slurm: the job's time limit, `[DAYS-]HOURS:MINUTES:SECONDS`.
        warning: Slurm: seconds before the time limit at which the ranks are told to save; the job then queues again.
        sbatch: Slurm: further directives, such as `partition=gpu` `account=me` `cpus-per-task=64`.
        dry_run: Print what would be run or submitted, and run nothing.
        overrides: Flags of the training, that override its recipe; behind `--` on the command line.
    """

    recipe: Path
    launcher: Literal["torchrun", "deepspeed", "slurm", "print"] = field(
        default="torchrun", metadata={"alias": "--with"}
    )
    nodes: int | None = None
    gpus_per_node: int | None = None
    cpu: bool = False
    hostfile: Path | None = None
    master: str | None = None
    port: int | None = None
    interface: str | None = None
    env: list[str] = field(default_factory=list)
    max_restarts: int = 0
    time: str = "24:00:00"
    warning: int = 300
    sbatch: list[str] = field(default_factory=list)
    dry_run: bool = False
    overrides: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("nodes", "gpus_per_node", "port", "warning"):
            check_minimum(name, getattr(self, name), 1)
        check_minimum("max_restarts", self.max_restarts, 0)
        limit = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", self.time)
        if limit is None:
            raise ConfigError(f"time: expected [DAYS-]HOURS:MINUTES:SECONDS, found {self.time!r}")
        days, hours, minutes, seconds = (int(part or 0) for part in limit.groups())
        if ((days * 24 + hours) * 60 + minutes) * 60 + seconds <= self.warning + STARTUP:
            raise ConfigError(
                f"time is {self.time}, and {self.warning} seconds (warning) before it is over the ranks are told to "
                "save: they would not get to training; give more time, or a shorter warning"
            )
        if self.launcher == "deepspeed" and self.max_restarts:
            raise ConfigError("deepspeed's launcher cannot restart ranks; use torchrun or slurm")
