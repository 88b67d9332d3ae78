"""Where networks run."""

import os

from being_vl.errors import ConfigError
from being_vl.options import DEVICE


def find_device(device: str = "auto") -> str:
    """The device that an option names, for this process.

    Args:
        device: `auto` is a GPU where there is one, else the CPU. Under torchrun, `auto` and `cuda` are the GPU of this
            process's own local rank. Anything else, such as `cpu` or `cuda:1`, is taken as it is.

    Returns:
        `cpu`, `cuda`, `cuda:1`, …

    Raises:
        ConfigError: if there is no such device.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    local_rank = os.environ.get("LOCAL_RANK")
    name = f"cuda:{local_rank}" if device == "cuda" and local_rank else device
    if not DEVICE.fullmatch(name):
        raise ConfigError(f"device: expected auto, cpu, cuda or a GPU such as cuda:1, found {device[:60]!r}")
    number = torch.cuda.device_count() if name.startswith("cuda") else 1
    if int(name.partition(":")[2] or 0) >= number:
        raise ConfigError(f"device: there is no {name}; of GPUs PyTorch finds {number}")
    return name
