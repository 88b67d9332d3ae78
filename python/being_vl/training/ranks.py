"""The ranks of a training: how they come together, what they agree on, and whose folder it is."""

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist

from being_vl.errors import BeingVLError, OutputError
from being_vl.options import StrPath
from being_vl.outputs import LOCK, free_locks, lock_folder

log = logging.getLogger(__name__)


def start_ranks() -> None:
    """Join the process group, as torchrun or deepspeed describes it, or as a world of one."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    if dist.is_initialized():
        return
    # Without this, every start on a CPU compiles a shared-memory extension for more than a minute.
    __compatible_ops__["deepspeed_shm_comm"] = False
    has_gpu = torch.cuda.is_available()
    additions = {} if "RANK" in os.environ else _environment_of_one_rank()
    os.environ.update(additions)
    if has_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(dist_backend="nccl" if has_gpu else "gloo", timeout=timedelta(hours=1))
    # What this process starts later must not take itself for a rank of this world; DeepSpeed reads LOCAL_RANK again.
    for name in additions.keys() - {"LOCAL_RANK"}:
        del os.environ[name]


def _environment_of_one_rank() -> dict[str, str]:
    """The environment that torchrun would give to a single rank."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }


def all_reduce_any(*flags: bool) -> list[bool]:
    """For each flag, whether it is set on any rank."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    counts = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(counts, dist.ReduceOp.MAX)
    return [bool(count) for count in counts.tolist()]


def log_once(message: str) -> None:
    """Log a line on rank 0 alone."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        log.info(message)


@contextlib.contextmanager
def hold_folder(out: StrPath) -> Iterator[None]:
    """Hold the lock of a training's folder: ranks that outlive a killed launcher still write there.

    The operating system frees the lock when the rank that holds it ends, however it ends.

    Raises:
        OutputError: on all ranks, if another process holds it, or not all ranks see the same folder.
    """
    out = Path(out)
    # Rank 0 takes the lock and writes into its file what no other start has written.
    message: list[str | None] = [None, None]
    with free_locks():
        if dist.get_rank() == 0:
            try:
                message[0] = lock_folder(out)
            except (BeingVLError, OSError) as error:
                message[1] = str(error)
        dist.broadcast_object_list(message)
        content, fault = message
        if fault is not None:
            raise OutputError(fault)
        # A rank that reads something else looks at another folder, that of another node.
        lock_file = out / LOCK
        content_here = lock_file.read_text(encoding="utf-8") if lock_file.is_file() else None
        if all_reduce_any(content_here != content)[0]:
            raise OutputError(
                f"{out}: not all ranks see what rank 0 writes there; choose a folder that all nodes share"
            )
        yield
