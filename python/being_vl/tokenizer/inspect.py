"""`being-vl vocab import`, `show`, `merge-stats` and `truncate`."""

import csv
import io
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from being_vl.errors import ConfigError
from being_vl.tokenizer import VisualBPE
from being_vl.tokenizer.corpus import grids_of, open_source
from being_vl.tokenizer.options import ImportOptions, MergeStatsOptions, ShowOptions, TruncateOptions
from being_vl.tokenizer.report import cells_per_token, merge_statistics

log = logging.getLogger(__name__)

MOST_DRAWN = 64
"""Most cells of the token that is drawn if none is asked for."""

MOST_SHOWN = 1 << 16
"""Most cells of a token that is asked for."""


def import_vocabulary(options: ImportOptions) -> VisualBPE:
    """Turn a vocabulary that Being-VL-0.5 published into a file of ours.

    Raises:
        VocabularyError: if it is anything but a pickled list of merges; nothing in it is executed.
    """
    bpe = VisualBPE.load_published(options.vocabulary, options.base_vocab_size)
    bpe.save(options.out)
    log.info(
        "%s: %d merges. The pickle has no statistics: alpha is 0 and all counts are 1. Being-VL's own encoder looks "
        "along rows only after its first merge, so its tokens are others than ours by the same merges",
        options.out,
        bpe.num_merges,
    )
    return bpe


def truncate_vocabulary(options: TruncateOptions) -> VisualBPE:
    """Keep the first merges.

    Raises:
        VocabularyError: if the vocabulary cannot be read.
        BeingVLError: if it has fewer merges.
    """
    bpe = VisualBPE.load(options.vocabulary).truncate(options.merges)
    bpe.save(options.out)
    log.info("%s: the first %d merges of %s", options.out, bpe.num_merges, options.vocabulary)
    return bpe


def show(options: ShowOptions) -> str:
    """A vocabulary's options, its first and last merges, and one token.

    Raises:
        VocabularyError: if the vocabulary cannot be read.
        ConfigError: if there is no such token.
    """
    bpe = VisualBPE.load(options.vocabulary)
    head = {
        "base_vocab_size": bpe.base_vocab_size,
        "num_merges": bpe.num_merges,
        "vocab_size": bpe.vocab_size,
        "merge_mode": bpe.merge_mode,
        "alpha": bpe.alpha,
        "sigma": bpe.sigma,
        "min_frequency": bpe.min_frequency,
        "quantizer_name": bpe.quantizer_name,
        "quantizer_fingerprint": bpe.quantizer_fingerprint,
        "num_grids": bpe.num_grids,
        "grid_sizes": [[height, width, n] for (height, width), n in bpe.grid_sizes.items()],
    }
    rows = _rows(bpe)
    first, last = rows[: options.merges], rows[max(options.merges, len(rows) - options.merges) :]
    token = _token(bpe, options.token, options.grids)
    if options.format == "json":
        return json.dumps(head | {"first": first, "last": last, "token": token}, indent=2)
    lines = [f"{name:22}{_said(value)}" for name, value in head.items()]
    if first:
        lines += ["", *_table(first + last).splitlines()]
        if len(first + last) < len(rows):
            lines.insert(-len(last), "…")
    return "\n".join([*lines, "", *_drawn(bpe, token)])


def merge_stats(options: MergeStatsOptions) -> str:
    """Each merge with its statistics, and their quantiles.

    Raises:
        VocabularyError: if the vocabulary cannot be read.
    """
    bpe = VisualBPE.load(options.vocabulary)
    rows = _rows(bpe)
    if options.format == "csv":
        file = io.StringIO()
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return file.getvalue().rstrip("\n")
    statistics = merge_statistics(bpe)
    if options.format == "json":
        return json.dumps({"statistics": statistics, "merges": rows}, indent=2)
    lines = [f"{n} merges {kind}" for kind, n in statistics.pop("merges").items()]
    if rows:
        lines += ["", _table([{"": name} | values for name, values in statistics.items()])]
        lines = [_table(rows), "", *lines]
    return "\n".join(lines)


COLUMNS = ("token", "a", "b", "dy", "dx", "n", "n_offset", "s", "cells")


