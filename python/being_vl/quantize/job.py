"""`being-vl quantize`: images → a folder of grids."""

import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from being_vl.errors import ImageError
from being_vl.files import MANIFEST, sha256, write_manifest
from being_vl.fingerprints import compute_fingerprint
from being_vl.images.sources import Source, find_sources
from being_vl.quantize.base import Quantizer, load_quantizer
from being_vl.quantize.loading import Loaded, load_images
from being_vl.quantize.options import QuantizeOptions
from being_vl.shards.grids import (
    GridRow,
    GridStore,
    finished_shard,
    rank_and_count,
    shard_path,
    write_shard,
)

log = logging.getLogger(__name__)


def quantize(options: QuantizeOptions) -> GridStore | None:
    """Encode all images that `options.images` names.

    Each Arrow file appears when it is whole and the manifest last; the same job run again takes over the
    files whose images have not changed. Under torchrun (RANK and WORLD_SIZE in the environment) each process makes
    every n-th file, and the first one the manifest.

    Returns:
        The grids; None in the other processes of torchrun.

    Raises:
        ImageError: if there is no image, or more than `max_failed` of them can't be read.
        QuantizerError: if the quantizer can't be loaded.
    """
    rank, ranks = rank_and_count()
    sources = find_sources(options.images, options.root)
    quantizer = load_quantizer(options.quantizer, _device(options.device))
    options.out.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(sources), options.shard_size)
    shards = [
        Shard(shard_path(options.out, n), sources[start : start + options.shard_size], quantizer)
        for n, start in enumerate(starts)
    ]
    if rank == 0:
        (options.out / MANIFEST).unlink(missing_ok=True)
    todo = [shard for shard in shards[rank::ranks] if shard.finished is None]
    if options.engine == "ray":
        failed = _encode_with_ray(options, todo, len(sources))
    else:
        if options.compile:
            quantizer.compile()
        failed = encode_shards(options, todo, quantizer, len(sources))
    if rank > 0:
        return None
    for shard in shards:
        while shard.finished is None:  # another process is at it; if it fails, torchrun ends this one
            time.sleep(0.2)
        failed |= shard.finished["failed"]
    _check(options, failed, len(sources))
    for stale in set(options.out.glob("grids-*.arrow")) - {shard.path for shard in shards}:
        stale.unlink()
    made_by = {
        "name": quantizer.name,
        "fingerprint": quantizer.fingerprint,
        "codebook_size": quantizer.codebook_size,
        "downsample": quantizer.downsample,
    }
    counts = {"images": str(options.images), "grids": len(sources) - len(failed)}
    files = [shard.entry() for shard in shards]
    write_manifest(options.out, "grids", counts | {"quantizer": made_by, "failed": failed, "shards": files})
    return GridStore.open(options.out)


class Shard:
    """One Arrow file and the images in it.

    Args:
        path: The file.
        sources: The images.
        quantizer: What encodes them.
    """

    def __init__(self, path: Path, sources: Sequence[Source], quantizer: Quantizer) -> None:
        self.path = path
        self.sources = sources
        # What its content follows from: the quantizer and the images' names, sizes and times of change.
        self.job = compute_fingerprint(
            [quantizer.name, quantizer.fingerprint, [source.stamp for source in sources]]
        )
        self._metadata: dict[str, Any] | None = None

    @property
    def finished(self) -> dict[str, Any] | None:
        """Metadata of the file, if it is there and of this job."""
        if self._metadata is None:
            self._metadata = finished_shard(self.path, self.job)
        return self._metadata

    def entry(self) -> dict[str, Any]:
        """What the manifest says of it."""
        assert self.finished is not None
        grids = len(self.sources) - len(self.finished["failed"])
        return {"file": self.path.name, "grids": grids, "sha256": sha256(self.path)}


def _encode_with_ray(options: QuantizeOptions, shards: list[Shard], total: int) -> dict[str, str]:
    """Make files as `encode_shards` does, in actors of `workers` + 1 CPUs or of a GPU."""
    from being_vl.shards.ray_engine import make_with_ray

    made = make_with_ray(
        _ShardMaker,
        options,
        shards,
        total,
        files=len(shards),
        cpus=options.workers + 1,
        on_gpu=options.device.startswith("cuda"),
    )
    failed: dict[str, str] = {}
    for n, bad in enumerate(made, 1):
        failed |= bad
        log.info("made %d of %d files, %d images failed", n, len(shards), len(failed))
    return failed


