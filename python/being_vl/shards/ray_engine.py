"""`--engine ray`: a job's files made by Ray's actors, on as many machines as the cluster has."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import ray
import ray.data
from numpy.typing import NDArray


class _Actor:
    """Gets ready once and makes files."""

    def __init__(self, start: Callable[..., Callable[[int], Any]], arguments: tuple[Any, ...]) -> None:
        self.make = start(*arguments)

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return {"made": np.array([json.dumps(self.make(int(n))) for n in batch["id"]])}


def make_with_ray(
    start: Callable[..., Callable[[int], Any]], *arguments: Any, files: int, cpus: int, on_gpu: bool = False
) -> Iterator[Any]:
    """Make files 0 to `files` - 1, each by `start(*arguments)(number)` in an actor that calls `start` once.

    It uses the Ray that is running, or starts one on this machine. All machines must see the same folders.

    Args:
        start: Returns what makes a file; Ray must be able to pickle it.
        arguments: For it.
        files: How many.
        cpus: What an actor takes on a CPU; there is one per so many CPUs.
        on_gpu: There is one per GPU instead.

    Returns:
        What was returned for each file, a JSON value, in the order in which they are made.
    """
    if files == 0:
        return
    if not ray.is_initialized():
        ray.init()
    resources = ray.cluster_resources()
    most = int(resources.get("GPU", 0)) if on_gpu else int(resources.get("CPU", 0)) // cpus
    made = ray.data.range(files, override_num_blocks=files).map_batches(
        _Actor,
        fn_constructor_args=(start, arguments),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=max(1, min(files, most))),
        num_cpus=0,  # or the actors would leave none to what feeds them
        num_gpus=1 if on_gpu else 0,
    )
    for row in made.iter_rows():
        yield json.loads(row["made"])
