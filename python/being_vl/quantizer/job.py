"""`being-vl quantize`: images → a folder of grids."""

import dataclasses
import json
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from being_vl.account import LEFT_OUT, Account
from being_vl.devices import find_device
from being_vl.errors import ImageError
from being_vl.files import write_aside
from being_vl.hub import local_path
from being_vl.images.encoded import ImageSource
from being_vl.images.files import LeftOut, is_text
from being_vl.images.sources import Findings, find_images
from being_vl.names import show_name
from being_vl.options import fixed_options
from being_vl.outputs import check_folder, free_locks
from being_vl.progress import progress_bar, show_log_lines
from being_vl.quantizer.base import Quantizer, load_quantizer
from being_vl.quantizer.loading import NO_IMAGE, LoadedImage, load_images
from being_vl.quantizer.options import QuantizeOptions
from being_vl.shards.grids import KIND, GridRow, GridStore, grid_columns
from being_vl.shards.job import Shard, ShardedJob

log = logging.getLogger(__name__)

MAX_REASONS = 3
"""Images that cannot be read, with their reasons, in a message."""

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
    root = options.root and local_path(options.root)
    options = dataclasses.replace(options, images=local_path(options.images), root=root)
    check_folder(options.out, KIND, inputs=[options.images, options.quantizer])
    # Find the images; Ray's actors load the quantizer again where they run, so here it need not be on a GPU.
    findings = find_images(options.images, options.root, options.allow_outside, options.column)
    sources = findings.sources
    device = "cpu" if options.engine == "ray" else find_device(options.device)
    quantizer = load_quantizer(options.quantizer, device)
    job = _plan_shards(options, sources, quantizer)
    is_finished = job.is_finished()
    if not is_finished:
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

    # Collect those of all ranks, and account for everything that was found.
    failures = Failures()
    for metadata in job.wait():
        failures.add(metadata)
    _check_failures(options, failures, len(sources))
    if is_finished:
        log.info("%s: finished before, kept", options.out)
    else:
        _publish(job, quantizer, findings, failures)
    _report(findings, failures)
    return GridStore.open(options.out)


@dataclasses.dataclass
class Failures:
    """The images of one or more shards that have no grid.

    Args:
        reasons: Key → reason, of those that cannot be read.
        kinds: Kind of reason → how many of these.
        empty_rows: Keys of rows without an image.
    """

    reasons: dict[str, str] = dataclasses.field(default_factory=dict)
    kinds: Counter[str] = dataclasses.field(default_factory=Counter)
    empty_rows: list[str] = dataclasses.field(default_factory=list)

    def add_image(self, image: LoadedImage) -> None:
        """Add an image that has no grid."""
        if image.kind == NO_IMAGE:
            self.empty_rows.append(image.key)
        else:
            self.reasons[image.key] = image.reason
            self.kinds[image.kind] += 1

    def add(self, fields: dict[str, Any]) -> None:
        """Add what `to_json` gave."""
        self.reasons |= fields["failures"]
        self.kinds += Counter(fields["failure_kinds"])
        self.empty_rows += fields["empty_rows"]

    def to_json(self) -> dict[str, Any]:
        """All fields, for the metadata of a shard."""
        kinds = dict(self.kinds.most_common())
        return {"failures": self.reasons, "failure_kinds": kinds, "empty_rows": self.empty_rows}


def _make_account(findings: Findings, failures: Failures) -> Account:
    """What became of everything that was found."""
    account = findings.account()
    account.left_out += failures.kinds
    account.left_out[NO_IMAGE] += len(failures.empty_rows)
    account.used -= failures.kinds.total() + len(failures.empty_rows)
    return account