def _rows(bpe: VisualBPE) -> list[dict[str, Any]]:
    """Per merge the token it made, its rule, its statistics, and the token's number of cells."""
    infos, cells = bpe.merge_infos, cells_per_token(bpe)
    rules = [
        (bpe.base_vocab_size + i, info.a, info.b, info.dy, info.dx, info.n, info.n_offset, info.s, size)
        for i, (info, size) in enumerate(zip(infos, cells, strict=True))
    ]
    return [dict(zip(COLUMNS, rule, strict=True)) for rule in rules]


def _table(rows: list[dict[str, Any]]) -> str:
    """Rows with the same keys, in columns; those without any value are left out."""
    names = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    cells = [names, *([_said(row[name]) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in cells)


def _said(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(f"{n} of {height}x{width}" for height, width, n in value) or "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


def _token(bpe: VisualBPE, asked: int | None, grids: Sequence[Path]) -> dict[str, Any]:
    """What a token is made of and where its ids lie: cells (dy, dx, id), None if that is not known."""
    sizes = [1] * bpe.base_vocab_size + cells_per_token(bpe)
    token = asked
    if token is None:
        token = max(range(len(sizes)), key=lambda i: sizes[i] if sizes[i] <= MOST_DRAWN else 0)
    if not 0 <= token < len(sizes):
        raise ConfigError(f"token {token} is not in the vocabulary, expected 0 to {len(sizes) - 1}")
    if sizes[token] > MOST_SHOWN:
        raise ConfigError(
            f"token {token} covers {sizes[token]} cells, more than the {MOST_SHOWN} that are shown"
        )
    merge = None if token < bpe.base_vocab_size else bpe.merges[token - bpe.base_vocab_size]
    cells = None
    if grids:
        cells = _found(bpe, token, grids)
    elif bpe.merge_mode == "oriented" or merge is None:
        cells = bpe.token_to_cells(token)
    return {"token": token, "merge": merge, "ids": _ids(bpe, token), "cells": cells}


def _ids(bpe: VisualBPE, token: int) -> list[int]:
    """The ids of a token, those of a before those of b."""
    merges, waiting, ids = bpe.merges, [token], []
    while waiting:
        one = waiting.pop()
        if one < bpe.base_vocab_size:
            ids.append(one)
        else:
            a, b, *_ = merges[one - bpe.base_vocab_size]
            waiting += [b, a]
    return ids


def _found(bpe: VisualBPE, token: int, paths: Sequence[Path]) -> list[tuple[int, int, int]]:
    """The cells of a token in the first grid that has it.

    Raises:
        ConfigError: if none has it.
    """
    source = open_source(paths, bpe.base_vocab_size)
    source.corpus.check(source.codebook_size)
    for block in source.corpus:
        grids = grids_of(block)
        for grid, ids in zip(grids, bpe.encode_batch(grids), strict=True):
            if token in ids:
                _, regions = bpe.encode(grid, return_regions=True)
                rows, columns = np.nonzero(np.asarray(regions) == list(ids).index(token))
                first, left = rows[0], columns[0]
                places = zip(rows, columns, strict=True)
                return [(int(y - first), int(x - left), int(grid[y, x])) for y, x in places]
    raise ConfigError(f"token {token} is in none of the grids of {', '.join(map(str, paths))}")


def _drawn(bpe: VisualBPE, token: dict[str, Any]) -> list[str]:
    """A token in text: each id in its place."""
    ids, cells = token["ids"], token["cells"]
    title = f"token {token['token']}"
    if token["merge"]:
        title += " = {} + {}".format(*token["merge"])
    if cells is None:
        note = "in pair mode its shape is not fixed, --grids draws it as it lies in one of them"
        return [f"{title}, {len(ids)} cells; {note}. Its ids:", " ".join(map(str, ids))]
    rows, columns, _ = zip(*cells, strict=True)
    left, height, width = min(columns), max(rows) + 1, max(columns) - min(columns) + 1
    digits = len(str(max(ids)))
    canvas = [[".".rjust(digits)] * width for _ in range(height)]
    for row, column, one in cells:
        canvas[row][column - left] = str(one).rjust(digits)
    return [f"{title}, {len(ids)} cells in {height}x{width}:", *map(" ".join, canvas)]