class _ShardMaker:
    """Makes one file after the other with a quantizer that is loaded once."""

    def __init__(self, options: QuantizeOptions, shards: list[Shard], total: int) -> None:
        self.options, self.shards, self.total = options, shards, total
        self.quantizer = load_quantizer(options.quantizer, options.device)
        if options.compile:
            self.quantizer.compile()

    def __call__(self, number: int) -> dict[str, str]:
        return encode_shards(self.options, [self.shards[number]], self.quantizer, self.total)


def encode_shards(
    options: QuantizeOptions, shards: list[Shard], quantizer: Quantizer, total: int
) -> dict[str, str]:
    """Make files; returns key → reason of the images that can't be read. `total` is the number of the whole job."""
    sources = [source for shard in shards for source in shard.sources]
    batches = load_images(sources, quantizer.preprocessing, options.batch_size, options.workers)
    encoding: list[float] = []
    rows = encode_batches(batches, quantizer, _device(options.device), encoding)
    failed: dict[str, str] = {}
    done, started = 0, time.perf_counter()
    with tqdm(total=len(sources), unit="image", desc="quantize", disable=None) as bar:
        for shard in shards:
            good: list[GridRow] = []
            bad: dict[str, str] = {}
            for image, grid in islice(rows, len(shard.sources)):
                if grid is None:
                    bad[image.key] = image.reason
                else:
                    good.append(GridRow(image.key, grid, image.source_size, image.sha256))
                bar.update()
            write_shard(shard.path, good, quantizer.codebook_size, {"job": shard.job, "failed": bad})
            failed |= bad
            _check(options, failed, total)
            done += len(shard.sources)
            seconds = time.perf_counter() - started
            log.info(
                "quantized %d of %d images, %d failed; %.1f images a second, encoding %.0f %% of the time",
                *(done, len(sources), len(failed), done / seconds, 100 * sum(encoding) / seconds),
            )
    return failed


def encode_batches(
    batches: Iterable[list[Loaded]], quantizer: Quantizer, device: str, encoding: list[float]
) -> Iterator[tuple[Loaded, NDArray[np.int64] | None]]:
    """Images with their grids, None for those that can't be read; the seconds of encoding are added to `encoding`.

    While the network encodes one batch, in a thread of its own, the next one is fetched and moved to the device.
    """

    # On a stream of their own copies do not wait for the network.
    stream = torch.cuda.Stream(device) if device.startswith("cuda") else None

    def move(batch: list[Loaded]) -> list[Tensor]:
        with torch.cuda.stream(stream):
            return [torch.from_numpy(image.pixels).to(device) for image in batch if image.pixels is not None]

    def encode(pixels: list[Tensor]) -> Iterator[NDArray[np.int64]]:
        began = time.perf_counter()
        grids = quantizer.encode_prepared(pixels)
        encoding.append(time.perf_counter() - began)
        return iter(grids)

    with ThreadPoolExecutor(1) as network:
        begun = ((batch, network.submit(encode, move(batch))) for batch in batches)
        end: tuple[list[Loaded], Future[Iterator[NDArray[np.int64]]]] = [], Future()
        for (batch, encoded), _ in pairwise(chain(begun, [end])):
            grids = encoded.result()
            yield from ((image, None if image.pixels is None else next(grids)) for image in batch)


def _device(device: str) -> str:
    """Of this process: under torchrun each has a GPU of its own."""
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if device == "cuda" and local else device


def _check(options: QuantizeOptions, failed: dict[str, str], total: int) -> None:
    """Stop once too many images have failed, or all of them."""
    if len(failed) > options.max_failed * total or len(failed) == total:
        first = "; ".join(list(failed.values())[:3])
        raise ImageError(
            f"{options.images}: at least {len(failed)} of {total} images cannot be read, more than "
            f"max_failed = {options.max_failed:g} allows; first: {first}"
        )
