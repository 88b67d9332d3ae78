"""What a vocabulary does to the grids it was learned from, and to grids held out; statistics of its merges."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from being_vl.files import to_jsonable
from being_vl.tokenizer.corpus import Corpus, split_block
from being_vl.tokenizer.options import VocabularyOptions
from being_vl.tokenizer.visual_bpe import VisualBPE

MIN_GAIN = 0.01
"""Merges are worthwhile as long as a tenth more of them shorten held-out sequences by at least this share."""

QUANTILES = {"min": 0.0, "5 %": 0.05, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "95 %": 0.95, "max": 1.0}
MAX_CELLS = 2**63 - 1


@dataclass
class EncodingStats:
    """Length of some grids before and after encoding.

    Args:
        grids: Number of grids.
        cells: Length before, in cells.
        tokens: Length after, in tokens.
        token_counts: (vocab_size,), how often each token of the vocabulary occurs; empty if unknown.
    """

    grids: int
    cells: int
    tokens: int
    token_counts: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))


def measure_encoding(bpe: VisualBPE, corpus: Corpus, num_threads: int | None = None) -> EncodingStats:
    """Encode all grids, a block at a time, and count."""
    grids = cells = 0
    token_counts = np.zeros(bpe.vocab_size, np.int64)
    for ids, heights, widths in corpus:
        batch = bpe.encode_batch(split_block((ids, heights, widths)), num_threads)
        token_counts += np.bincount(batch.values, minlength=bpe.vocab_size)
        grids += len(batch)
        cells += ids.size
    return EncodingStats(grids, cells, int(token_counts.sum()), token_counts)


def merge_counts(bpe: VisualBPE, token_counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often each merge was applied, given how often each token occurs in the result.

    A token in the result stands for one application of its merge, and so does each merged token that it consists of.
    The first m merges are a vocabulary themselves, so the sum of the first m counts is what that one saves.

    Args:
        bpe: The vocabulary.
        token_counts: (vocab_size,), occurrences of each token.

    Returns:
        (num_merges,).
    """
    counts = token_counts.tolist()
    # From the last merge to the first, so that a token's count is complete before its parts are counted.
    for token, (a, b, *_) in reversed(list(enumerate(bpe.merges, bpe.base_vocab_size))):
        counts[a] += counts[token]
        counts[b] += counts[token]
    return np.array(counts[bpe.base_vocab_size :], np.int64)


