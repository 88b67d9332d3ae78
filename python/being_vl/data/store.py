"""Tokenised records on disk, grouped as mixtures name them. Reading needs numpy and pyarrow alone."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from being_vl.data.sequences import ImageSpan, RecordGroup, SequenceBuilder, TokenSequence
from being_vl.errors import ConfigError, ManifestError
from being_vl.files import read_manifest
from being_vl.shards.grids import METADATA, write_table

_SAMPLE = 256
"""Records with images, evenly spread, of which is measured how much longer BPE-dropout makes them."""


class Sequences(Protocol):
    """Tokenised records; each is in one group.

    Attributes:
        dropout: Probability with which BPE-dropout skips a merge.
        pad_id: An id to fill up batches with.
        categories: Those that records may have.
    """

    dropout: float
    pad_id: int
    categories: Sequence[str]

    @property
    def lengths(self) -> Mapping[RecordGroup, NDArray[np.int32]]:
        """Of each group the tokens of each of its records, with BPE-dropout as expected. Rows are planned by these."""

    def get(self, group: RecordGroup, index: int, position: int, share: float = 1.0) -> TokenSequence:
        """One record; also called in the processes of a data loader.

        Args:
            group: One of `lengths`.
            index: Of the record in its group, from 0.
            position: Of this reading in the training's stream of records; BPE-dropout is a function of it and the seed.
            share: Of the dropout's probability; 0 is without.
        """


def shard_path(folder: Path, n: int) -> Path:
    """Path of the n-th Arrow file."""
    return folder / f"sequences-{n:05d}.arrow"


def write_shard(path: Path, examples: Sequence[TokenSequence], metadata: dict[str, Any]) -> None:
    """Write examples as one Arrow IPC file; it appears only when complete.

    Weights are kept as runs: where each ends, and the weight in it. Counts are added to `metadata`, kept in the schema.
    """
    ends = [np.append(np.flatnonzero(np.diff(e.weights)) + 1, len(e.weights)) for e in examples]
    trained = [np.count_nonzero(example.weights) for example in examples]
    images = [example.images for example in examples]
    columns = {
        "ids": _lists([example.ids for example in examples], np.int32),
        "weight_ends": _lists(ends, np.int32),
        "weights": _lists([e.weights[end - 1] for e, end in zip(examples, ends, strict=True)], np.float32),
        "trained": pa.array(trained, pa.int32()),
        "category": pa.array([example.category for example in examples], pa.string()).dictionary_encode(),
        "source": pa.array([example.source for example in examples], pa.string()).dictionary_encode(),
        "where": pa.array([example.where for example in examples], pa.string()),
        "image_keys": pa.array([[image.key for image in found] for found in images], pa.list_(pa.string())),
    }
    for name in ("start", "stop", "cells"):
        columns[f"image_{name}"] = _lists([[getattr(i, name) for i in found] for found in images], np.int32)
    counts = {
        "examples": len(examples),
        "tokens": sum(len(example.ids) for example in examples),
        "trained_tokens": int(sum(trained)),
    }
    write_table(path, columns, metadata | counts)


def _lists(rows: Sequence[Any], dtype: Any) -> pa.ListArray:
    values = np.concatenate(rows).astype(dtype) if rows else np.empty(0, dtype)
    offsets = np.cumsum([0, *map(len, rows)])
    if offsets[-1] > np.iinfo(np.int32).max:
        raise ConfigError(f"an Arrow file of {offsets[-1]} tokens is too large; choose a smaller shard_size")
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))


class _Lists(NamedTuple):
    """A column of lists, without a copy."""

    values: NDArray[Any]
    offsets: NDArray[np.int32]

    def __getitem__(self, row: int) -> NDArray[Any]:  # type: ignore[override]
        return self.values[self.offsets[row] : self.offsets[row + 1]]


class _Shard:
    """One Arrow file, mapped into memory."""

    def __init__(self, path: Path, num_rows: int) -> None:
        try:
            self.batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
            self.metadata = json.loads(self.batch.schema.metadata[METADATA])
            self.ids, self.weight_ends, self.weights, self.starts, self.stops, self.cells = (
                _Lists(column.values.to_numpy(), column.offsets.to_numpy())
                for column in map(
                    self.batch.column,
                    ("ids", "weight_ends", "weights", "image_start", "image_stop", "image_cells"),
                )
            )
        except (OSError, pa.ArrowInvalid, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ManifestError(
                f"{path}: not an Arrow file of sequences ({error}); delete it and prepare again"
            ) from None
        if self.batch.num_rows != num_rows:
            raise ManifestError(
                f"{path}: holds {self.batch.num_rows} sequences, the manifest says {num_rows}; prepare again"
            )

    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each row."""
        return np.diff(self.ids.offsets)

    def saved(self) -> NDArray[np.int64]:
        """Ids of each row's grids that merges have saved as tokens."""
        sums = np.cumsum(self.cells.values - (self.stops.values - self.starts.values), dtype=np.int64)
        return np.diff(np.append(0, sums)[self.cells.offsets])

    def groups(self, known: dict[RecordGroup, int]) -> NDArray[np.uint16]:
        """The number in `known` of each row's group; `known` takes those that are new."""
        category, source = self.batch.column("category"), self.batch.column("source")
        text_only = np.diff(self.starts.offsets) == 0
        shape = len(category.dictionary), len(source.dictionary), 2
        rows = np.ravel_multi_index(
            (category.indices.to_numpy(), source.indices.to_numpy(), text_only.astype(np.intp)), shape
        )
        found, numbers = np.unique(rows, return_inverse=True)
        places = zip(*np.unravel_index(found, shape), strict=True)
        groups = (
            RecordGroup(category.dictionary[int(c)].as_py(), source.dictionary[int(s)].as_py(), bool(t))
            for c, s, t in places
        )
        of_found = np.array([known.setdefault(group, len(known)) for group in groups], np.uint16)
        return of_found[numbers]

    def example(self, row: int) -> TokenSequence:
        """One row."""
        keys = self.batch.column("image_keys")[row].as_py()
        spans = zip(
            keys,
            *(column[row].tolist() for column in (self.starts, self.stops, self.cells)),
            strict=True,
        )
        category, source, where = (
            self.batch.column(name)[row].as_py() for name in ("category", "source", "where")
        )
        weights = np.repeat(self.weights[row], np.diff(self.weight_ends[row], prepend=0))
        images = tuple(ImageSpan(*span) for span in spans)
        return TokenSequence(self.ids[row], weights, category, source, where, images)


