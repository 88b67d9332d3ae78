"""`being-vl quantize`: images → a folder of grids."""

import dataclasses
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from being_vl.devices import find_device
from being_vl.errors import ImageError
from being_vl.images.sources import ImageSource, find_images
from being_vl.options import fixed_options
from being_vl.outputs import check_folder, free_locks
from being_vl.progress import progress_bar, show_log_lines
from being_vl.quantizer.base import Quantizer, load_quantizer
from being_vl.quantizer.loading import LoadedImage, load_images
from being_vl.quantizer.options import QuantizeOptions
from being_vl.shards.grids import KIND, GridRow, GridStore, grid_columns
from being_vl.shards.job import Shard, ShardedJob

log = logging.getLogger(__name__)

ImageShard = Shard[Sequence[ImageSource]]


@show_log_lines()
@free_locks()
def quantize(options: QuantizeOptions) -> GridStore | None:
    """Encode all images that `options.images` names.

    The same job run again goes on where it was, and makes those shards again whose images have changed. Under torchrun
    (RANK and WORLD_SIZE in the environment) the ranks share the shards.

    Returns:
        The grids; None on all ranks but the first.

    Raises:
        ImageError: if there is no image, or more than `max_failed` of them cannot be read.
        QuantizerError: if the quantizer cannot be loaded.
        FingerprintError: if `out` holds grids of another quantizer, other images or another `shard_size`, and
            `overwrite` is not set.
        OutputError: if `out` holds anything else, or another process is writing there.
    """
    check_folder(options.out, KIND, inputs=[options.images, options.quantizer])
    # Find the images; Ray's actors load the quantizer again where they run, so here it need not be on a GPU.
    sources = find_images(options.images, options.root)
    device = "cpu" if options.engine == "ray" else find_device(options.device)
    quantizer = load_quantizer(options.quantizer, device)
    job = _plan_shards(options, sources, quantizer)
    if job.is_finished():
        if job.rank > 0:
            return None
        store = GridStore.open(options.out)
        _check_failures(options, store.failures, len(sources))
        log.info("%s: finished before, kept", options.out)
        return store

    # Make this rank's shards.
    shards = job.claim()
    if options.engine == "ray":
        _encode_with_ray(options, shards, len(sources))
    else:
        if options.compile:
            quantizer.compile()
        encode_shards(options, shards, quantizer, device, len(sources))
    if job.rank > 0:
        return None

    # Collect those of all ranks.
    failures: dict[str, str] = {}
    for metadata in job.wait():
        failures |= metadata["failures"]
    _check_failures(options, failures, len(sources))
    quantizer_fields = {
        "name": quantizer.name,
        "fingerprint": quantizer.fingerprint,
        "codebook_size": quantizer.codebook_size,
        "downsample": quantizer.downsample,
    }
    job.publish(["grids"], {"quantizer": quantizer_fields, "failures": failures})
    return GridStore.open(options.out)


def _plan_shards(
    options: QuantizeOptions, sources: Sequence[ImageSource], quantizer: Quantizer
) -> ShardedJob[Sequence[ImageSource]]:
    """The job with all of its shards; a shard follows from the quantizer and from its images as they are now."""
    root = options.root and options.root.absolute()
    fields = fixed_options(dataclasses.replace(options, images=options.images.absolute(), root=root))
    names = {"name": quantizer.name, "fingerprint": quantizer.fingerprint}
    job = ShardedJob[Sequence[ImageSource]](
        options.out, KIND, fields | {"quantizer": names}, options.overwrite
    )
    for start in range(0, len(sources), options.shard_size):
        part = sources[start : start + options.shard_size]
        job.add_shard(part, [names, [source.fingerprint for source in part]])
    return job


def _encode_with_ray(options: QuantizeOptions, shards: list[ImageShard], num_images: int) -> None:
    """Make shards as `encode_shards` does, in actors of `workers` + 1 CPUs or of a GPU."""
    from being_vl.shards.ray_engine import make_shards_with_ray

    arguments = options, shards, num_images
    counts = make_shards_with_ray(
        _ShardMaker, *arguments, shards=len(shards), cpus=options.workers + 1, device=options.device
    )
    num_failures = 0
    for number, count in enumerate(counts, 1):
        num_failures += count
        log.info("quantized %d of %d shards, %d images failed", number, len(shards), num_failures)


