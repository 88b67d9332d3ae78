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
from being_vl.files import sha256
from being_vl.options import fixed_options
from being_vl.outputs import free_locks
from being_vl.tokenizer.corpus import open_grids, split_block
from being_vl.tokenizer.options import (
    MergeStatsOptions,
    VocabularyImportOptions,
    VocabularyShowOptions,
    VocabularyTruncateOptions,
)
from being_vl.tokenizer.output import VocabularyOutput, check_vocabulary_output
from being_vl.tokenizer.report import cells_per_token, merge_statistics
from being_vl.tokenizer.visual_bpe import VisualBPE

log = logging.getLogger(__name__)

MAX_DEFAULT_CELLS = 64
"""Most cells of the token that is drawn if none is asked for."""

MAX_CELLS = 1 << 16
"""Most cells of a token that is asked for."""


@free_locks()
def import_vocabulary(options: VocabularyImportOptions) -> VisualBPE:
    """Turn a vocabulary that Being-VL-0.5 published into a vocabulary file.

    Raises:
        VocabularyError: if it is anything but a pickled list of merges; nothing in it is executed.
        FingerprintError: if `options.out` holds another vocabulary, unless `options.overwrite`.
        OutputError: if it is anything else, or another process is writing it.
    """
    check_vocabulary_output(options.out, [options.vocabulary])
    bpe = VisualBPE.load_published(options.vocabulary, options.codebook_size)
    fields = {"command": "vocab import", "vocabulary_sha256": sha256(options.vocabulary)} | fixed_options(
        options
    )
    VocabularyOutput(options.out, fields, options.overwrite).save(bpe)
    log.info(
        "%s: %d merges. The pickle has no statistics: alpha is 0 and all counts are 1. Being-VL's own encoder looks "
        "along rows only after its first merge, so its tokens differ from ours by the same merges",
        options.out,
        bpe.num_merges,
    )
    return bpe


@free_locks()
def truncate_vocabulary(options: VocabularyTruncateOptions) -> VisualBPE:
    """Keep the first merges.

    Raises:
        VocabularyError: if the vocabulary cannot be read.
        BeingVLError: if it has fewer merges.
        FingerprintError: if `options.out` holds another vocabulary, unless `options.overwrite`.
        OutputError: if it is anything else, or another process is writing it.
    """
    check_vocabulary_output(options.out, [options.vocabulary])
    bpe = VisualBPE.load(options.vocabulary).truncate(options.merges)
    fields = {"command": "vocab truncate", "vocabulary_sha256": sha256(options.vocabulary)} | fixed_options(
        options
    )
    VocabularyOutput(options.out, fields, options.overwrite).save(bpe)
    log.info("%s: the first %d merges of %s", options.out, bpe.num_merges, options.vocabulary)
    return bpe


def show_vocabulary(options: VocabularyShowOptions) -> str:
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
    rows = _merge_rows(bpe)
    first_rows, last_rows = rows[: options.merges], rows[max(options.merges, len(rows) - options.merges) :]
    token = _describe_token(bpe, options.token, options.grids)
    if options.format == "json":
        return json.dumps(
            head | {"first_merges": first_rows, "last_merges": last_rows, "token": token}, indent=2
        )
    lines = [f"{name:22}{_format_value(value)}" for name, value in head.items()]
    if first_rows:
        lines += ["", *_format_table(first_rows + last_rows).splitlines()]
        if len(first_rows + last_rows) < len(rows):
            lines.insert(-len(last_rows), "…")
    return "\n".join([*lines, "", *_draw_token(bpe, token)])


def show_merges(options: MergeStatsOptions) -> str:
    """Each merge with its statistics, and their quantiles.

    Raises:
        VocabularyError: if the vocabulary cannot be read.
    """
    bpe = VisualBPE.load(options.vocabulary)
    rows = _merge_rows(bpe)
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
        lines += ["", _format_table([{"": name} | values for name, values in statistics.items()])]
        lines = [_format_table(rows), "", *lines]
    return "\n".join(lines)


COLUMNS = ("token", "a", "b", "dy", "dx", "n", "n_offset", "s", "cells")


