"""`being-vl quantize`: images → a folder of grids."""

import hashlib
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from being_vl.errors import ImageError, ManifestError
from being_vl.files import MANIFEST, digest, sha256, write_manifest
from being_vl.quantize.base import Quantizer, load_quantizer
from being_vl.quantize.grids import GridRow, GridStore, read_shard, shard_path, write_shard
from being_vl.quantize.images import decode_image
from being_vl.quantize.options import QuantizeOptions
from being_vl.quantize.sources import Source, find_sources

log = logging.getLogger(__name__)


def quantize(options: QuantizeOptions) -> GridStore:
    """Encode all images that `options.images` names.

    Each Arrow file appears when it is whole and the manifest last; the same job run again takes over the
    files whose images have not changed.

    Raises:
        ImageError: if there is no image, or more than `max_failed` of them can't be read.
        QuantizerError: if the quantizer can't be loaded.
    """
    sources = find_sources(options.images, options.root)
    quantizer = load_quantizer(options.quantizer, options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / MANIFEST).unlink(missing_ok=True)
    failed: dict[str, str] = {}
    shards: list[dict[str, Any]] = []
    with tqdm(total=len(sources), unit="image", desc="quantize", disable=None) as bar:
        for n, start in enumerate(range(0, len(sources), options.shard_size)):
            part = sources[start : start + options.shard_size]
            path = shard_path(options.out, n)
            metadata = _finished(path, job := _job(part, quantizer))
            if metadata is None:
                metadata = {"job": job, "failed": {}}
                rows = list(_rows(options, part, quantizer, metadata["failed"], bar))
                write_shard(path, rows, quantizer.codebook_size, metadata)
            else:
                bar.update(len(part))
            failed |= metadata["failed"]
            _check(options, failed, len(sources))
            shards.append(
                {"file": path.name, "grids": len(part) - len(metadata["failed"]), "sha256": sha256(path)}
            )
            log.info("quantized %d of %d images, %d failed", start + len(part), len(sources), len(failed))
    for stale in set(options.out.glob("grids-*.arrow")) - {options.out / shard["file"] for shard in shards}:
        stale.unlink()
    made_by = {
        "name": quantizer.name,
        "fingerprint": quantizer.fingerprint,
        "codebook_size": quantizer.codebook_size,
        "downsample": quantizer.downsample,
    }
    counts = {"images": str(options.images), "grids": len(sources) - len(failed)}
    write_manifest(options.out, "grids", counts | {"quantizer": made_by, "failed": failed, "shards": shards})
    return GridStore.open(options.out)


def _job(sources: list[Source], quantizer: Quantizer) -> str:
    """What a shard's content follows from: the quantizer and the images' names, sizes and times of change."""
    return digest([quantizer.name, quantizer.fingerprint, [source.stamp for source in sources]])


def _finished(path: Path, job: str) -> dict[str, Any] | None:
    """Metadata of a shard that an earlier run of the same job finished."""
    try:
        _, metadata = read_shard(path)
    except ManifestError:
        return None
    return metadata if metadata.get("job") == job else None


def _rows(
    options: QuantizeOptions,
    sources: list[Source],
    quantizer: Quantizer,
    failed: dict[str, str],
    bar: "tqdm[Any]",
) -> Iterator[GridRow]:
    """Encode the images; those that can't be read go to `failed` with the reason."""

    def read(source: Source) -> tuple[str, Image.Image | None, str]:
        """The image, with its file's checksum, or with the reason why there is none."""
        try:
            data = source.read()
            return source.key, decode_image(data, source.key), hashlib.sha256(data).hexdigest()
        except OSError as error:
            return source.key, None, f"{source.key}: cannot be read ({error.strerror})"
        except ImageError as error:
            return source.key, None, str(error)

    with ThreadPoolExecutor(2) as pool:
        for start in range(0, len(sources), options.batch_size):
            done = list(pool.map(read, sources[start : start + options.batch_size]))
            good = [(key, image, checksum) for key, image, checksum in done if image is not None]
            failed |= {key: reason for key, image, reason in done if image is None}
            grids = quantizer.encode([image for _, image, _ in good])
            for (key, image, checksum), grid in zip(good, grids, strict=True):
                yield GridRow(key, grid, image.size, checksum)
            bar.update(len(done))


def _check(options: QuantizeOptions, failed: dict[str, str], total: int) -> None:
    """Stop once too many images have failed, or all of them."""
    if len(failed) > options.max_failed * total or len(failed) == total:
        first = "; ".join(list(failed.values())[:3])
        raise ImageError(
            f"{options.images}: at least {len(failed)} of {total} images cannot be read, more than "
            f"max_failed = {options.max_failed:g} allows; first: {first}"
        )