def _publish(
    job: ShardedJob[Sequence[ImageSource]], quantizer: Quantizer, findings: Findings, failures: Failures
) -> None:
    """Write the list of what was left out, and the manifest."""
    items = findings.left_out + [LeftOut(key, NO_IMAGE) for key in failures.empty_rows]
    with write_aside(job.folder / LEFT_OUT) as temporary_path:
        temporary_path.write_text("".join(map(_to_line, items)), encoding="utf-8")
    quantizer_fields = {
        "name": quantizer.name,
        "fingerprint": quantizer.fingerprint,
        "codebook_size": quantizer.codebook_size,
        "downsample": quantizer.downsample,
    }
    fields = {
        "root": str(findings.root),
        "quantizer": quantizer_fields,
        "failures": failures.reasons,
        "account": _make_account(findings, failures).to_json(),
    }
    job.publish(["grids"], fields)


def _to_line(item: LeftOut) -> str:
    """A line of JSON that says why something was left out."""
    fields: dict[str, Any] = {"name": item.name if is_text(item.name) else show_name(item.name, 4096)}
    fields["reason"] = item.reason
    fields |= {"detail": show_name(item.detail, 1000)} if item.detail else {}
    fields |= {"count": item.count} if item.count > 1 else {}
    return json.dumps(fields, ensure_ascii=False) + "\n"


def _report(findings: Findings, failures: Failures) -> None:
    """Log the first images that cannot be read and, as the last line, the account."""
    if failures.reasons:
        log.info("%d images cannot be read; %s", len(failures.reasons), _first_reasons(failures))
    log.info(_make_account(findings, failures).describe())


def _first_reasons(failures: Failures) -> str:
    return f"first: {'; '.join(list(failures.reasons.values())[:MAX_REASONS])}"


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
        return len(encode_shards(self.options, shards, self.quantizer, self.device, self.num_images).reasons)


def encode_shards(
    options: QuantizeOptions, shards: list[ImageShard], quantizer: Quantizer, device: str, num_images: int
) -> Failures:
    """Make shards.

    Args:
        options: Of the job.
        shards: Those to be made.
        quantizer: What encodes the images.
        device: Where it runs.
        num_images: Images of the whole job, those of other shards too.

    Returns:
        The images that have no grid.

    Raises:
        ImageError: if these are more than `max_failed` of `num_images`.
    """
    sources = [source for shard in shards for source in shard.inputs]
    batches = load_images(sources, quantizer.preprocessing, options.batch_size, options.workers)
    encoding_times: list[float] = []
    pairs = encode_batches(batches, quantizer, device, encoding_times)
    failures = Failures()
    # Images of other shards are there already, or other ranks make them.
    total, num_before = len(sources), num_images - len(sources)
    others = f", {num_before} in other shards" if num_before else ""
    count, start = 0, time.perf_counter()
    with progress_bar(total, "image", "quantize") as bar:
        for shard in shards:
            rows: list[GridRow] = []
            shard_failures = Failures()
            for image, grid in islice(pairs, len(shard.inputs)):
                if grid is None:
                    shard_failures.add_image(image)
                else:
                    rows.append(GridRow(image.key, grid, image.source_size, image.sha256))
                bar.update()
            columns = grid_columns(rows, quantizer.codebook_size)
            fields = shard_failures.to_json()
            shard.write(columns, {"grids": len(rows), **fields})
            failures.add(fields)
            _check_failures(options, failures, num_images)
            count += len(shard.inputs)
            seconds = time.perf_counter() - start
            log.info(
                "quantized %d of %d images%s, %d failed; %.1f images a second, encoding %.0f %% of the time",
                *(count, total, others, len(failures.reasons), count / seconds),
                100 * sum(encoding_times) / seconds,
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


def _check_failures(options: QuantizeOptions, failures: Failures, num_images: int) -> None:
    """Stop once too many images cannot be read, or none can.

    Raises:
        ImageError: with the reasons of the first ones.
    """
    num_failures = len(failures.reasons)
    num_images -= len(failures.empty_rows)
    if num_images == 0:
        raise ImageError(f"{options.images}: none of its {len(failures.empty_rows)} rows has an image")
    if num_failures > options.max_failed * num_images or num_failures == num_images:
        raise ImageError(
            f"{options.images}: at least {num_failures} of {num_images} images cannot be read, more than "
            f"max_failed = {options.max_failed:g} allows; {_first_reasons(failures)}"
        )
