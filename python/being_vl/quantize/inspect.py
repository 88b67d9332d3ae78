"""`being-vl grids info`, `verify` and `decode`."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from being_vl.errors import ConfigError, ManifestError, QuantizerError
from being_vl.files import read_manifest, sha256, write_aside
from being_vl.quantize.base import load_quantizer
from being_vl.quantize.options import GridsDecodeOptions, GridsInfoOptions, GridsVerifyOptions
from being_vl.shards.grids import Block, GridStore, read_shard

GAP = 4

Counts = NDArray[np.int64]


def info(options: GridsInfoOptions) -> str:
    """Counts, how often ids occur, and how much neighbours tell of each other.

    Raises:
        ManifestError: if the folder is missing, unfinished or damaged.
    """
    store = GridStore.open(options.grids)
    ids = np.zeros(store.codebook_size, np.int64)
    sizes: Counter[tuple[int, int]] = Counter()
    right, down = _PairCounts(store.codebook_size), _PairCounts(store.codebook_size)
    for block in store.blocks():
        for grids in _stacks(block):
            ids += np.bincount(grids.ravel(), minlength=len(ids))
            sizes[grids.shape[1:]] += len(grids)
            right.add(grids[:, :, :-1], grids[:, :, 1:])
            down.add(grids[:, :-1], grids[:, 1:])
    cells = int(ids.sum())
    order = np.argsort(-ids, kind="stable")
    facts: dict[str, Any] = {
        "quantizer": store.quantizer_name,
        "fingerprint": store.quantizer_fingerprint,
        "codebook_size": store.codebook_size,
        "grids": sum(sizes.values()),
        "failed": len(store.failed),
        "sizes": [[height, width, n] for (height, width), n in sizes.most_common()],
        "cells": cells,
        "ids_used": int((ids > 0).sum()),
        "entropy_bits": _entropy(ids),
        "most_frequent": [[int(i), int(ids[i])] for i in order[: options.top] if ids[i]],
        "neighbours": {"right": right.facts(), "down": down.facts()},
    }
    if options.format == "json":
        return json.dumps(facts | {"counts": ids.tolist()}, indent=2)
    shown = [f"{n:,} of {height}x{width}" for height, width, n in facts["sizes"][:5]]
    more = len(facts["sizes"]) - len(shown)
    lines = [
        f"quantizer       {store.quantizer_name} ({store.quantizer_fingerprint[:12]})",
        f"grids           {facts['grids']:,}: {', '.join(shown)}{f' and {more} other sizes' * bool(more)}",
        f"failed          {facts['failed']:,}",
        f"cells           {cells:,}",
        f"ids used        {facts['ids_used']:,} of {store.codebook_size:,}",
        f"entropy         {facts['entropy_bits']:.2f} bits per cell, of at most {math.log2(len(ids)):.2f}",
        "most frequent   " + ", ".join(f"{i}: {n / cells:.2%}" for i, n in facts["most_frequent"]),
    ]
    for name, pairs in facts["neighbours"].items():
        lines.append(
            f"{name + ' neighbour':16}{pairs['equal']:.2%} equal, {pairs['distinct']:,} different pairs, "
            f"{pairs['mutual_information_bits']:.2f} bits known from it"
        )
    return "\n".join(lines)


def verify(options: GridsVerifyOptions) -> str:
    """Compare all files of a folder with its manifest.

    Raises:
        ManifestError: if the folder is unfinished, or something is missing, damaged, doubled or out of range; it names
            each.
    """
    manifest = read_manifest(options.grids, "grids")
    codebook_size = manifest["quantizer"]["codebook_size"]
    problems: list[str] = []
    places: dict[str, str] = {}
    for shard in manifest["shards"]:
        path = options.grids / shard["file"]
        try:
            if (found := sha256(path)) != shard["sha256"]:
                problems.append(f"{path.name}: checksum {found[:12]}, expected {shard['sha256'][:12]}")
            batch, _ = read_shard(path)
        except FileNotFoundError:
            problems.append(f"{path.name}: missing")
            continue
        except ManifestError as error:
            problems.append(str(error))
            continue
        if batch.num_rows != shard["grids"]:
            problems.append(f"{path.name}: {batch.num_rows} grids, expected {shard['grids']}")
        ids = batch.column("ids").flatten().to_numpy()
        if len(ids) and ids.max() >= codebook_size:
            problems.append(f"{path.name}: id {ids.max()}, expected at most {codebook_size - 1}")
        for key in batch.column("key").to_pylist():
            if key in places:
                problems.append(f"{path.name}: key {key!r} is in {places[key]} as well")
            places[key] = path.name
    known = {shard["file"] for shard in manifest["shards"]}
    strays = {path.name for path in options.grids.glob("grids-*.arrow")} - known
    problems += [f"{name}: not in the manifest" for name in sorted(strays)]
    if problems:
        raise ManifestError(
            f"{options.grids}: {len(problems)} problems; delete the files named and run `being-vl quantize` again: "
            + "; ".join(problems)
        )
    return f"{options.grids}: {len(known)} files, {len(places)} grids, as the manifest says"


def decode(options: GridsDecodeOptions) -> Path:
    """Draw reconstructions as one PNG, in rows.

    Raises:
        ManifestError: if the folder is missing, unfinished or damaged.
        QuantizerError: if the quantizer is not the one that made the grids, naming both, or has no decoder.
        ConfigError: if there is no such key.
    """
    store = GridStore.open(options.grids)
    for key in options.key:
        if key not in store:
            raise ConfigError(f"key: there is no grid {key!r} in {options.grids}")
    every = list(store) if not options.key else []
    chosen = options.key or every[:: max(1, len(every) // options.count)][: options.count]
    quantizer = load_quantizer(options.quantizer, options.device)
    if quantizer.fingerprint != store.quantizer_fingerprint:
        raise QuantizerError(
            f"{options.grids}: made by quantizer {store.quantizer_name!r} ({store.quantizer_fingerprint[:12]}), but "
            f"{options.quantizer!r} is {quantizer.name!r} ({quantizer.fingerprint[:12]})"
        )
    pictures = [quantizer.decode([store[key]])[0] for key in chosen]
    with write_aside(options.out) as aside:
        _sheet(pictures, options.side).save(aside, "PNG")
    return options.out


def _sheet(pictures: list[Image.Image], side: int) -> Image.Image:
    """Pictures of at most `side` pixels on white, in about as many rows as columns."""
    for picture in pictures:
        picture.thumbnail((side, side))
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    width, height = (max(sides) + GAP for sides in zip(*(p.size for p in pictures), strict=True))
    sheet = Image.new("RGB", (columns * width + GAP, rows * height + GAP), "white")
    for n, picture in enumerate(pictures):
        row, column = divmod(n, columns)
        sheet.paste(picture, (GAP + column * width, GAP + row * height))
    return sheet


def _stacks(block: Block) -> Iterator[NDArray[np.int64]]:
    """A block's grids by size: (n, height, width)."""
    ids, heights, widths = block
    cells = heights.astype(np.int64) * widths
    ends = cells.cumsum()
    shapes, which = np.unique(np.stack([heights, widths]), axis=1, return_inverse=True)
    for n, (height, width) in enumerate(shapes.T):
        starts = (ends - cells)[which == n]
        places = starts[:, None] + np.arange(int(height) * int(width))
        yield ids[places].reshape(-1, height, width).astype(np.int64)