class PreparedSequences:
    """`Sequences` that `being-vl prepare` wrote; in memory are eight bytes a record.

    Args:
        folder: What `being-vl prepare` wrote.
        builder: What BPE-dropout encodes images with.
        dropout: Probability with which it skips a merge. Where a sequence would become too long by it, there is none.
        seed: Its seed.
        longest: Tokens beyond which a sequence is too long, if less than those that it was prepared for.

    Attributes:
        manifest: The folder's manifest.
        shards: Its files.
        pad_id, categories: See `Sequences`.

    Raises:
        ManifestError: if the folder is missing, unfinished or damaged, or of another model.
        ConfigError: if there is to be dropout, but no grids.
    """

    def __init__(
        self,
        folder: Path,
        builder: SequenceBuilder,
        dropout: float = 0.0,
        seed: int = 0,
        longest: int | None = None,
    ) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder, "sequences")
        made, now = self.manifest["recipe"], builder.fingerprint_fields()
        differing = [key for key in ("tokenizer", "text_size", "vocabulary") if made[key] != now[key]]
        if differing:
            raise ManifestError(
                f"{folder}: made for another model ({', '.join(differing)} differ); prepare the records for this one"
            )
        self.pad_id = builder.pad_id
        self.categories: Sequence[str] = self.manifest["recipe"]["categories"]
        self.dropout = dropout
        self.builder = builder
        self._longest = min(self.manifest["recipe"]["max_length"], longest or math.inf)
        self._seed = seed
        if dropout and (builder.grids is None or builder.bpe is None):
            raise ConfigError(
                "dropout needs an expanded model, and the grids that the sequences were made from"
            )
        self.shards = [_Shard(folder / s["file"], s["examples"]) for s in self.manifest["shards"]]
        self._ends = np.cumsum([shard.batch.num_rows for shard in self.shards])
        known: dict[RecordGroup, int] = {}
        numbers = np.concatenate([shard.groups(known) for shard in self.shards])
        names = sorted(known)
        order = np.array([names.index(name) for name in known], np.uint16)[numbers]
        rows = np.argsort(order, kind="stable").astype(np.int32)
        lengths = np.concatenate([shard.lengths() for shard in self.shards])
        if dropout:
            lengths = self._expected(lengths)
        lengths = lengths[rows]
        ends = np.cumsum(np.bincount(order, minlength=len(names))).tolist()
        slices = dict(zip(names, map(slice, [0, *ends], ends), strict=False))
        self.lengths = {group: lengths[part] for group, part in slices.items()}
        self._rows = {group: rows[part] for group, part in slices.items()}

    def _expected(self, lengths: NDArray[np.int32]) -> NDArray[np.int32]:
        """The lengths with BPE-dropout: of what merges have saved in a record's images, it gives back a share."""
        saved = np.concatenate([shard.saved() for shard in self.shards])
        sample = np.flatnonzero(saved)
        sample = sample[:: max(1, len(sample) // _SAMPLE)].tolist()
        grown = 0
        for row in sample:
            example = self.read(row)
            grown += len(self.builder.reencode(example, self.dropout, row).ids) - len(example.ids)
        share = max(0.0, grown / max(1, saved[sample].sum()))
        expected = lengths + np.round(saved * share).astype(np.int32)
        return np.where(expected > self._longest, lengths, expected)

    def get(self, group: RecordGroup, index: int, position: int, share: float = 1.0) -> TokenSequence:
        """See `Sequences`."""
        example = self.read(int(self._rows[group][index]))
        if not self.dropout * share:
            return example
        seed = int(np.random.PCG64([self._seed, position]).random_raw()) >> 1
        return self.builder.reencode(example, self.dropout * share, seed, self._longest)

    def read(self, row: int) -> TokenSequence:
        """A record by its place among all that were prepared."""
        shard = int(np.searchsorted(self._ends, row, side="right"))
        return self.shards[shard].example(row - int(self._ends[shard]) + self.shards[shard].batch.num_rows)