def last_worthwhile_merge_count(lengths: NDArray[np.int64]) -> int:
    """The number of merges after which a tenth more of them never again saves the share `MIN_GAIN`.

    Args:
        lengths: Length in tokens after 0, 1, 2, … merges.
    """
    merges = np.arange(1, len(lengths))
    gains = 1 - lengths[merges] / lengths[merges * 10 // 11]
    worthwhile_counts = merges[gains >= MIN_GAIN]
    return int(worthwhile_counts[-1]) if len(worthwhile_counts) else 0


def cells_per_token(bpe: VisualBPE) -> list[int]:
    """How many cells each merged token covers, at most 2**63 - 1."""
    sizes = [1] * bpe.base_vocab_size
    for a, b, *_ in bpe.merges:
        sizes.append(min(sizes[a] + sizes[b], MAX_CELLS))
    return sizes[bpe.base_vocab_size :]


def merge_statistics(bpe: VisualBPE) -> dict[str, Any]:
    """Of what kind the merges are, and quantiles of N, S, and the number of cells."""
    kinds = np.zeros(3, int)
    for a, b, *_ in bpe.merges:
        kinds[(a >= bpe.base_vocab_size) + (b >= bpe.base_vocab_size)] += 1
    infos = bpe.merge_infos
    names = ("base + base", "base + merged", "merged + merged")
    return {
        "merges": dict(zip(names, kinds.tolist(), strict=True)),
        "cells": quantiles(cells_per_token(bpe)),
        "n": quantiles([info.n for info in infos]),
        "n_offset": quantiles([info.n_offset for info in infos]),
        "s": quantiles([info.s for info in infos]),
    }


def quantiles(values: ArrayLike) -> dict[str, Any]:
    """Some quantiles of numbers, each one of them; empty if there are none."""
    array = np.asarray(values)
    if not array.size:
        return {}
    numbers = np.quantile(array, list(QUANTILES.values()), method="inverted_cdf").tolist()
    return dict(zip(QUANTILES, numbers, strict=True))


def build_report(
    bpe: VisualBPE,
    options: VocabularyOptions,
    training: EncodingStats,
    held_out: EncodingStats | None,
    seconds: float,
) -> dict[str, Any]:
    """The report on a vocabulary just learned, in plain JSON types.

    Args:
        bpe: The vocabulary.
        options: Of its training.
        training: Lengths of the grids it was learned from.
        held_out: Lengths and token counts of the grids held out; None without any.
        seconds: Time that the training took.
    """
    return {
        "vocabulary": options.out.name,
        "options": to_jsonable(options),
        "seconds": round(seconds, 2),
        "num_merges": bpe.num_merges,
        "training": _summarize(training),
        "held_out": _summarize(held_out) | _report_on_held_out(bpe, held_out) if held_out else None,
        "statistics": merge_statistics(bpe),
    }


def _report_on_held_out(bpe: VisualBPE, held_out: EncodingStats) -> dict[str, Any]:
    """What is unused, the length by number of merges, and how many merges are worthwhile."""
    # The first m merges shorten the grids by the sum of the first m counts.
    counts = merge_counts(bpe, held_out.token_counts)
    lengths = held_out.cells - np.concatenate([[0], np.cumsum(counts)])
    # Points of the curve, about equally far apart on a logarithmic scale.
    points = np.unique(np.geomspace(1, max(1, bpe.num_merges), 16).astype(int))
    points = points[points <= bpe.num_merges]
    codebook_counts, merged_counts = np.split(held_out.token_counts, [bpe.base_vocab_size])
    return {
        "unused": {
            "codebook_ids": int((codebook_counts == 0).sum()),
            "merged_tokens": int((merged_counts == 0).sum()),
            "merges": int((counts == 0).sum()),
        },
        "curve": [{"merges": m, "tokens": int(lengths[m])} for m in (0, *points.tolist())],
        "last_worthwhile_merge_count": last_worthwhile_merge_count(lengths),
    }


def format_report(content: dict[str, Any]) -> str:
    """A report to be read on a terminal."""
    statistics, num_merges = content["statistics"], content["num_merges"]
    lines = [f"{content['vocabulary']}: {num_merges} merges in {content['seconds']:.1f} s"]
    for name in ("training", "held_out"):
        if part := content[name]:
            lines.append(
                f"  {name.replace('_', ' ')}: {part['grids']} grids, {part['tokens_per_grid']:.1f} tokens per grid "
                f"instead of {part['cells_per_grid']:.1f}: {part['ratio']:.1%} of the length"
            )
    lines.append("  " + ", ".join(f"{n} merges {kind}" for kind, n in statistics["merges"].items()))
    if num_merges:
        lines += [f"  {name}: {_format_quantiles(statistics[key])}" for key, name in NAMES.items()]
    if content["held_out"] is None:
        lines.append("  no grids held out (--held_out 0.05): no advice on the number of merges")
    elif num_merges:
        lines += _format_held_out(content["held_out"], num_merges)
    return "\n".join(lines)


def _format_held_out(held_out: dict[str, Any], num_merges: int) -> list[str]:
    """What is unused, the length by number of merges, and the advice that follows."""
    unused_counts, merge_count = held_out["unused"], held_out["last_worthwhile_merge_count"]
    lengths = [f"{p['merges']}: {p['tokens'] / held_out['cells']:.1%}" for p in held_out["curve"][-8:]]
    return [
        f"  not in the held-out part: {unused_counts['merged_tokens']} of {num_merges} merged tokens "
        f"({unused_counts['merges']} not even within a larger one), "
        f"{unused_counts['codebook_ids']} ids of the codebook",
        f"  held-out length by merges: {', '.join(lengths)}",
        f"  the last tenth of the merges still shortened held-out sequences by {MIN_GAIN:.0%}: more may be worthwhile"
        if merge_count == num_merges
        else f"  from {merge_count} merges on, a tenth more shortens held-out sequences by less than {MIN_GAIN:.0%}",
    ]


NAMES = {"cells": "cells per merged token", "n": "N", "s": "S"}


def _format_quantiles(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())


def _summarize(stats: EncodingStats) -> dict[str, Any]:
    return {
        "grids": stats.grids,
        "cells": stats.cells,
        "tokens": stats.tokens,
        "cells_per_grid": stats.cells / stats.grids,
        "tokens_per_grid": stats.tokens / stats.grids,
        "ratio": stats.tokens / stats.cells,
    }
