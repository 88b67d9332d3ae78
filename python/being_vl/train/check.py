"""`being-vl check`: what a training will see, shown before it starts."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby, islice

import numpy as np

from being_vl.data.prepare import describe_faults
from being_vl.data.sequences import DROPPED, SequenceBuilder, TokenSequence
from being_vl.data.store import PreparedSequences
from being_vl.errors import RecordError
from being_vl.train.engine import load_sequences
from being_vl.train.options import CheckOptions
from being_vl.train.schedule import plan

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def check(options: CheckOptions, say: Callable[[str], None]) -> None:
    """Prepare the sequences as the training does; show records, counts, stages and faults. No GPU is used.

    Args:
        options: Of the training and the check. What is prepared in `out` is there for the training.
        say: Takes the report, a paragraph at a time.

    Raises:
        RecordError: if the share of bad records is above the tolerated one; after the report.
        ConfigError, QuantizerError, ModelError, ManifestError: as training does.
    """
    sequences = load_sequences(replace(options, lenient=True))
    manifest, builder = sequences.manifest, sequences.builder
    counts = _count(sequences)
    for category in counts:
        groups = [group for group in sequences.lengths if group.category == category]
        found = (
            sequences.get(group, n, 0, share=0)  # as its image is drawn, without BPE-dropout
            for group in groups
            for n in range(len(sequences.lengths[group]))
        )
        for example in islice(found, options.show):
            say(f"{category}: {_shown(builder, example)}\n")
    say("\n".join(_table(counts)) + "\n")
    say("\n".join(_stages(options, sequences)))
    if faults := list(describe_faults(sequences.folder)):
        say("\n".join(["", *faults]))
    bad = manifest["records"] - manifest["sequences"] - manifest["faults"].get(DROPPED, 0)
    share = bad / manifest["records"]
    if share > options.tolerated:
        raise RecordError(
            f"{bad} bad records, {share:.2%} of all, are more than the tolerated {options.tolerated:.2%}; mend them, "
            "or set tolerated, and lenient in training"
        )


def _shown(builder: SequenceBuilder, example: TokenSequence) -> str:
    """The sequence as text, trained positions in ⟦ ⟧ and images by their keys; below it the images' regions."""
    text, trained = "", example.weights > 0
    keys = np.zeros(len(example.ids), np.int32)
    for number, image in enumerate(example.images, 1):
        keys[image.start - 1 : image.stop + 1] = number  # BOI and EOI are shown with it
    for (number, learned), run in groupby(
        zip(example.ids.tolist(), keys.tolist(), trained.tolist(), strict=True), lambda token: token[1:]
    ):
        ids = [token for token, *_ in run]
        part = f"[image {example.images[number - 1].key}]" if number else builder.tokenizer.decode(ids)
        text += f"⟦{part}⟧" if learned else part
    head = f"{example.where}: {len(example.ids)} tokens, {trained.sum()} trained"
    return "\n".join([head, text, *(_drawn(builder, image.key) for image in example.images)])


def _drawn(builder: SequenceBuilder, key: str) -> str:
    """An image's cells: a letter for each region of several, a dot for an id on its own."""
    if builder.grids is None or builder.bpe is None:
        return f"[image {key}]: its grid is gone"
    grid = builder.grids[key]
    tokens, regions = builder.bpe.encode(grid, return_regions=True)
    merged = np.bincount(np.asarray(regions).ravel(), minlength=len(tokens)) > 1
    number = np.cumsum(merged) - 1
    signs = np.where(merged, np.array(list(LETTERS))[number % len(LETTERS)], "·")
    rows = ("".join(row) for row in signs[np.asarray(regions)])
    return "\n".join([f"[image {key}]: {grid.size} ids, {len(tokens)} tokens", *rows])


@dataclass
class _Count:
    """Of a category: its records, their tokens, those that are trained, the ids that BPE saved, the longest record."""

    records: int = 0
    tokens: int = 0
    trained: int = 0
    saved: int = 0
    longest: int = 0


def _count(sequences: PreparedSequences) -> dict[str, _Count]:
    counts: dict[str, _Count] = defaultdict(_Count)
    for shard in sequences.shards:
        column = shard.batch.column("category")
        lengths, trained, saved = shard.lengths(), shard.label_tokens(), shard.savings()
        for number, category in enumerate(column.dictionary.to_pylist()):
            rows = column.indices.to_numpy() == number
            count = counts[category]
            count.records += int(rows.sum())
            count.tokens += int(lengths[rows].sum(dtype=np.int64))
            count.trained += int(trained[rows].sum(dtype=np.int64))
            count.saved += int(saved[rows].sum())
            count.longest = max(count.longest, int(lengths[rows].max()))
    return {category: counts[category] for category in sequences.categories if category in counts}


def _table(counts: dict[str, _Count]) -> Iterator[str]:
    """Records, tokens and lengths of each category; lengths before BPE count an image's ids in place of its tokens."""
    total = sum(count.records for count in counts.values())
    columns = {
        "records": 10,
        "share": 8,
        "trained": 12,
        "masked": 14,
        "before BPE": 12,
        "after": 8,
        "longest": 9,
    }
    yield " " * 12 + "".join(f"{column:>{width}}" for column, width in columns.items())
    for name, count in counts.items():
        yield (
            f"{name:<12}{count.records:>10,}{count.records / total:>8.1%}{count.trained:>12,}"
            f"{count.tokens - count.trained:>14,}{(count.tokens + count.saved) / count.records:>12,.1f}"
            f"{count.tokens / count.records:>8,.1f}{count.longest:>9,}"
        )


def _stages(options: CheckOptions, sequences: PreparedSequences) -> Iterator[str]:
    """A table of what each stage is expected to take, and its mixture."""
    plans = plan(options, sequences.lengths, options.ranks)
    yield f"{'':<12}{'steps':>10}{'rows':>12}{'records':>12}{'tokens':>16}{'fill':>8}"
    for stage in plans:
        rows = stage.steps * stage.batch_size
        fill = f"{stage.tokens / rows / stage.packing:>8.1%}" if stage.packing else ""
        yield f"{stage.stage.name:<12}{stage.steps:>10,}{rows:>12,}{stage.records:>12,.0f}{stage.tokens:>16,.0f}{fill}"
    yield from (stage.describe() for stage in plans)
