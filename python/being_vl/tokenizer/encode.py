"""`being-vl encode`: a folder of grids → a folder of visual BPE tokens."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from being_vl.errors import QuantizerError
from being_vl.files import MANIFEST, read_manifest, sha256, write_manifest
from being_vl.fingerprints import compute_fingerprint
from being_vl.shards.grids import GridStore, finished_shard, rank_and_count, read_shard, write_table
from being_vl.tokenizer import VisualBPE
from being_vl.tokenizer.options import EncodeOptions

log = logging.getLogger(__name__)


def encode_grids(options: EncodeOptions) -> None:
    """Encode all grids of a folder, file by file.

    A file `tokens-N.arrow` for each `grids-N.arrow`: columns `key`, `height`, `width` and `tokens`, a list of the
    smallest unsigned type that the vocabulary fits into. Files appear when they are whole and the manifest last; the
    same job run again takes over those that are finished. Under torchrun each process makes every n-th file.

    Raises:
        ManifestError: if the folder of grids is missing, unfinished or damaged.
        VocabularyError: if the vocabulary cannot be read.
        QuantizerError: if the vocabulary was made for another quantizer, naming both.
    """
    rank, ranks = rank_and_count()
    store, bpe = GridStore.open(options.grids), VisualBPE.load(options.vocabulary)
    if bpe.quantizer_fingerprint not in (None, store.quantizer_fingerprint):
        raise QuantizerError(
            f"{options.vocabulary}: made for quantizer {bpe.quantizer_name!r} ({bpe.quantizer_fingerprint[:12]}), the "
            f"grids in {options.grids} by {store.quantizer_name!r} ({store.quantizer_fingerprint[:12]})"
        )
    grids = read_manifest(options.grids, "grids")
    vocabulary = {"sha256": sha256(options.vocabulary), "vocab_size": bpe.vocab_size}
    paths = [options.out / shard["file"].replace("grids-", "tokens-") for shard in grids["shards"]]
    jobs = [compute_fingerprint([shard["sha256"], vocabulary["sha256"]]) for shard in grids["shards"]]
    options.out.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        (options.out / MANIFEST).unlink(missing_ok=True)
    todo = [
        _File(path, job, options.grids / shard["file"])
        for path, job, shard in list(zip(paths, jobs, grids["shards"], strict=True))[rank::ranks]
        if finished_shard(path, job) is None
    ]
    for _ in tqdm(_make(options, todo), total=len(todo), unit="file", desc="encode", disable=None):
        pass
    if rank > 0:
        return
    entries: list[dict[str, Any]] = []
    for path, job in zip(paths, jobs, strict=True):
        while (found := finished_shard(path, job)) is None:  # as in `being-vl quantize`
            time.sleep(0.2)
        counts = {name: found[name] for name in ("grids", "cells", "tokens")}
        entries.append({"file": path.name} | counts | {"sha256": sha256(path)})
    for stale in set(options.out.glob("tokens-*.arrow")) - set(paths):
        stale.unlink()
    total = {name: sum(entry[name] for entry in entries) for name in ("grids", "cells", "tokens")}
    fields = {"quantizer": grids["quantizer"], "vocabulary": vocabulary, "shards": entries}
    write_manifest(options.out, "tokens", total | fields)
    log.info(
        "%s: %d cells of %d grids became %d tokens",
        options.out,
        *map(total.get, ("cells", "grids", "tokens")),
    )


class _File(NamedTuple):
    """A file of tokens, what its content follows from, and the file of grids that it is made of."""

    path: Path
    job: str
    grids: Path


class _FileMaker:
    """Makes one file after the other with a vocabulary that is loaded once."""

    def __init__(self, vocabulary: Path, files: list[_File], num_threads: int | None) -> None:
        self.bpe, self.files, self.num_threads = VisualBPE.load(vocabulary), files, num_threads

    def __call__(self, number: int) -> None:
        path, job, grids = self.files[number]
        columns, counts = _encode(read_shard(grids)[0], self.bpe, self.num_threads)
        write_table(path, columns, {"job": job} | counts)


def _make(options: EncodeOptions, files: list[_File]) -> Iterator[None]:
    if options.engine == "local":
        return map(_FileMaker(options.vocabulary, files, options.num_threads), range(len(files)))
    from being_vl.shards.ray_engine import make_with_ray

    cpus = options.num_threads or 1
    return make_with_ray(_FileMaker, options.vocabulary, files, cpus, files=len(files), cpus=cpus)


def _encode(
    batch: pa.RecordBatch, bpe: VisualBPE, num_threads: int | None
) -> tuple[dict[str, pa.Array], dict[str, int]]:
    """A file's columns, and numbers of grids, cells and tokens."""
    ids, offsets = batch.column("ids").values.to_numpy(), batch.column("ids").offsets.to_numpy()
    shapes = zip(batch.column("height").to_pylist(), batch.column("width").to_pylist(), strict=True)
    grids = [
        ids[start:end].reshape(shape)
        for start, end, shape in zip(offsets[:-1], offsets[1:], shapes, strict=True)
    ]
    encoded = bpe.encode_batch(grids, num_threads=num_threads)
    tokens = pa.array(encoded.values.astype(np.min_scalar_type(bpe.vocab_size - 1)))
    columns = {name: batch.column(name) for name in ("key", "height", "width")}
    columns["tokens"] = pa.ListArray.from_arrays(pa.array(encoded.offsets.astype(np.int32)), tokens)
    return columns, {"grids": len(grids), "cells": int(offsets[-1] - offsets[0]), "tokens": len(tokens)}
