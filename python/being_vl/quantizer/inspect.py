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
from PIL.PngImagePlugin import PngInfo

from being_vl.devices import find_device
from being_vl.errors import ConfigError, ManifestError
from being_vl.files import read_manifest, sha256, write_aside
from being_vl.outputs import check_file, free_locks, lock_file
from being_vl.quantizer.base import load_quantizer
from being_vl.quantizer.options import GridsDecodeOptions, GridsInfoOptions, GridsVerifyOptions
from being_vl.quantizer_names import check_same_quantizer, describe_quantizer
from being_vl.shards.grids import KIND, Block, GridStore, read_grids
from being_vl.tokenizer.corpus import describe_sizes

GAP = 4
"""Pixels between the images of a sheet."""
SHEET_MARK = "being-vl grids decode"
"""What a sheet's file names as the software that made it."""

IdCounts = NDArray[np.int64]
"""How often each id of the codebook occurs, shape (codebook_size,)."""


def info(options: GridsInfoOptions) -> str:
    """Counts, how often ids occur, and the mutual information of neighbours.

    Raises:
        ManifestError: if the folder is missing, unfinished or damaged.
    """
    store = GridStore.open(options.grids)
    ids, facts = _measure(store, options.top)
    if options.format == "json":
        return json.dumps(facts | {"counts": ids.tolist()}, indent=2)
    cells = facts["cells"]
    sizes = Counter({(height, width): n for height, width, n in facts["sizes"]})
    lines = [
        f"quantizer       {describe_quantizer(store.quantizer_name, store.quantizer_fingerprint)}",
        f"grids           {facts['grids']:,}: {describe_sizes(sizes)}",
        f"failures        {facts['failures']:,}",
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


def _measure(store: GridStore, top: int) -> tuple[IdCounts, dict[str, Any]]:
    """How often each id occurs, and the facts that `info` reports, with the `top` most frequent ids."""
    # Count ids, sizes and pairs of neighbours, a shard at a time.
    ids = np.zeros(store.codebook_size, np.int64)
    sizes: Counter[tuple[int, int]] = Counter()
    right_pairs, down_pairs = _PairCounts(store.codebook_size), _PairCounts(store.codebook_size)
    for block in store.blocks():
        for grids in _stacks(block):
            ids += np.bincount(grids.ravel(), minlength=len(ids))
            sizes[grids.shape[1:]] += len(grids)
            right_pairs.add(grids[:, :, :-1], grids[:, :, 1:])
            down_pairs.add(grids[:, :-1], grids[:, 1:])
    # Sort and summarise them.
    order = np.argsort(-ids, kind="stable")
    return ids, {
        "quantizer": store.quantizer_name,
        "fingerprint": store.quantizer_fingerprint,
        "codebook_size": store.codebook_size,
        "grids": sum(sizes.values()),
        "failures": len(store.failures),
        "sizes": [[height, width, n] for (height, width), n in sizes.most_common()],
        "cells": int(ids.sum()),
        "ids_used": int((ids > 0).sum()),
        "entropy_bits": _entropy(ids),
        "most_frequent": [[int(i), int(ids[i])] for i in order[:top] if ids[i]],
        "neighbours": {"right": right_pairs.facts(), "down": down_pairs.facts()},
    }


def verify(options: GridsVerifyOptions) -> str:
    """Compare all shards of a folder with its manifest.

    Raises:
        ManifestError: if the folder is unfinished, or something is missing, damaged, doubled or out of range; it names
            each.
    """
    manifest = read_manifest(options.grids, KIND)
    codebook_size = manifest["quantizer"]["codebook_size"]
    problems: list[str] = []
    shard_of_key: dict[str, str] = {}
    for entry in manifest["shards"]:
        problems += _verify_shard(options.grids, entry, codebook_size, shard_of_key)
    names = {entry["file"] for entry in manifest["shards"]}
    strays = {path.name for path in options.grids.glob(f"{KIND}-*.arrow")} - names
    problems += [f"{name}: not in the manifest" for name in sorted(strays)]
    if problems:
        raise ManifestError(
            f"{options.grids}: {len(problems)} problems; delete the files named and run `being-vl quantize` again: "
            + "; ".join(problems)
        )
    return f"{options.grids}: {len(names)} shards, {len(shard_of_key)} grids, as the manifest says"


def _verify_shard(
    folder: Path, entry: dict[str, Any], codebook_size: int, shard_of_key: dict[str, str]
) -> Iterator[str]:
    """What is wrong with a shard.

    Args:
        folder: Where it is.
        entry: What the manifest says of it.
        codebook_size: Ids are 0 to `codebook_size` - 1.
        shard_of_key: Key → name of the shard that it is in; those of this one are added.
    """
    path = folder / entry["file"]
    try:
        if (checksum := sha256(path)) != entry["sha256"]:
            yield f"{path.name}: checksum {checksum[:12]}, expected {entry['sha256'][:12]}"
        batch = read_grids(path)
    except FileNotFoundError:
        yield f"{path.name}: missing"
        return
    except ManifestError as error:
        yield str(error)
        return
    if batch.num_rows != entry["grids"]:
        yield f"{path.name}: {batch.num_rows} grids, expected {entry['grids']}"
    ids = batch.column("ids").flatten().to_numpy()
    if len(ids) and ids.max() >= codebook_size:
        yield f"{path.name}: id {ids.max()}, expected at most {codebook_size - 1}"
    for key in batch.column("key").to_pylist():
        if key in shard_of_key:
            yield f"{path.name}: key {key!r} is in {shard_of_key[key]} as well"
        shard_of_key[key] = path.name


@free_locks()
def decode(options: GridsDecodeOptions) -> Path:
    """Draw reconstructions as one PNG, in rows.

    Raises:
        ManifestError: if the folder is missing, unfinished or damaged.
        QuantizerError: if the quantizer is not the one that made the grids, naming both, or has no decoder.
        ConfigError: if there is no such key.
        OutputError: if `out` is anything but a sheet that was drawn before, or another process is writing it.
    """
    check_file(options.out, _is_sheet, "sheet of reconstructions", [options.grids, options.quantizer])
    store = GridStore.open(options.grids)
    for key in options.key:
        if key not in store:
            raise ConfigError(f"key: there is no grid {key!r} in {options.grids}")
    stride = max(1, len(store) // options.count)
    keys = options.key or list(store)[::stride][: options.count]
    quantizer = load_quantizer(options.quantizer, find_device(options.device))
    check_same_quantizer(
        str(options.grids),
        (store.quantizer_name, store.quantizer_fingerprint),
        repr(options.quantizer),
        (quantizer.name, quantizer.fingerprint),
    )
    images = [quantizer.decode([store[key]])[0] for key in keys]
    lock_file(options.out)
    with write_aside(options.out) as temporary_path:
        text = PngInfo()
        text.add_text("Software", SHEET_MARK)
        _draw_sheet(images, options.side).save(temporary_path, "PNG", pnginfo=text)
    return options.out


def _is_sheet(path: Path) -> bool:
    """Whether a file is a sheet that `decode` drew."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.info.get("Software") == SHEET_MARK
    except (OSError, ValueError, SyntaxError):
        return False


def _draw_sheet(images: list[Image.Image], side: int) -> Image.Image:
    """Images of at most `side` pixels on white, in about as many rows as columns."""
    for image in images:
        image.thumbnail((side, side))
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = (max(sides) + GAP for sides in zip(*(image.size for image in images), strict=True))
    sheet = Image.new("RGB", (columns * width + GAP, rows * height + GAP), "white")
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        sheet.paste(image, (GAP + column * width, GAP + row * height))
    return sheet


def _stacks(block: Block) -> Iterator[NDArray[np.int64]]:
    """A block's grids by size: (n, height, width)."""
    ids, heights, widths = block
    cells = heights.astype(np.int64) * widths
    ends = cells.cumsum()
    shapes, shape_of_grid = np.unique(np.stack([heights, widths]), axis=1, return_inverse=True)
    for number, (height, width) in enumerate(shapes.T):
        starts = (ends - cells)[shape_of_grid == number]
        positions = starts[:, None] + np.arange(int(height) * int(width))
        yield ids[positions].reshape(-1, height, width).astype(np.int64)


class _PairCounts:
    """How often ids are neighbours; the code of a pair (a, b) is a·codebook_size + b."""

    def __init__(self, codebook_size: int) -> None:
        self.codebook_size = codebook_size
        self.codes = np.empty(0, np.int64)
        self.counts = np.empty(0, np.int64)

    def add(self, first_ids: NDArray[np.int64], second_ids: NDArray[np.int64]) -> None:
        """Count the pairs at the same places of two arrays."""
        codes, counts = np.unique(
            first_ids.ravel() * self.codebook_size + second_ids.ravel(), return_counts=True
        )
        self.codes, positions = np.unique(np.concatenate([self.codes, codes]), return_inverse=True)
        summands = np.concatenate([self.counts, counts])
        self.counts = np.zeros(len(self.codes), np.int64)
        np.add.at(self.counts, positions, summands)

    def facts(self) -> dict[str, float]:
        """Share of equal neighbours, number of different pairs, and their mutual information."""
        first_ids, second_ids = np.divmod(self.codes, self.codebook_size)
        id_counts = (
            [np.bincount(ids, self.counts) for ids in (first_ids, second_ids)] if len(self.codes) else []
        )
        total = max(1, int(self.counts.sum()))
        return {
            "equal": int(self.counts[first_ids == second_ids].sum()) / total,
            "distinct": len(self.codes),
            "mutual_information_bits": sum(map(_entropy, id_counts)) - _entropy(self.counts),
        }


def _entropy(counts: NDArray[Any]) -> float:
    """Of a distribution given by counts, in bits."""
    shares = counts[counts > 0] / max(1, counts.sum())
    return float(-(shares * np.log2(shares)).sum())
