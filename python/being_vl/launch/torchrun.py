"""torchrun for trainings that survive: `python -m being_vl.launch.torchrun ARGUMENTS OF TORCHRUN`.

torchrun itself answers SIGTERM by giving its ranks 30 seconds and then failing, and dies of SIGUSR1. Here both are
passed on to the ranks, which save and end, and the exit status is theirs.
"""

import os
import sys
from collections.abc import Sequence

from being_vl.launch.cluster import SINGLE_NODE_PORT, Cluster
from being_vl.training.signals import forward_signals

MODULE = [sys.executable, "-m", "being_vl.launch.torchrun"]


def main() -> None:
    """Run torchrun with the arguments of this process."""
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGINT,SIGHUP,SIGQUIT")
    # With the default, restarts after a killed rank hang at the rendezvous.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    from torch.distributed.run import main as torchrun

    with forward_signals():
        torchrun()


def local_command(ranks: int, words: Sequence[str]) -> list[str]:
    """The torchrun command that runs a being-vl command on several ranks of this machine.

    Args:
        ranks: Number of processes.
        words: What stands behind `being-vl`.
    """
    return [*MODULE, "--standalone", f"--nproc-per-node={ranks}", "-m", "being_vl", *words]


def node_command(
    cluster: Cluster, host: str | None, is_master: bool, words: Sequence[str], max_restarts: int = 0
) -> list[str]:
    """The torchrun command that starts one node's ranks of a being-vl command.

    Args:
        cluster: All machines.
        host: The node's own address, if it is known.
        is_master: Whether the ranks meet there.
        words: What stands behind `being-vl`.
        max_restarts: How often all ranks are started again.
    """
    command = [*MODULE, f"--nproc-per-node={cluster.gpus}", f"--max-restarts={max_restarts}"]
    if cluster.port == SINGLE_NODE_PORT:
        command += ["--standalone"]
    else:
        command += [
            f"--nnodes={len(cluster.hosts)}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={cluster.master}:{cluster.port}",
            "--rdzv-id=being-vl",
            # torchrun's own guess fails where a host's name does not lead to the address that is used.
            f"--rdzv-conf=is_host={int(is_master)}",
        ]
        command += [f"--local-addr={host}"] if host else []
    return [*command, "-m", "being_vl", *words]


if __name__ == "__main__":
    main()
