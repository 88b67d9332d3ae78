"""Sequences on disk, grouped as mixtures name them. Reading them needs numpy and pyarrow alone."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from being_vl.data.sequences import ImageSpan, RecordGroup, SequenceBuilder, TokenSequence
from being_vl.errors import ConfigError, FingerprintError, ManifestError
from being_vl.files import read_manifest
from being_vl.options import StrPath
from being_vl.shards.arrow import open_table
from being_vl.shards.checksums import read_entries, verify_shards

KIND = "sequences"
"""Kind of the manifest of a folder of sequences."""

_SAMPLE_SIZE = 256
"""Records with images, evenly spread, by which is measured how much longer BPE-dropout makes them."""


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
        """Tokens of each record, per group; with BPE-dropout the number to expect. Rows are planned with these."""

    def get(self, group: RecordGroup, index: int, position: int, share: float = 1.0) -> TokenSequence:
        """One record; also called in the processes of a data loader.

        Args:
            group: One of `lengths`.
            index: Of the record in its group, from 0.
            position: Of this reading in the training's stream of records; BPE-dropout is a function of it and the seed.
            share: Of the dropout's probability; 0 is without.
        """


def sequence_columns(sequences: Sequence[TokenSequence]) -> tuple[dict[str, pa.Array], dict[str, int]]:
    """The columns of a shard of sequences, and its numbers of sequences, tokens and label tokens.

    Weights are kept as runs of equal ones: where each run ends, and the weight in it.

    Raises:
        ConfigError: if the sequences are too many for one Arrow file.
    """
    # All weights together: a run ends where the next weight is another one, and with its sequence.
    lengths = np.array([len(sequence.weights) for sequence in sequences], np.int64)
    stops = lengths.cumsum()
    weights = np.concatenate([np.empty(0, np.float32), *(sequence.weights for sequence in sequences)])
    is_end = np.append(weights[1:] != weights[:-1], True)[: len(weights)]
    is_end[stops - 1] = True
    ends = np.flatnonzero(is_end)
    runs = np.diff(np.searchsorted(ends, stops), prepend=0)
    label_tokens = np.diff(np.append(0, np.cumsum(weights != 0))[stops], prepend=0)

    images = [sequence.images for sequence in sequences]
    spans = [image for images_of_sequence in images for image in images_of_sequence]
    num_images = [len(images_of_sequence) for images_of_sequence in images]
    columns = {
        "ids": _lists(np.concatenate([np.empty(0, np.int32), *(s.ids for s in sequences)]), lengths),
        "weight_ends": _lists((ends + 1 - np.repeat(stops - lengths, runs)).astype(np.int32), runs),
        "weights": _lists(weights[ends], runs),
        "label_tokens": pa.array(label_tokens, pa.int32()),
        "category": pa.array([s.category for s in sequences], pa.string()).dictionary_encode(),
        "source": pa.array([s.source for s in sequences], pa.string()).dictionary_encode(),
        "where": pa.array([s.location for s in sequences], pa.string()),
        "image_keys": pa.array([[image.key for image in spans] for spans in images], pa.list_(pa.string())),
    }
    for name in ("start", "stop", "cells"):
        values = np.array([getattr(span, name) for span in spans], np.int32)
        columns[f"image_{name}"] = _lists(values, num_images)
    counts = {
        "sequences": len(sequences),
        "tokens": int(lengths.sum()),
        "label_tokens": int(label_tokens.sum()),
    }
    return columns, counts


def _lists(values: NDArray[Any], lengths: ArrayLike) -> pa.ListArray:
    """Values as lists of these lengths, one after the other."""
    offsets = np.append(0, np.cumsum(lengths, dtype=np.int64))
    if offsets[-1] > np.iinfo(np.int32).max:
        raise ConfigError(f"an Arrow file of {offsets[-1]} tokens is too large; choose a smaller shard_size")
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))


class _ListColumn(NamedTuple):
    """A column of lists, without a copy."""

    values: NDArray[Any]
    offsets: NDArray[np.int32]

    def __getitem__(self, row: int) -> NDArray[Any]:  # type: ignore[override]
        return self.values[self.offsets[row] : self.offsets[row + 1]]


class SequenceShard:
    """One Arrow file of sequences, mapped into memory.

    Args:
        path: The file.
        num_rows: How many sequences the manifest says it has.

    Raises:
        ManifestError: if it is missing, damaged, or has another number of them.
    """

    def __init__(self, path: Path, num_rows: int) -> None:
        list_columns = ("ids", "weight_ends", "weights", "image_start", "image_stop", "image_cells")
        other_columns = ("label_tokens", "category", "source", "where", "image_keys")
        self.batch, _ = open_table(path, KIND, [*list_columns, *other_columns])
        if self.batch.num_rows != num_rows:
            raise ManifestError(
                f"{path}: holds {self.batch.num_rows} sequences, the manifest says {num_rows}; prepare again"
            )
        self.ids, self.weight_ends, self.weights, self.starts, self.stops, self.cells = (
            _ListColumn(column.values.to_numpy(), column.offsets.to_numpy())
            for column in map(self.batch.column, list_columns)
        )

    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each row."""
        return np.diff(self.ids.offsets)

    def label_tokens(self) -> NDArray[np.int32]:
        """Label tokens of each row."""
        counts: NDArray[np.int32] = self.batch.column("label_tokens").to_numpy()
        return counts

    def savings(self) -> NDArray[np.int64]:
        """Per row, the cells of its images less their tokens: what merges save."""
        sums = np.cumsum(self.cells.values - (self.stops.values - self.starts.values), dtype=np.int64)
        return np.diff(np.append(0, sums)[self.cells.offsets])

    def groups(self, numbers: dict[RecordGroup, int]) -> NDArray[np.uint16]:
        """The number of each row's group; `numbers` has those of groups so far, and takes new ones."""
        # A row's group as one number: its category, its source, and whether it is text alone.
        category, source = self.batch.column("category"), self.batch.column("source")
        text_only = np.diff(self.starts.offsets) == 0
        shape = len(category.dictionary), len(source.dictionary), 2
        codes = np.ravel_multi_index(
            (category.indices.to_numpy(), source.indices.to_numpy(), text_only.astype(np.intp)), shape
        )
        # Each distinct code becomes a group, and that its number.
        distinct_codes, code_of_row = np.unique(codes, return_inverse=True)
        groups = (
            RecordGroup(category.dictionary[int(c)].as_py(), source.dictionary[int(s)].as_py(), bool(t))
            for c, s, t in zip(*np.unravel_index(distinct_codes, shape), strict=True)
        )
        number_of_code = np.array([numbers.setdefault(group, len(numbers)) for group in groups], np.uint16)
        return number_of_code[code_of_row]

    def sequence(self, row: int) -> TokenSequence:
        """One row."""
        keys = self.batch.column("image_keys")[row].as_py()
        spans = zip(
            keys,
            *(column[row].tolist() for column in (self.starts, self.stops, self.cells)),
            strict=True,
        )
        category, source, location = (
            self.batch.column(name)[row].as_py() for name in ("category", "source", "where")
        )
        weights = np.repeat(self.weights[row], np.diff(self.weight_ends[row], prepend=0))
        images = tuple(ImageSpan(*span) for span in spans)
        return TokenSequence(self.ids[row], weights, category, source, location, images)


