"""Rows of records as batches of tensors, and the loader that each rank reads its own from."""

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from being_vl.data.curriculum import Entry
from being_vl.data.sequences import NO_LOSS, TokenSequence
from being_vl.data.store import Sequences

Row = list[Entry]


def collate(
    rows: Sequence[Sequence[TokenSequence]], pad_id: int, names: Sequence[str], is_flat: bool = False
) -> dict[str, torch.Tensor]:
    """Rows of whole records, one after the other, padded on the right.

    Positions restart with each record, which is how transformers knows that a record must not see those before it.
    Padding stands behind a row's last record, where a causal model never sees it; so there is no attention mask. The
    first token of a record has no loss: what stands before it does not predict it.

    Args:
        rows: The records of each row.
        pad_id: Id that fills up the rows.
        names: Names of the categories.
        is_flat: Join all rows to one without padding, which FlashAttention reads by the positions alone.

    Returns:
        `input_ids`, `position_ids`, `labels` (-100 where there is no loss) and `categories` (each token's place in
        `names`), int64, and `weights` of the labels, float32; each a tensor of shape (len(rows), tokens of the longest
        row).
    """
    if is_flat:
        rows = [[sequence for row in rows for sequence in row]]
    shape = len(rows), max(sum(len(sequence.ids) for sequence in row) for row in rows)
    ids = np.full(shape, pad_id, np.int64)
    positions = np.zeros(shape, np.int64)
    labels = np.full(shape, NO_LOSS, np.int64)
    weights = np.zeros(shape, np.float32)
    categories = np.zeros(shape, np.int64)
    for number, row in enumerate(rows):
        start = 0
        for sequence in row:
            stop = start + len(sequence.ids)
            ids[number, start:stop] = sequence.ids
            labels[number, start + 1 : stop] = sequence.labels[1:]
            weights[number, start + 1 : stop] = sequence.weights[1:]
            # What follows the last record of a row counts on, up to its end.
            positions[number, start:] = np.arange(shape[1] - start)
            categories[number, start:] = names.index(sequence.category)
            start = stop
    batch = {"input_ids": ids, "position_ids": positions, "labels": labels, "weights": weights}
    batch["categories"] = categories
    return {name: torch.from_numpy(array) for name, array in batch.items()}


class _BatchDataset(Dataset[dict[str, torch.Tensor]]):
    """Reads the records of rows; in a process of its own, if the loader has workers."""

    def __init__(self, sequences: Sequences, is_flat: bool, packing: int | None) -> None:
        self.sequences, self.is_flat, self.packing = sequences, is_flat, packing

    def __getitem__(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        row_sequences = [self._read(row) for row in rows]
        batch = collate(row_sequences, self.sequences.pad_id, self.sequences.categories, self.is_flat)
        tokens = sum(len(sequence.ids) for row in row_sequences for sequence in row)
        return batch | {"tokens": torch.tensor(tokens)}

    def _read(self, row: Row) -> list[TokenSequence]:
        """A row's sequences, with less BPE-dropout where they would have too many tokens."""
        for sixteenths in range(16, -1, -1):
            share = sixteenths / 16
            sequences = [
                self.sequences.get(entry.group, entry.number, entry.position, share) for entry in row
            ]
            if not self.packing or sum(len(sequence.ids) for sequence in sequences) <= self.packing:
                break
        return sequences


def load_batches(
    steps: Iterator[list[Row]],
    sequences: Sequences,
    micro_batches: int,
    rank: int = 0,
    ranks: int = 1,
    workers: int = 0,
    is_flat: bool = False,
    packing: int | None = None,
) -> Iterator[tuple[list[Row], list[dict[str, torch.Tensor]]]]:
    """The rows of each step, those of all ranks, and the micro-batches of this rank.

    A step's rows are sorted by length, so that those of a micro-batch have little padding, and cut into parts of equal
    size, the first for the first micro-batch of rank 0, the second for that of rank 1, and so on.

    Args:
        steps: The rows of each step, at least `micro_batches` × `ranks`.
        sequences: The records.
        micro_batches: Micro-batches of each rank and step.
        rank: This rank's number.
        ranks: Number of ranks.
        workers: Processes that read ahead; 0 reads in this one, when asked for.
        is_flat: As for `collate`.
        packing: Tokens that a row has at most, whatever BPE-dropout makes of its records.

    Yields:
        The step's rows, and batches as `collate` makes them, with the number of their tokens, without padding, as
        `tokens`.
    """
    queue: deque[list[Row]] = deque()

    def rows_of_this_rank() -> Iterator[list[Row]]:
        for rows in steps:
            queue.append(rows)
            rows = sorted(rows, key=lambda row: sum(entry.length for entry in row))
            parts = micro_batches * ranks
            for part in range(rank, parts, ranks):
                yield rows[len(rows) * part // parts : len(rows) * (part + 1) // parts]

    loader = DataLoader(
        _BatchDataset(sequences, is_flat, packing),
        batch_size=None,
        sampler=rows_of_this_rank(),
        num_workers=workers,
        # Forked, workers share the sequences; they touch no GPU.
        multiprocessing_context="fork" if workers else None,
        pin_memory=torch.cuda.is_available(),
    )
    batches = iter(loader)
    for batch in batches:
        yield queue.popleft(), [batch, *(next(batches) for _ in range(micro_batches - 1))]