class _PairCounts:
    """How often ids are neighbours."""

    def __init__(self, codebook_size: int) -> None:
        self.codebook_size = codebook_size
        self.codes = np.empty(0, np.int64)
        self.counts = np.empty(0, np.int64)

    def add(self, first: NDArray[np.int64], second: NDArray[np.int64]) -> None:
        """Count the pairs at the same places of two arrays."""
        codes, counts = np.unique(first.ravel() * self.codebook_size + second.ravel(), return_counts=True)
        self.codes, places = np.unique(np.concatenate([self.codes, codes]), return_inverse=True)
        both = np.concatenate([self.counts, counts])
        self.counts = np.zeros(len(self.codes), np.int64)
        np.add.at(self.counts, places, both)

    def facts(self) -> dict[str, float]:
        """Share of equal neighbours, number of different pairs, and what one id tells of the other."""
        first, second = np.divmod(self.codes, self.codebook_size)
        sides = [np.bincount(ids, self.counts) for ids in (first, second)] if len(self.codes) else []
        total = max(1, int(self.counts.sum()))
        return {
            "equal": int(self.counts[first == second].sum()) / total,
            "distinct": len(self.codes),
            "mutual_information_bits": sum(map(_entropy, sides)) - _entropy(self.counts),
        }


def _entropy(counts: NDArray[Any]) -> float:
    """Of a distribution given by counts, in bits."""
    shares = counts[counts > 0] / max(1, counts.sum())
    return float(-(shares * np.log2(shares)).sum())
