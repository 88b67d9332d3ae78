"""`being-vl check`: what a training will see, shown before it starts."""

from collections.abc import Callable, Iterator
from itertools import groupby

import numpy as np

from being_vl.data.sequences import Example, SequenceBuilder
from being_vl.errors import RecordError
from being_vl.train.engine import load_examples, plan
from being_vl.train.options import CheckOptions

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def check(options: CheckOptions, say: Callable[[str], None]) -> None:
    """Build all sequences as the training does; show records, counts, stages and faults. No GPU is used.

    Args:
        options: Of the training and the check. Nothing is written to `out`.
        say: Takes the report, a paragraph at a time.

    Raises:
        RecordError: if the share of faults is above the tolerated one; after the report.
        ConfigError, QuantizerError, ModelError: as training does.
    """
    faults: list[str] = []
    examples, builder = load_examples(options, faults)
    categories: dict[str, list[Example]] = {}
    for example in examples:
        categories.setdefault(example.category, []).append(example)
    for category, found in categories.items():
        for example in found[: options.show]:
            say(f"{category}: {_shown(builder, example)}\n")
    say("\n".join(_counts(builder, categories)) + "\n")
    say("\n".join(_stages(options, categories)))
    if faults:
        say("\n".join([f"\n{len(faults)} faults:", *(f"  {fault}" for fault in faults)]))
    share = len(faults) / (len(faults) + len(examples) + len(builder.dropped))
    if share > options.tolerated:
        raise RecordError(
            f"{len(faults)} faults, {share:.2%} of the records, are more than the tolerated {options.tolerated:.2%}; "
            "mend them, or set tolerated, and lenient in training"
        )


def _shown(builder: SequenceBuilder, example: Example) -> str:
    """The sequence as text, trained positions in ⟦ ⟧ and images by their keys; below it the images' regions."""
    ids, trained = example.ids, example.weights > 0
    images = iter(span.key for span in example.images)
    text = ""
    first_visual = builder.layout.text_size if builder.layout else np.inf
    for (visual, learned), run in groupby(
        zip(ids.tolist(), trained.tolist(), strict=True), lambda pair: (pair[0] >= first_visual, pair[1])
    ):
        tokens = [token for token, _ in run]
        if visual:  # images that follow one another are one run
            count = tokens.count(builder.layout.boi) if builder.layout else 0
            text += "".join(f"[image {next(images)}]" for _ in range(count))
        else:
            decoded = builder.tokenizer.decode(tokens)
            text += f"⟦{decoded}⟧" if learned else decoded
    head = f"{example.where}: {len(ids)} tokens, {trained.sum()} trained"
    return "\n".join([head, text, *(_drawn(builder, key) for key, *_ in example.images)])


def _drawn(builder: SequenceBuilder, key: str) -> str:
    """An image's cells: a letter for each region of several, a dot for an id on its own."""
    assert builder.grids is not None and builder.bpe is not None  # noqa: PT018
    grid = builder.grids[key]
    tokens, regions = builder.bpe.encode(grid, return_regions=True)
    merged = np.bincount(np.asarray(regions).ravel(), minlength=len(tokens)) > 1
    number = np.cumsum(merged) - 1
    signs = np.where(merged, np.array(list(LETTERS))[number % len(LETTERS)], "·")
    rows = ("".join(row) for row in signs[np.asarray(regions)])
    return "\n".join([f"[image {key}]: {grid.size} ids, {len(tokens)} tokens", *rows])


def _counts(builder: SequenceBuilder, categories: dict[str, list[Example]]) -> Iterator[str]:
    """A table of records, tokens and lengths; lengths before BPE count an image's ids in place of its tokens."""
    total = sum(map(len, categories.values()))
    layout, grids = builder.layout, builder.grids
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
    for name, found in categories.items():
        lengths = np.array([len(example.ids) for example in found])
        trained = sum(int((example.weights > 0).sum()) for example in found)
        saved = 0
        if layout and grids is not None:
            saved = sum(grids[key].size for example in found for key, *_ in example.images)
            saved -= sum(int((example.ids >= layout.first_visual).sum()) for example in found)
        yield (
            f"{name:<12}{len(found):>10,}{len(found) / total:>8.1%}{trained:>12,}{lengths.sum() - trained:>14,}"
            f"{(lengths.sum() + saved) / len(found):>12,.1f}{lengths.mean():>8,.1f}{lengths.max():>9,}"
        )


def _stages(options: CheckOptions, categories: dict[str, list[Example]]) -> Iterator[str]:
    """A table of what each stage is expected to take."""
    lengths = {name: float(np.mean([len(e.ids) for e in found])) for name, found in categories.items()}
    counts = {name: len(found) for name, found in categories.items()}
    yield f"{'':<12}{'steps':>10}{'records':>12}{'tokens':>16}"
    for stage, curriculum, steps in plan(options, counts, options.ranks):
        records = steps * options.micro_batch_size * options.ranks * stage.accumulation
        tokens = sum(count * lengths[name] for name, count in curriculum.counts(records).items())
        yield f"{stage.name:<12}{steps:>10,}{records:>12,}{tokens:>16,.0f}"
