"""Grids on disk: Arrow IPC files and a manifest. Reading needs numpy and pyarrow alone."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from being_vl.errors import ManifestError
from being_vl.files import read_manifest, write_aside

METADATA = b"being_vl"

Block = tuple[NDArray[np.integer[Any]], NDArray[np.integer[Any]], NDArray[np.integer[Any]]]
"""Grids one after the other: their ids in raster order, their heights, their widths; each 1-D."""


@dataclass(frozen=True)
class GridRow:
    """One image's grid and where it came from.

    Args:
        key: The image's name: its path relative to the folder of images, posix; see `find_sources` for others.
        grid: Ids (height, width).
        source_size: The image's own width and height, in pixels.
        sha256: Of the image file.
    """

    key: str
    grid: NDArray[np.integer[Any]]
    source_size: tuple[int, int]
    sha256: str


def shard_path(folder: Path, n: int) -> Path:
    """Path of the n-th Arrow file."""
    return folder / f"grids-{n:05d}.arrow"


def write_shard(path: Path, rows: Sequence[GridRow], codebook_size: int, metadata: dict[str, Any]) -> None:
    """Write `rows` as one Arrow IPC file with one record batch; it appears only when complete.

    The ids are of the smallest unsigned type that the codebook fits into. `metadata` is kept in the schema.
    """
    flat = np.concatenate([row.grid.ravel() for row in rows]) if rows else np.empty(0, np.int64)
    offsets = np.cumsum([0] + [row.grid.size for row in rows], dtype=np.int32)
    ids = pa.array(flat.astype(np.min_scalar_type(codebook_size - 1)))
    columns = {
        "key": pa.array([row.key for row in rows], pa.string()),
        "height": pa.array([row.grid.shape[0] for row in rows], pa.int32()),
        "width": pa.array([row.grid.shape[1] for row in rows], pa.int32()),
        "ids": pa.ListArray.from_arrays(pa.array(offsets), ids),
        "source_width": pa.array([row.source_size[0] for row in rows], pa.int32()),
        "source_height": pa.array([row.source_size[1] for row in rows], pa.int32()),
        "sha256": pa.array([row.sha256 for row in rows], pa.string()),
    }
    write_table(path, columns, metadata)


def write_table(path: Path, columns: dict[str, pa.Array], metadata: dict[str, Any]) -> None:
    """Write columns as one Arrow IPC file with one record batch; it appears only when complete."""
    batch = pa.record_batch(columns).replace_schema_metadata({METADATA: json.dumps(metadata).encode()})
    with write_aside(path) as aside, pa.ipc.new_file(str(aside), batch.schema) as writer:
        writer.write_batch(batch)


def finished_shard(path: Path, job: str) -> dict[str, Any] | None:
    """Metadata of a file that an earlier run of the same job finished."""
    try:
        schema = pa.ipc.open_file(pa.memory_map(str(path))).schema
        metadata: dict[str, Any] = json.loads(schema.metadata[METADATA])
    except (OSError, pa.ArrowInvalid, KeyError, TypeError, ValueError):
        return None
    return metadata if metadata.get("job") == job else None


def rank_and_count() -> tuple[int, int]:
    """Which of how many processes this is, as torchrun says in RANK and WORLD_SIZE; the only one without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def read_shard(path: Path) -> tuple[pa.RecordBatch, dict[str, Any]]:
    """Map one Arrow file into memory: its rows and its metadata.

    Raises:
        ManifestError: if it is missing or damaged.
    """
    try:
        batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        metadata = json.loads(batch.schema.metadata[METADATA])
        sizes = np.diff(batch.column("ids").offsets.to_numpy())
        heights, widths = (batch.column(name).to_numpy() for name in ("height", "width"))
    except (OSError, pa.ArrowInvalid, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ManifestError(f"{path}: not an Arrow file of grids ({error}); quantize again") from None
    wrong = np.flatnonzero(sizes != heights.astype(np.int64) * widths)
    if len(wrong):
        raise ManifestError(
            f"{path}: grid {wrong[0]} has {sizes[wrong[0]]} ids for {heights[wrong[0]]}x{widths[wrong[0]]} cells; "
            "quantize again"
        )
    return batch, metadata


class Blocks(Sequence[Block]):
    """Each Arrow file as a block of views; mapped when it is asked for, so that pages of others take no memory."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        """Number of files."""
        return len(self._paths)

    @overload
    def __getitem__(self, index: int) -> Block: ...

    @overload
    def __getitem__(self, index: slice) -> "Blocks": ...

    def __getitem__(self, index: int | slice) -> "Block | Blocks":
        """One file's grids, or some of the files."""
        if isinstance(index, slice):
            return Blocks(self._paths[index])
        batch, _ = read_shard(self._paths[index])
        ids, heights, widths = (batch.column(name) for name in ("ids", "height", "width"))
        return ids.flatten().to_numpy(), heights.to_numpy(), widths.to_numpy()


class GridStore(Mapping[str, NDArray[np.int64]]):
    """A folder of grids, read-only: key → ids (height, width), int64, in the order of the keys.

    Attributes:
        quantizer_name: Name of the quantizer that made the grids.
        quantizer_fingerprint: Its fingerprint.
        codebook_size: Ids are 0 to `codebook_size` - 1.
        failed: Key → reason, for the images that could not be read.
    """

    def __init__(
        self, paths: Sequence[Path], batches: Sequence[pa.RecordBatch], manifest: dict[str, Any]
    ) -> None:
        quantizer = manifest["quantizer"]
        self.quantizer_name: str = quantizer["name"]
        self.quantizer_fingerprint: str = quantizer["fingerprint"]
        self.codebook_size: int = quantizer["codebook_size"]
        self.failed: dict[str, str] = manifest["failed"]
        self._paths = paths
        columns = ((batch.column("ids"), batch) for batch in batches)
        self._shards = [(ids.values.to_numpy(), ids.offsets.to_numpy(), batch) for ids, batch in columns]

    @cached_property
    def _places(self) -> dict[str, tuple[int, int]]:
        """Per key the file and the row in it; not needed by those who read `blocks`."""
        return {
            key: (n, row)
            for n, (_, _, batch) in enumerate(self._shards)
            for row, key in enumerate(batch.column("key").to_pylist())
        }

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open a finished folder of grids.

        Raises:
            ManifestError: if the folder is missing, unfinished or damaged.
        """
        manifest = read_manifest(folder, "grids")
        paths, batches = [], []
        for shard in manifest["shards"]:
            path, expected = folder / shard["file"], shard["grids"]
            batch, _ = read_shard(path)
            if batch.num_rows != expected:
                raise ManifestError(f"{path}: holds {batch.num_rows} grids, the manifest says {expected}")
            paths.append(path)
            batches.append(batch)
        return cls(paths, batches, manifest)

    def __getitem__(self, key: str) -> NDArray[np.int64]:
        n, row = self._places[key]
        values, offsets, batch = self._shards[n]
        shape = batch.column("height")[row].as_py(), batch.column("width")[row].as_py()
        ids: NDArray[np.integer[Any]] = values[offsets[row] : offsets[row + 1]]
        return ids.reshape(shape).astype(np.int64)

    def blocks(self) -> Blocks:
        """The grids of each Arrow file, without a copy: ids uint8, uint16 or uint32, heights and widths int32.

        This is how `VisualBPE.train` reads a store. The grids are in the order of the keys.
        """
        return Blocks(self._paths)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
