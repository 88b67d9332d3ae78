"""`--engine ray`: a job's shards made by Ray's actors, on as many machines as the cluster has."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import ray
import ray.data
from numpy.typing import NDArray

from being_vl import errors
from being_vl.errors import BeingVLError

Maker = Callable[[int], Any]
"""Makes the shard of a number; returns a JSON value."""


class _Actor:
    """Loads what shards are made with once, and makes one after the other."""

    def __init__(self, new_maker: Callable[..., Maker], arguments: tuple[Any, ...]) -> None:
        self.maker = new_maker(*arguments)

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return {"result": np.array([json.dumps(self._make(int(number))) for number in batch["id"]])}

    def _make(self, number: int) -> dict[str, Any]:
        """The result under `result`; an error under its class: Ray would wrap it into its own account of where."""
        try:
            return {"result": self.maker(number)}
        except (BeingVLError, OSError) as error:
            return {type(error).__name__: str(error)}


def make_shards_with_ray(
    new_maker: Callable[..., Maker], *arguments: Any, shards: int, cpus: int, device: str = "cpu"
) -> Iterator[Any]:
    """Make shards 0 to `shards` - 1, each in an actor that has called `new_maker(*arguments)` once.

    It uses the Ray that is running, or starts one on this machine. All machines must see the same folders.

    Args:
        new_maker: Returns what makes a shard; Ray must be able to pickle it.
        arguments: For it.
        shards: How many there are to make.
        cpus: CPUs of an actor that needs no GPU.
        device: Where an actor computes, as in options: on `cuda` there is one actor per GPU of the cluster, on `auto`
            too if it has GPUs; else one per `cpus` CPUs.

    Returns:
        What was returned for each shard, in the order in which they are finished.

    Raises:
        BeingVLError, OSError: as the maker does.
    """
    if shards == 0:
        return
    if not ray.is_initialized():
        ray.init()
    # As many actors as the cluster has room for, but not more than there are shards.
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    has_gpu = device.startswith("cuda") or (device == "auto" and gpus > 0)
    capacity = gpus if has_gpu else int(resources.get("CPU", 0)) // cpus
    results = ray.data.range(shards, override_num_blocks=shards).map_batches(
        _Actor,
        fn_constructor_args=(new_maker, arguments),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=max(1, min(shards, capacity))),
        num_cpus=0,  # or the actors would leave none to what feeds them
        num_gpus=1 if has_gpu else 0,
    )
    for row in results.iter_rows():
        [(name, value)] = json.loads(row["result"]).items()
        if name != "result":
            raise getattr(errors, name, OSError)(value)
        yield value
