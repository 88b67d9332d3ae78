"""`being-vl quantize --engine ray`: files made by Ray's actors, on as many machines as the cluster has."""

import json
import logging
from typing import Any

import numpy as np
import ray
import ray.data
from numpy.typing import NDArray

from being_vl.quantize.base import load_quantizer
from being_vl.quantize.job import Shard, encode_shards
from being_vl.quantize.options import QuantizeOptions

log = logging.getLogger(__name__)


class _Encoder:
    """An actor that loads the quantizer once and makes files."""

    def __init__(self, options: QuantizeOptions, shards: list[Shard], total: int) -> None:
        self.options, self.shards, self.total = options, shards, total
        self.quantizer = load_quantizer(options.quantizer, options.device)
        if options.compile:
            self.quantizer.compile()

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        shards = [self.shards[n] for n in batch["id"]]
        failed = encode_shards(self.options, shards, self.quantizer, self.total)
        return {"failed": np.array([json.dumps(failed)])}


def encode_with_ray(options: QuantizeOptions, shards: list[Shard], total: int) -> dict[str, str]:
    """Make files as `encode_shards` does, one actor per GPU, or per `workers` + 1 CPUs where the device is a CPU.

    It uses the Ray that is running, or starts one on this machine. All machines must see the same folders.
    """
    if not shards:
        return {}
    if not ray.is_initialized():
        ray.init()
    gpus, cpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("GPU", "CPU"))
    on_gpu = options.device.startswith("cuda")
    actors = min(len(shards), gpus if on_gpu else max(1, cpus // (options.workers + 1)))
    made = ray.data.range(len(shards), override_num_blocks=len(shards)).map_batches(
        _Encoder,
        fn_constructor_args=(options, shards, total),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=max(1, actors)),
        num_cpus=0,  # or the actors would leave none to what feeds them
        num_gpus=1 if on_gpu else 0,
    )
    failed: dict[str, str] = {}
    for n, row in enumerate(made.iter_rows(), 1):
        failed |= json.loads(row["failed"])
        log.info("made %d of %d files, %d images failed", n, len(shards), len(failed))
    return failed
