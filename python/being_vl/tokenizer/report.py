"""What a vocabulary does to the grids it was learned from, and to grids held out; statistics of its merges."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from being_vl.files import to_jsonable
from being_vl.tokenizer import VisualBPE
from being_vl.tokenizer.corpus import Corpus, grids_of
from being_vl.tokenizer.options import VocabOptions

WORTH = 0.01
"""More merges stop paying where a tenth more of them shorten held-out sequences by less than this share."""

QUANTILES = {"min": 0.0, "5 %": 0.05, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "95 %": 0.95, "max": 1.0}
MOST_CELLS = 2**63 - 1


@dataclass
class Encoded:
    """What became of some grids.

    Args:
        grids: How many there are.
        cells: Ids before.
        tokens: Tokens after.
        uses: Per token of the vocabulary, how often it is among them; empty if unknown.
    """

    grids: int
    cells: int
    tokens: int
    uses: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))


def encoded(bpe: VisualBPE, corpus: Corpus, num_threads: int | None = None) -> Encoded:
    """Encode all grids, a block at a time, and count."""
    grids = cells = 0
    uses = np.zeros(bpe.vocab_size, np.int64)
    for ids, heights, widths in corpus:
        batch = bpe.encode_batch(grids_of((ids, heights, widths)), num_threads)
        uses += np.bincount(batch.values, minlength=bpe.vocab_size)
        grids += len(batch)
        cells += ids.size
    return Encoded(grids, cells, int(uses.sum()), uses)


def merges_done(bpe: VisualBPE, uses: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often each merge was done to arrive at tokens that are used so often.

    A token in the result, and each merged token it was made of, stands for one merge. Since the first m merges are a
    vocabulary themselves, the sum of the first m counts is what that one saves.
    """
    made = uses.tolist()
    for i, (a, b, *_) in reversed(list(enumerate(bpe.merges, bpe.base_vocab_size))):
        made[a] += made[i]
        made[b] += made[i]
    return np.array(made[bpe.base_vocab_size :], np.int64)


def stops_paying(lengths: NDArray[np.int64]) -> int:
    """The number of merges after which a tenth more of them never again saves the share `WORTH`.

    Args:
        lengths: Length in tokens after 0, 1, 2, … merges.
    """
    merges = np.arange(1, len(lengths))
    saved = 1 - lengths[merges] / lengths[merges * 10 // 11]
    paying = merges[saved >= WORTH]
    return int(paying[-1]) if len(paying) else 0


def cells_per_token(bpe: VisualBPE) -> list[int]:
    """How many cells each merged token covers, at most 2**63 - 1."""
    sizes = [1] * bpe.base_vocab_size
    for a, b, *_ in bpe.merges:
        sizes.append(min(sizes[a] + sizes[b], MOST_CELLS))
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
    found = np.quantile(array, list(QUANTILES.values()), method="inverted_cdf").tolist()
    return dict(zip(QUANTILES, found, strict=True))


def report(
    bpe: VisualBPE, options: VocabOptions, training: Encoded, held_out: Encoded | None, seconds: float
) -> dict[str, Any]:
    """All there is to say on a vocabulary just learned, as JSON has it.

    Args:
        bpe: The vocabulary.
        options: How it was made.
        training: What became of the grids it was learned from.
        held_out: What became of the grids held out, with uses; None without any.
        seconds: How long it took.
    """
    content = {
        "vocabulary": options.out.name,
        "options": to_jsonable(options),
        "seconds": round(seconds, 2),
        "num_merges": bpe.num_merges,
        "training": _lengths(training),
        "held_out": None,
        "statistics": merge_statistics(bpe),
    }
    if held_out:
        done = merges_done(bpe, held_out.uses)
        lengths = held_out.cells - np.concatenate([[0], np.cumsum(done)])
        points = np.unique(np.geomspace(1, max(1, bpe.num_merges), 16).astype(int))
        points = points[points <= bpe.num_merges]
        merged = held_out.uses[bpe.base_vocab_size :]
        content["held_out"] = _lengths(held_out) | {
            "unused": {
                "base": int((held_out.uses[: bpe.base_vocab_size] == 0).sum()),
                "merged": int((merged == 0).sum()),
                "merges never done": int((done == 0).sum()),
            },
            "curve": [{"merges": m, "tokens": int(lengths[m])} for m in (0, *points.tolist())],
            "stops_paying": stops_paying(lengths),
        }
    return content


def text_of(content: dict[str, Any]) -> str:
    """A report to be read on a terminal."""
    statistics, held_out, learned = content["statistics"], content["held_out"], content["num_merges"]
    lines = [f"{content['vocabulary']}: {learned} merges in {content['seconds']:.1f} s"]
    for name in ("training", "held_out"):
        if part := content[name]:
            lines.append(
                f"  {name.replace('_', ' ')}: {part['grids']} grids, {part['tokens_per_grid']:.1f} tokens per grid "
                f"instead of {part['cells_per_grid']:.1f}: {part['ratio']:.1%} of the length"
            )
    lines.append("  " + ", ".join(f"{n} merges {kind}" for kind, n in statistics["merges"].items()))
    if learned:
        lines += [f"  {name}: {_quantiles(statistics[key])}" for key, name in NAMES.items()]
    if held_out is None:
        lines.append("  no grids held out (--held_out 0.05): no advice on the number of merges")
    elif learned:
        unused, stops = held_out["unused"], held_out["stops_paying"]
        lengths = [f"{p['merges']}: {p['tokens'] / held_out['cells']:.1%}" for p in held_out["curve"][-8:]]
        lines += [
            f"  not in the held-out part: {unused['merged']} of {learned} merged tokens "
            f"({unused['merges never done']} not even within a larger one), {unused['base']} ids of the codebook",
            f"  held-out length by merges: {', '.join(lengths)}",
            f"  the last tenth of the merges still shortened held-out sequences by {WORTH:.0%}: more may pay"
            if stops == learned
            else f"  from {stops} merges on, a tenth more shortens held-out sequences by less than {WORTH:.0%}",
        ]
    return "\n".join(lines)


NAMES = {"cells": "cells per merged token", "n": "N", "s": "S"}


def _quantiles(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())


def _lengths(part: Encoded) -> dict[str, Any]:
    return {
        "grids": part.grids,
        "cells": part.cells,
        "tokens": part.tokens,
        "cells_per_grid": part.cells / part.grids,
        "tokens_per_grid": part.tokens / part.grids,
        "ratio": part.tokens / part.cells,
    }
