"""Folders of grids of photographs, and the command that learns a vocabulary from them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from being_vl.files import sha256, write_manifest
from being_vl.shards.arrow import shard_path, write_table
from being_vl.shards.grids import GridRow, grid_columns
from helpers.commands import being_vl
from helpers.photos import PHOTOS, PHOTOS_K


def train(
    grids: Path | Sequence[Path], out: Path, *words: object, size: int | None = PHOTOS_K, merges: int = 200
) -> int:
    paths = [grids] if isinstance(grids, Path) else grids
    size_flags = () if size is None else ("--codebook_size", size)
    return being_vl("vocab", "train", *paths, "--out", out, "--num_merges", merges, *size_flags, *words)


def folder_of_grids(
    folder: Path,
    grids: Sequence[NDArray[Any]],
    shard_size: int = 10,
    codebook: int = PHOTOS_K,
    name: str = "vq",
) -> Path:
    """Grids as `being-vl quantize` leaves them, in several files."""
    folder.mkdir(parents=True)
    shards = []
    for n, start in enumerate(range(0, len(grids), shard_size)):
        rows = [
            GridRow(f"{start + i:03}.png", grid, (9, 9), "0" * 64)
            for i, grid in enumerate(grids[start : start + shard_size])
        ]
        path = shard_path(folder, "grids", n)
        write_table(path, grid_columns(rows, codebook), {})
        shards.append({"file": path.name, "grids": len(rows), "sha256": sha256(path)})
    quantizer = {
        "name": name,
        "fingerprint": f"{name}-fingerprint",
        "codebook_size": codebook,
        "downsample": 8,
    }
    fields = {"root": str(folder / "images"), "quantizer": quantizer, "failures": {}, "shards": shards}
    write_manifest(folder, "grids", fields)
    return folder


def make_grids(count: int = 25) -> list[NDArray[Any]]:
    """Grids of several sizes."""
    return [grid[: 8 + i % 5, : 20 - i % 3].copy() for i, grid in enumerate(PHOTOS[:count])]