class _ShardMaker:
    """Makes one shard after the other with a quantizer that is loaded once; returns how many images failed."""

    def __init__(self, options: QuantizeOptions, shards: list[ImageShard], num_images: int) -> None:
        self.options, self.shards, self.num_images = options, shards, num_images
        self.device = find_device(options.device)
        self.quantizer = load_quantizer(options.quantizer, self.device)
        if options.compile:
            self.quantizer.compile()

    def __call__(self, number: int) -> int:
        shards = [self.shards[number]]
        return len(encode_shards(self.options, shards, self.quantizer, self.device, self.num_images))


def encode_shards(
    options: QuantizeOptions, shards: list[ImageShard], quantizer: Quantizer, device: str, num_images: int
) -> dict[str, str]:
    """Make shards.

    Args:
        options: Of the job.
        shards: Those to be made.
        quantizer: What encodes the images.
        device: Where it runs.
        num_images: Images of the whole job, those of other shards too.

    Returns:
        Key → reason, of the images that cannot be read.

    Raises:
        ImageError: if these are more than `max_failed` of `num_images`.
    """
    sources = [source for shard in shards for source in shard.inputs]
    batches = load_images(sources, quantizer.preprocessing, options.batch_size, options.workers)
    encoding_times: list[float] = []
    pairs = encode_batches(batches, quantizer, device, encoding_times)
    failures: dict[str, str] = {}
    count, start = 0, time.perf_counter()
    with progress_bar(len(sources), "image", "quantize") as bar:
        for shard in shards:
            rows: list[GridRow] = []
            reasons: dict[str, str] = {}
            for image, grid in islice(pairs, len(shard.inputs)):
                if grid is None:
                    reasons[image.key] = image.reason
                else:
                    rows.append(GridRow(image.key, grid, image.source_size, image.sha256))
                bar.update()
            columns = grid_columns(rows, quantizer.codebook_size)
            shard.write(columns, {"grids": len(rows), "failures": reasons})
            failures |= reasons
            _check_failures(options, failures, num_images)
            count += len(shard.inputs)
            seconds = time.perf_counter() - start
            log.info(
                "quantized %d of %d images, %d failed; %.1f images a second, encoding %.0f %% of the time",
                *(count, len(sources), len(failures), count / seconds, 100 * sum(encoding_times) / seconds),
            )
    return failures


def encode_batches(
    batches: Iterable[list[LoadedImage]], quantizer: Quantizer, device: str, encoding_times: list[float]
) -> Iterator[tuple[LoadedImage, NDArray[np.int64] | None]]:
    """Encode images batch by batch.

    While the network encodes one batch, in a thread of its own, the next one is fetched and moved to the device.

    Args:
        batches: The images.
        quantizer: What encodes them.
        device: Where it runs.
        encoding_times: Takes the seconds that each batch was encoded.

    Yields:
        Each image with its grid, None for one that cannot be read.
    """
    # On a stream of their own, copies do not wait for the network.
    stream = torch.cuda.Stream(device) if device.startswith("cuda") else None

    def move(batch: list[LoadedImage]) -> list[Tensor]:
        with torch.cuda.stream(stream):
            return [torch.from_numpy(image.pixels).to(device) for image in batch if image.pixels is not None]

    def encode(pixels: list[Tensor]) -> Iterator[NDArray[np.int64]]:
        start = time.perf_counter()
        grids = quantizer.encode_prepared(pixels)
        encoding_times.append(time.perf_counter() - start)
        return iter(grids)

    with ThreadPoolExecutor(1) as network:
        # Each batch is submitted before the result of the one before it is waited for.
        submissions = ((batch, network.submit(encode, move(batch))) for batch in batches)
        end: tuple[list[LoadedImage], Future[Iterator[NDArray[np.int64]]]] = [], Future()
        for (batch, future), _ in pairwise(chain(submissions, [end])):
            grids = future.result()
            yield from ((image, None if image.pixels is None else next(grids)) for image in batch)


def _check_failures(options: QuantizeOptions, failures: Mapping[str, Any], num_images: int) -> None:
    """Stop once too many images cannot be read, or none can.

    Raises:
        ImageError: with the reasons of the first ones.
    """
    if len(failures) > options.max_failed * num_images or len(failures) == num_images:
        reasons = "; ".join(list(failures.values())[:3])
        raise ImageError(
            f"{options.images}: at least {len(failures)} of {num_images} images cannot be read, more than "
            f"max_failed = {options.max_failed:g} allows; first: {reasons}"
        )
