"""Where networks run."""

import os


def find_device(device: str = "auto") -> str:
    """The device that an option names, for this process.

    Args:
        device: `auto` is a GPU where there is one, else the CPU. Under torchrun, `auto` and `cuda` are the GPU of this
            process's own local rank. Anything else, such as `cpu` or `cuda:1`, is taken as it is.

    Returns:
        `cpu`, `cuda`, `cuda:1`, …
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    local_rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{local_rank}" if device == "cuda" and local_rank else device