def _merge_rows(bpe: VisualBPE) -> list[dict[str, Any]]:
    """Per merge its token, its pair and offset, its statistics, and the token's number of cells."""
    infos, cells = bpe.merge_infos, cells_per_token(bpe)
    rows = [
        (bpe.base_vocab_size + i, info.a, info.b, info.dy, info.dx, info.n, info.n_offset, info.s, size)
        for i, (info, size) in enumerate(zip(infos, cells, strict=True))
    ]
    return [dict(zip(COLUMNS, row, strict=True)) for row in rows]


def _format_table(rows: list[dict[str, Any]]) -> str:
    """Rows with the same keys, in columns; those without any value are left out."""
    names = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    cells = [names, *([_format_value(row[name]) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in cells)


def _format_value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(f"{n} of {height}x{width}" for height, width, n in value) or "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


def _describe_token(bpe: VisualBPE, token: int | None, grids: Sequence[Path]) -> dict[str, Any]:
    """What a token is made of and where its ids lie: cells (dy, dx, id), None if that is not known."""
    sizes = [1] * bpe.base_vocab_size + cells_per_token(bpe)
    if token is None:
        token = max(range(len(sizes)), key=lambda i: sizes[i] if sizes[i] <= MAX_DEFAULT_CELLS else 0)
    if not 0 <= token < len(sizes):
        raise ConfigError(f"token {token} is not in the vocabulary, expected 0 to {len(sizes) - 1}")
    if sizes[token] > MAX_CELLS:
        raise ConfigError(
            f"token {token} covers {sizes[token]} cells, more than the {MAX_CELLS} that are shown"
        )
    merge = None if token < bpe.base_vocab_size else bpe.merges[token - bpe.base_vocab_size]
    cells = None
    if grids:
        cells = _find_token(bpe, token, grids)
    elif bpe.merge_mode == "oriented" or merge is None:
        cells = bpe.token_to_cells(token)
    return {"token": token, "merge": merge, "ids": _token_ids(bpe, token), "cells": cells}


def _token_ids(bpe: VisualBPE, token: int) -> list[int]:
    """The ids of a token, those of a before those of b."""
    merges, stack, ids = bpe.merges, [token], []
    while stack:
        part = stack.pop()
        if part < bpe.base_vocab_size:
            ids.append(part)
        else:
            a, b, *_ = merges[part - bpe.base_vocab_size]
            stack += [b, a]
    return ids


def _find_token(bpe: VisualBPE, token: int, paths: Sequence[Path]) -> list[tuple[int, int, int]]:
    """The cells of a token in the first grid that has it.

    Raises:
        ConfigError: if none has it.
    """
    source = open_grids(paths, bpe.base_vocab_size)
    source.corpus.summarize(source.codebook_size)
    # Encode block by block, until a grid has the token; its region says where the cells are.
    for block in source.corpus:
        grids = split_block(block)
        for grid, ids in zip(grids, bpe.encode_batch(grids), strict=True):
            if token in ids:
                _, regions = bpe.encode(grid, return_regions=True)
                rows, columns = np.nonzero(np.asarray(regions) == list(ids).index(token))
                anchor_row, anchor_column = rows[0], columns[0]
                cells = zip(rows, columns, strict=True)
                return [(int(y - anchor_row), int(x - anchor_column), int(grid[y, x])) for y, x in cells]
    raise ConfigError(f"token {token} is in none of the grids of {', '.join(map(str, paths))}")


def _draw_token(bpe: VisualBPE, token: dict[str, Any]) -> list[str]:
    """A token in text: each id in its place."""
    ids, cells = token["ids"], token["cells"]
    title = f"token {token['token']}"
    if token["merge"]:
        title += " = {} + {}".format(*token["merge"])
    if cells is None:
        note = "in pair mode its shape is not fixed, --grids draws it as it lies in one of them"
        return [f"{title}, {len(ids)} cells; {note}. Its ids:", " ".join(map(str, ids))]
    # A canvas as large as the token, with dots where it has no cell.
    rows, columns, _ = zip(*cells, strict=True)
    left_column, height, width = min(columns), max(rows) + 1, max(columns) - min(columns) + 1
    digits = len(str(max(ids)))
    canvas = [[".".rjust(digits)] * width for _ in range(height)]
    for row, column, id_ in cells:
        canvas[row][column - left_column] = str(id_).rjust(digits)
    return [f"{title}, {len(ids)} cells in {height}x{width}:", *map(" ".join, canvas)]
