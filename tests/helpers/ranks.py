"""Trainings in processes of their own: by their command, or forked from a server that has imported everything once.

Importing torch, transformers and DeepSpeed takes ten CPU seconds in every rank, a training of these tests two. A forked
rank is a process like any other, with its own memory, threads and files, killed as any other, and is told what torchrun
would tell it. The commands themselves are for the tests that need them.
"""

import gc
import multiprocessing
import os
import resource
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
IMPORTS = [
    "being_vl.cli",
    "being_vl.training.engine",
    "deepspeed",
    "torch._dynamo",
    "torch.utils.tensorboard",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(IMPORTS)


def train_by_command(recipe: Path, ranks: int = 1) -> str:
    """Train as a user would, with torchrun if there are several ranks; returns its stderr."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [
        sys.executable,
        *(torchrun if ranks > 1 else []),
        "-m",
        "being_vl",
        "train",
        "--recipe",
        str(recipe),
    ]
    process = subprocess.run(
        command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return process.stderr


def free_port() -> str:
    """A port that nothing listens on."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


class ForkedTraining:
    """A training that has just been started on `ranks` forked processes, whose files can grow to `limit` bytes.

    With `nodes` each rank takes itself for a node's first and works in that node's folder.
    """

    def __init__(
        self, recipe: Path, ranks: int = 1, limit: int = -1, nodes: list[Path] | None = None
    ) -> None:
        self.output = recipe.with_suffix(".output")
        port = free_port()
        self.ranks = []
        for rank in range(ranks):
            environment_of_rank = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            environment_of_rank |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment_of_rank |= {"LOCAL_RANK": "0"} if nodes else {}
            folder = nodes[rank] if nodes else Path.cwd()
            variables = os.environ | ENVIRONMENT | (environment_of_rank if ranks > 1 else {})
            arguments = (recipe, self.output, variables, limit, folder)
            process = FORKS.Process(target=_train, args=arguments, daemon=True)
            process.start()
            self.ranks.append(process)

    def has_ended(self) -> bool:
        """Whether a rank has ended."""
        return any(not process.is_alive() for process in self.ranks)

    def signal(self, number: int, ranks: slice = slice(None)) -> None:
        """Send a signal to some ranks, to all by default."""
        for process in self.ranks[ranks]:
            os.kill(process.pid, number)

    def statuses(self, timeout: float) -> list[int]:
        """Wait until all ranks have ended; returns their exit statuses, None for one that is still there."""
        deadline = time.monotonic() + timeout
        for process in self.ranks:
            process.join(max(0, deadline - time.monotonic()))
        return [process.exitcode for process in self.ranks]

    def kill(self) -> None:
        """Kill -9 every rank, and wait until all are gone."""
        for process in self.ranks:
            process.kill()
        for process in self.ranks:
            process.join()

    def finish(self) -> str:
        """Wait for the end, which must be a good one; returns what the ranks wrote."""
        self.statuses(timeout=300)
        self.kill()  # those that wait for one that failed
        output = self.output.read_text()
        assert not any(process.exitcode for process in self.ranks), output[-4000:]
        return output


def train_in_forks(recipe: Path, ranks: int = 1) -> str:
    """Train on forked ranks, to the end; returns what they wrote."""
    return ForkedTraining(recipe, ranks).finish()


def _train(recipe: Path, output: Path, variables: dict[str, str], limit: int, folder: Path) -> None:
    """Be one rank."""
    os.chdir(folder)
    multiprocessing.current_process()._config["daemon"] = False  # it may have workers, which a daemon may not
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    gc.freeze()  # what was imported before need not be searched for garbage
    os.environ.update(variables)  # the server's are those of the test that came first
    with output.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch

    from being_vl.cli import main

    torch.set_num_threads(1)
    sys.exit(main(["train", "--recipe", str(recipe)]))
