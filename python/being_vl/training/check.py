"""`being-vl check`: what a training will see, shown before it starts."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby, islice

import numpy as np

from being_vl.data.prepare import describe_faults
from being_vl.data.sequences import DROPPED_RECORD, SequenceBuilder, TokenSequence
from being_vl.data.store import PreparedSequences
from being_vl.errors import RecordError
from being_vl.outputs import free_locks
from being_vl.progress import show_log_lines
from being_vl.training.engine import load_sequences
from being_vl.training.fingerprint import check_output
from being_vl.training.options import CheckOptions
from being_vl.training.schedule import find_gaps, make_schedules

LETTERS = "abcdefghijklmnopqrstuvwxyz"
"""What the regions of an image are drawn with."""


def check(options: CheckOptions) -> Iterator[str]:
    """Prepare the sequences as the training does; report records, counts, stages and faults. No GPU is used.

    Args:
        options: Of the training and the check. What is prepared in `out` is there for the training.

    Yields:
        The report, a paragraph at a time.

    Raises:
        RecordError: if the share of records with faults is above `tolerance`; after the report.
        ConfigError, QuantizerError, ModelError, ManifestError, FingerprintError, OutputError: as training does.
    """
    check_output(options)
    # Faults are counted at the end, so that the report comes first.
    with show_log_lines(), free_locks():
        sequences = load_sequences(replace(options, lenient=True))
    counts = _count_categories(sequences)
    for category in counts:
        for sequence in islice(_read_category(sequences, category), options.show):
            yield f"{category}: {_describe_sequence(sequences.builder, sequence)}\n"
    yield "\n".join(_describe_categories(counts)) + "\n"
    yield "\n".join(_describe_stages(options, sequences))
    if faults := list(describe_faults(sequences.folder)):
        yield "\n".join(["", *faults])
    _check_share(sequences, options.tolerance)


def _check_share(sequences: PreparedSequences, tolerance: float) -> None:
    """Raise a `RecordError` if a larger share of the records has faults; records that were dropped have none."""
    manifest = sequences.manifest
    count = manifest["records"] - manifest["sequences"] - manifest["faults"].get(DROPPED_RECORD, 0)
    share = count / manifest["records"]
    if share > tolerance:
        raise RecordError(
            f"{count} records with faults, {share:.2%} of all, are more than the tolerance of {tolerance:.2%}; mend "
            "them, or set tolerance, and lenient in training"
        )


def _read_category(sequences: PreparedSequences, category: str) -> Iterator[TokenSequence]:
    """The sequences of a category without BPE-dropout, as their images are drawn."""
    for group, lengths in sequences.lengths.items():
        if group.category == category:
            yield from (sequences.get(group, number, 0, share=0) for number in range(len(lengths)))


def _describe_sequence(builder: SequenceBuilder, sequence: TokenSequence) -> str:
    """The sequence as text, label tokens in ⟦ ⟧ and images by their keys; below it the images' regions."""
    has_loss = sequence.weights > 0
    # For each token the number of the image that it belongs to, BOI and EOI among them; 0 is text.
    images = np.zeros(len(sequence.ids), np.int32)
    for number, image in enumerate(sequence.images, 1):
        images[image.start - 1 : image.stop + 1] = number
    # Tokens of one image, or of text, that all have loss or all have none, are written together.
    text = ""
    tokens = zip(sequence.ids.tolist(), images.tolist(), has_loss.tolist(), strict=True)
    for (number, is_label), run in groupby(tokens, lambda token: token[1:]):
        ids = [token for token, *_ in run]
        part = f"[image {sequence.images[number - 1].key}]" if number else builder.tokenizer.decode(ids)
        text += f"⟦{part}⟧" if is_label else part
    head = f"{sequence.location}: {len(sequence.ids)} tokens, {has_loss.sum()} with loss"
    return "\n".join([head, text, *(_draw_image(builder, image.key) for image in sequence.images)])


def _draw_image(builder: SequenceBuilder, key: str) -> str:
    """An image's cells: a letter for each region of several, a dot for a cell on its own."""
    if builder.grids is None or builder.bpe is None:
        return f"[image {key}]: its grid is gone"
    grid = builder.grids[key]
    tokens, regions = builder.bpe.encode(grid, return_regions=True)
    # Regions of several cells take the letters in turn.
    has_merges = np.bincount(np.asarray(regions).ravel(), minlength=len(tokens)) > 1
    number = np.cumsum(has_merges) - 1
    signs = np.where(has_merges, np.array(list(LETTERS))[number % len(LETTERS)], "·")
    rows = ("".join(row) for row in signs[np.asarray(regions)])
    return "\n".join([f"[image {key}]: {grid.size} cells, {len(tokens)} tokens", *rows])


@dataclass
class _CategoryCounts:
    """Of a category: its records, their tokens, label tokens, cells that merges saved, the longest record's tokens."""

    records: int = 0
    tokens: int = 0
    label_tokens: int = 0
    savings: int = 0
    max_length: int = 0


def _count_categories(sequences: PreparedSequences) -> dict[str, _CategoryCounts]:
    counts: dict[str, _CategoryCounts] = defaultdict(_CategoryCounts)
    for shard in sequences.shards:
        column = shard.batch.column("category")
        lengths, label_tokens, savings = shard.lengths(), shard.label_tokens(), shard.savings()
        for number, category in enumerate(column.dictionary.to_pylist()):
            rows = column.indices.to_numpy() == number
            count = counts[category]
            count.records += int(rows.sum())
            count.tokens += int(lengths[rows].sum(dtype=np.int64))
            count.label_tokens += int(label_tokens[rows].sum(dtype=np.int64))
            count.savings += int(savings[rows].sum())
            count.max_length = max(count.max_length, int(lengths[rows].max()))
    return {category: counts[category] for category in sequences.categories if category in counts}


def _describe_categories(counts: dict[str, _CategoryCounts]) -> Iterator[str]:
    """A table of the categories; lengths before BPE count the cells of an image in place of its tokens."""
    total = sum(count.records for count in counts.values())
    columns = {
        "records": 10,
        "share": 8,
        "with loss": 12,
        "without loss": 14,
        "before BPE": 12,
        "after": 8,
        "longest": 9,
    }
    yield " " * 12 + "".join(f"{column:>{width}}" for column, width in columns.items())
    for name, count in counts.items():
        yield (
            f"{name:<12}{count.records:>10,}{count.records / total:>8.1%}{count.label_tokens:>12,}"
            f"{count.tokens - count.label_tokens:>14,}{(count.tokens + count.savings) / count.records:>12,.1f}"
            f"{count.tokens / count.records:>8,.1f}{count.max_length:>9,}"
        )


def _describe_stages(options: CheckOptions, sequences: PreparedSequences) -> Iterator[str]:
    """A table of what each stage is expected to take, and its mixture."""
    schedules = make_schedules(options, sequences.lengths, options.ranks)
    yield f"{'':<12}{'steps':>10}{'rows':>12}{'records':>12}{'tokens':>16}{'fill':>8}"
    for schedule in schedules:
        rows = schedule.steps * schedule.batch_size
        fill = f"{schedule.tokens / rows / schedule.packing:>8.1%}" if schedule.packing else ""
        yield (
            f"{schedule.stage.name:<12}{schedule.steps:>10,}{rows:>12,}{schedule.records:>12,.0f}"
            f"{schedule.tokens:>16,.0f}{fill}"
        )
    yield from (schedule.describe() for schedule in schedules)
    yield from (f"warning: {line}" for line in find_gaps(schedules))
