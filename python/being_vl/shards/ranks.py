"""Which of a job's processes this one is, and the end of processes whose parent is gone."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def rank_and_world_size() -> tuple[int, int]:
    """This process's number and how many there are, as torchrun says in RANK and WORLD_SIZE; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def end_with_parent(worker: int) -> None:
    """Have Linux end this process when its parent is killed: torch's workers would wait for a reader forever.

    Args:
        worker: The number that torch's data loader calls its `worker_init_fn` with; of no use here.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