def verify_sequences(folder: StrPath, rank: int = 0, world_size: int = 1) -> None:
    """Make sure that a folder's files are those that `being-vl prepare` wrote, before they are used.

    Args:
        folder: What `being-vl prepare` wrote.
        rank, world_size: Ranks that do that together; see `verify_shards`.

    Raises:
        ManifestError: if the folder is missing, unfinished or damaged, or a file has other bytes than when it was
            written.
    """
    verify_shards(read_entries(folder, read_manifest(folder, KIND), KIND), "prepare", rank, world_size)


class PreparedSequences:
    """`Sequences` that `being-vl prepare` wrote; in memory are eight bytes a record.

    Args:
        folder: What `being-vl prepare` wrote.
        builder: What BPE-dropout encodes images with.
        dropout: Probability with which it skips a merge. Where a sequence would become too long by it, there is none.
        seed: Its seed.
        max_length: Tokens beyond which a sequence is too long, if less than those that it was prepared for.
        verify: Compare the files with their checksums; False where `verify_sequences` has done that.

    Attributes:
        folder: The folder.
        manifest: Its manifest.
        shards: Its files.
        pad_id, categories: See `Sequences`.

    Raises:
        ManifestError: if the folder is missing, unfinished or damaged, or a file has other bytes than when it was
            written.
        FingerprintError: if it was made for another model.
        ConfigError: if there is to be dropout, but no grids.
    """

    def __init__(
        self,
        folder: StrPath,
        builder: SequenceBuilder,
        dropout: float = 0.0,
        seed: int = 0,
        max_length: int | None = None,
        verify: bool = True,
    ) -> None:
        if verify:
            verify_sequences(folder)
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder, KIND)
        fingerprint, model = self.manifest["fingerprint"], builder.fingerprint_fields()
        differences = [
            name for name in ("tokenizer", "text_size", "vocabulary") if fingerprint[name] != model[name]
        ]
        if differences:
            raise FingerprintError(
                f"{folder}: made for another model ({', '.join(differences)} differ); prepare the records for this one"
            )
        self.pad_id = builder.pad_id
        self.categories: Sequence[str] = fingerprint["categories"]
        self.dropout = dropout
        self.builder = builder
        self._max_length = min(fingerprint["max_length"], max_length or math.inf)
        self._seed = seed
        if dropout and (builder.grids is None or builder.bpe is None):
            raise ConfigError(
                "dropout needs an expanded model, and the grids that the sequences were made from"
            )
        self.shards = [
            SequenceShard(entry.path, entry.num_rows)
            for entry in read_entries(self.folder, self.manifest, KIND)
        ]
        self._ends = np.cumsum([shard.batch.num_rows for shard in self.shards])
        self._rows, self.lengths = self._sort_into_groups()

    def _sort_into_groups(
        self,
    ) -> tuple[dict[RecordGroup, NDArray[np.int32]], dict[RecordGroup, NDArray[np.int32]]]:
        """The rows of each group, numbered through all shards, and their lengths; groups are sorted by name."""
        # Number the groups in the order of their names.
        numbers: dict[RecordGroup, int] = {}
        group_of_row = np.concatenate([shard.groups(numbers) for shard in self.shards])
        names = sorted(numbers)
        order = np.array([names.index(name) for name in numbers], np.uint16)[group_of_row]
        # Sort the rows by group, and cut them where one ends.
        rows = np.argsort(order, kind="stable").astype(np.int32)
        lengths = np.concatenate([shard.lengths() for shard in self.shards])
        if self.dropout:
            lengths = self._expected_lengths(lengths)
        ends = np.cumsum(np.bincount(order, minlength=len(names))).tolist()
        slices = dict(zip(names, map(slice, [0, *ends], ends), strict=False))
        return (
            {group: rows[part] for group, part in slices.items()},
            {group: lengths[rows[part]] for group, part in slices.items()},
        )

    def _expected_lengths(self, lengths: NDArray[np.int32]) -> NDArray[np.int32]:
        """The lengths to expect with BPE-dropout, which undoes a share of what merges save."""
        # Measure that share on some rows.
        savings = np.concatenate([shard.savings() for shard in self.shards])
        sample = np.flatnonzero(savings)
        sample = sample[:: max(1, len(sample) // _SAMPLE_SIZE)].tolist()
        growth = 0
        for row in sample:
            sequence = self.read(row)
            growth += len(self.builder.reencode(sequence, self.dropout, row).ids) - len(sequence.ids)
        share = max(0.0, growth / max(1, savings[sample].sum()))
        # Where a sequence would become too long, there is no dropout.
        lengths_with_dropout = lengths + np.round(savings * share).astype(np.int32)
        return np.where(lengths_with_dropout > self._max_length, lengths, lengths_with_dropout)

    def get(self, group: RecordGroup, index: int, position: int, share: float = 1.0) -> TokenSequence:
        """See `Sequences`."""
        sequence = self.read(int(self._rows[group][index]))
        if not self.dropout * share:
            return sequence
        seed = int(np.random.PCG64([self._seed, position]).random_raw()) >> 1
        return self.builder.reencode(sequence, self.dropout * share, seed, self._max_length)

    def read(self, row: int) -> TokenSequence:
        """A sequence by its place among all that were prepared."""
        shard = int(np.searchsorted(self._ends, row, side="right"))
        return self.shards[shard].sequence(row - int(self._ends[shard]) + self.shards[shard].batch.num_rows)
