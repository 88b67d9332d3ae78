"""torchrun for trainings that survive: `python -m being_vl.launch.torchrun ARGUMENTS OF TORCHRUN`.

torchrun itself answers SIGTERM by giving its ranks 30 seconds and then failing, and dies of SIGUSR1. Here both are
passed on to the ranks, which save and end, and the exit status is theirs.
"""

import os

from being_vl.train.signals import forward_signals


def main() -> None:
    """Run torchrun with the arguments of this process."""
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGINT,SIGHUP,SIGQUIT")
    # With the default, restarts after a killed rank hang at the rendezvous.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    from torch.distributed.run import main as torchrun

    with forward_signals():
        torchrun()


if __name__ == "__main__":
    main()
