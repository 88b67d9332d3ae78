"""`being-vl encode`: a folder of grids → a folder of visual BPE tokens."""

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from being_vl.account import Account
from being_vl.files import read_manifest, sha256
from being_vl.options import fixed_options
from being_vl.outputs import check_folder, free_locks
from being_vl.progress import progress_bar, show_log_lines
from being_vl.quantizer_names import check_same_quantizer
from being_vl.shards import grids
from being_vl.shards.job import Shard, ShardedJob
from being_vl.tokenizer import VisualBPE
from being_vl.tokenizer.options import EncodeOptions

log = logging.getLogger(__name__)

KIND = "tokens"
"""Kind of the manifest of a folder of tokens."""


@show_log_lines()
@free_locks()
def encode_grids(options: EncodeOptions) -> None:
    """Encode all grids of a folder, shard by shard.

    A shard `tokens-N.arrow` for each `grids-N.arrow`: columns `key`, `height`, `width` and `tokens`, a list of the
    smallest unsigned type that the vocabulary fits into. The same job run again goes on where it was, and makes those
    shards again whose grids have changed. Under torchrun the ranks share the shards.

    Raises:
        ManifestError: if the folder of grids is missing, unfinished or damaged.
        VocabularyError: if the vocabulary cannot be read.
        QuantizerError: if the vocabulary was made for another quantizer, naming both.
        FingerprintError: if `out` holds tokens of another vocabulary or another folder of grids, and `overwrite` is
            not set.
        OutputError: if `out` holds anything else, or another process is writing there.
    """
    check_folder(options.out, KIND, inputs=[options.grids, options.vocabulary])
    # Open grids and vocabulary, and see that they belong together.
    store, bpe = grids.GridStore.open(options.grids), VisualBPE.load(options.vocabulary)
    check_same_quantizer(
        str(options.vocabulary),
        (bpe.quantizer_name, bpe.quantizer_fingerprint),
        str(options.grids),
        (store.quantizer_name, store.quantizer_fingerprint),
    )
    manifest = read_manifest(options.grids, grids.KIND)
    vocabulary = {"sha256": sha256(options.vocabulary), "vocab_size": bpe.vocab_size}

    # A shard of tokens follows from the vocabulary and from a shard of grids.
    inputs = fixed_options(dataclasses.replace(options, grids=options.grids.absolute()))
    job = ShardedJob[Path](options.out, KIND, inputs | {"vocabulary": vocabulary}, options.overwrite)
    for entry in manifest["shards"]:
        job.add_shard(options.grids / entry["file"], [entry["sha256"], vocabulary["sha256"]])
    if job.is_finished():
        if job.rank == 0:
            log.info("%s: finished before, kept", options.out)
        return

    # Make this rank's shards, and on the first rank the manifest of all.
    shards = job.claim()
    with progress_bar(len(shards), "shard", "encode") as bar:
        for _ in _make_shards(options, shards):
            bar.update()
    if job.rank > 0:
        return
    account = Account("grids", sum(entry["grids"] for entry in manifest["shards"]))
    fields = {"quantizer": manifest["quantizer"], "vocabulary": vocabulary, "account": account.to_json()}
    totals = job.publish(["grids", "cells", "tokens"], fields)
    log.info(
        "%s: %d cells of %d grids became %d tokens",
        options.out,
        *(totals[name] for name in ("cells", "grids", "tokens")),
    )
    log.info(account.describe())


def _make_shards(options: EncodeOptions, shards: list[Shard[Path]]) -> Iterator[None]:
    """Make one shard after the other, or as many at a time as the Ray cluster has room for."""
    if options.engine == "local":
        return map(_ShardMaker(options.vocabulary, shards, options.num_threads), range(len(shards)))
    from being_vl.shards.ray_engine import make_shards_with_ray

    cpus = options.num_threads or 1
    arguments = options.vocabulary, shards, cpus
    return make_shards_with_ray(_ShardMaker, *arguments, shards=len(shards), cpus=cpus)


class _ShardMaker:
    """Makes one shard after the other with a vocabulary that is loaded once."""

    def __init__(self, vocabulary: Path, shards: list[Shard[Path]], num_threads: int | None) -> None:
        self.bpe, self.shards, self.num_threads = VisualBPE.load(vocabulary), shards, num_threads

    def __call__(self, number: int) -> None:
        shard = self.shards[number]
        columns, counts = _encode(grids.read_grids(shard.inputs), self.bpe, self.num_threads)
        shard.write(columns, counts)


def _encode(
    batch: pa.RecordBatch, bpe: VisualBPE, num_threads: int | None
) -> tuple[dict[str, pa.Array], dict[str, int]]:
    """The columns of a shard, and its numbers of grids, cells and tokens."""
    ids, offsets = batch.column("ids").values.to_numpy(), batch.column("ids").offsets.to_numpy()
    shapes = zip(batch.column("height").to_pylist(), batch.column("width").to_pylist(), strict=True)
    arrays = [
        ids[start:end].reshape(shape)
        for start, end, shape in zip(offsets[:-1], offsets[1:], shapes, strict=True)
    ]
    encodings = bpe.encode_batch(arrays, num_threads=num_threads)
    tokens = pa.array(encodings.values.astype(np.min_scalar_type(bpe.vocab_size - 1)))
    columns = {name: batch.column(name) for name in ("key", "height", "width")}
    columns["tokens"] = pa.ListArray.from_arrays(pa.array(encodings.offsets.astype(np.int32)), tokens)
    return columns, {"grids": len(arrays), "cells": int(offsets[-1] - offsets[0]), "tokens": len(tokens)}
