"""Starting a training as a job of Slurm."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from being_vl.errors import ConfigError
from being_vl.files import MANIFEST, write_aside
from being_vl.launch.options import LaunchOptions
from being_vl.launch.shell import forwarded_environment
from being_vl.training.options import TrainOptions


def slurm_script(options: LaunchOptions, training: TrainOptions, flags: list[str]) -> str:
    """The sbatch script: one `being-vl launch` per node, told to save before the time is over, queued again after.

    Args:
        options: Of the launch.
        training: What its recipe says.
        flags: Of `being-vl train`: `--recipe`, its file, and what overrides it.

    Raises:
        ConfigError: if the options do not say how many GPUs to ask for.
    """
    if options.gpus_per_node is None:
        raise ConfigError(
            "slurm must be asked for GPUs: give gpus_per_node; with cpu it is the ranks per node"
        )
    nodes, gpus = options.nodes or 1, options.gpus_per_node
    directives = [
        f"job-name=being-vl-{training.out.name}",
        f"nodes={nodes}",
        "ntasks-per-node=1",
        *([] if options.cpu else [f"gpus-per-node={gpus}"]),
        f"time={options.time}",
        f"signal=USR1@{options.warning}",
        "requeue",
        "open-mode=append",
        f"output={training.out.absolute()}/slurm-%j.log",
        *options.sbatch,
    ]
    variables = forwarded_environment(options, None)
    manifest = shlex.quote(str(training.out.absolute() / training.stages[-1].name / MANIFEST))
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH --{directive}" for directive in directives),
            "set -euo pipefail",
            f"cd {shlex.quote(str(Path.cwd()))}",
            *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
            'master=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            "srun --kill-on-bad-exit=1 --cpu-bind=none ${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK} \\",
            f"    {_start_line(options, nodes, gpus, flags)}",
            "# Told to save by Slurm, training ends well before its last stage is finished: queue again to go on.",
            f'[ -f {manifest} ] || scontrol requeue "$SLURM_JOB_ID"',
            "",
        ]
    )


def _start_line(options: LaunchOptions, nodes: int, gpus: int, flags: list[str]) -> str:
    """What srun runs on each node."""
    command = [sys.executable, "-m", "being_vl", "launch", flags[1]]
    command += [f"--nodes={nodes}", f"--gpus-per-node={gpus}", f"--max-restarts={options.max_restarts}"]
    command += ["--cpu"] if options.cpu else []
    command += [f"--interface={options.interface}"] if options.interface else []
    port = options.port or "$((20000 + SLURM_JOB_ID % 10000))"
    overrides = ["--", *map(shlex.quote, flags[2:])] if flags[2:] else []
    return " ".join(
        [shlex.join(command), '--with=torchrun --master="$master"', f'--port="{port}"', *overrides]
    )


def submit_job(script: str, out: Path) -> str:
    """Write the script into the training's folder and give it to Slurm; returns what sbatch says.

    Raises:
        ConfigError: if there is no sbatch, or it refuses the script.
    """
    if not shutil.which("sbatch"):
        raise ConfigError(
            "slurm: there is no sbatch here; run this on a login node, or use dry_run to see the script"
        )
    # Slurm itself writes the log there, and makes no folder.
    out.mkdir(parents=True, exist_ok=True)
    path = out / "job.sbatch"
    with write_aside(path) as temporary_path:
        temporary_path.write_text(script, encoding="utf-8")
    sbatch = subprocess.run(["sbatch", str(path)], capture_output=True, text=True, check=False)
    if sbatch.returncode:
        raise ConfigError(f"sbatch {path}: {sbatch.stderr.strip()}")
    return sbatch.stdout.strip()
