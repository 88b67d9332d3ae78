"""Starting the ranks of a job on this machine."""

import logging
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from being_vl.errors import BeingVLError
from being_vl.files import MANIFEST, to_jsonable, write_json
from being_vl.launch.torchrun import local_command
from being_vl.outputs import check_file, read_json
from being_vl.quantizer.options import QuantizeOptions
from being_vl.quantizer.training.options import QuantizerTrainOptions
from being_vl.training.options import TrainOptions
from being_vl.training.signals import forward_signals


def train_on_ranks(options: TrainOptions, ranks: int | None = None, device: str = "auto") -> None:
    """Train in this process if one rank is enough, else in several that torchrun starts.

    Args:
        options: The training.
        ranks: Number of processes; by default one per GPU, or one on a CPU.
        device: `auto` is all GPUs where there are some; `cpu`, or `cuda:1` for one GPU alone.

    Raises:
        BeingVLError: if a rank fails; its own message says why.
        SystemExit: with status 0, if a signal stopped the training before its end; it is saved.
    """
    ranks = ranks or count_ranks(device)
    gpus = _visible_gpus(device)
    if ranks == 1 and not gpus:
        from being_vl.training.engine import train

        train(options)
        return
    from being_vl.training.fingerprint import check_output

    check_output(options)
    path = options.out / "options.json"
    _write_options(path, options)
    _run_ranks(["train", "--recipe", str(path)], ranks, gpus)
    if not (options.out / options.stages[-1].name / MANIFEST).is_file():
        raise SystemExit(0)


def quantize_on_ranks(options: QuantizeOptions, ranks: int | None = None) -> None:
    """Quantize in this process if one rank is enough, else in several that torchrun starts; the grids are the same.

    Args:
        options: The job; its device `auto` is all GPUs where there are some.
        ranks: Number of processes; by default one per GPU, or one on a CPU.

    Raises:
        BeingVLError: if a rank fails; its own message says why.
        ImageError, QuantizerError: as `quantize` does.
    """
    ranks = ranks or count_ranks(options.device)
    if ranks == 1 or options.engine != "local":
        from being_vl.quantizer.job import quantize

        quantize(options)
        return
    path = options.out.with_name(f"{options.out.name}.options.json")
    _write_options(path, options)
    _run_ranks(["quantize", "--recipe", str(path)], ranks, {})


def train_quantizer_on_ranks(options: QuantizerTrainOptions, ranks: int | None = None) -> None:
    """Train a quantizer in this process if one rank is enough, else in several that torchrun starts.

    Args:
        options: The training; its device `auto` is all GPUs where there are some. The ranks share its batch.
        ranks: Number of processes; by default one per GPU, as many as share the batch evenly, or one on a CPU.

    Raises:
        BeingVLError: if a rank fails; its own message says why.
        ConfigError, ImageError: as `train_quantizer` does.
    """
    counts = range(count_ranks(options.device), 0, -1)
    ranks = ranks or next(count for count in counts if options.batch_size % count == 0)
    if ranks == 1:
        from being_vl.quantizer.training.trainer import train_quantizer

        train_quantizer(options)
        return
    path = options.out.with_name(f"{options.out.name}.options.json")
    _write_options(path, options)
    _run_ranks(["quantizer", "train", "--recipe", str(path)], ranks, {})


def _write_options(path: Path, options: Any) -> None:
    """Write the options of a job for its ranks.

    Raises:
        OutputError: if there is a file that holds anything else.
    """
    values = to_jsonable(options)
    check_file(path, lambda file: read_json(file).keys() == values.keys(), "file of such options")
    write_json(path, values)


def count_ranks(device: str) -> int:
    """One per GPU that `device` names."""
    import torch

    return max(1, torch.cuda.device_count()) if device in ("auto", "cuda") else 1


def _visible_gpus(device: str) -> dict[str, str]:
    """The variable that shows a training only the device of the options; empty if it shows all devices."""
    import torch

    if device in ("auto", "cuda") or not torch.cuda.is_available():
        return {}
    return {"CUDA_VISIBLE_DEVICES": device.partition(":")[2]}


def _run_ranks(words: list[str], ranks: int, environment: Mapping[str, str]) -> None:
    """Run a being-vl command on several ranks, and wait for its end.

    Raises:
        BeingVLError: if a rank fails.
    """
    verbosity = {logging.DEBUG: ["-v"], logging.WARNING: ["-q"]}.get(logging.getLogger("being_vl").level, [])
    command = local_command(ranks, [*words, *verbosity])
    with forward_signals():
        status = subprocess.run(command, env=os.environ | environment, check=False).returncode
    if status:
        name = " ".join(words[: words.index("--recipe")])
        raise BeingVLError(
            f"being-vl {name} on {ranks} ranks failed; see the messages above. Command: {' '.join(command)}"
        )
