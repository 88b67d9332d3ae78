"""Grids on disk: shards and a manifest. Reading them needs numpy and pyarrow alone."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from being_vl.errors import ManifestError
from being_vl.files import read_manifest
from being_vl.options import StrPath
from being_vl.shards.arrow import open_table
from being_vl.shards.checksums import read_entries, verify_shards

KIND = "grids"
"""Kind of the manifest of a folder of grids."""

Block = tuple[NDArray[np.integer[Any]], NDArray[np.integer[Any]], NDArray[np.integer[Any]]]
"""Grids one after the other: their ids in raster order, their heights, their widths; each 1-D."""


@dataclass(frozen=True)
class GridRow:
    """One image's grid and where it came from.

    Args:
        key: The image's name: its path relative to the folder of images, posix; see `find_images` for others.
        grid: Ids (height, width).
        source_size: The image's own width and height, in pixels.
        sha256: Of the image file.
    """

    key: str
    grid: NDArray[np.integer[Any]]
    source_size: tuple[int, int]
    sha256: str


def grid_columns(rows: Sequence[GridRow], codebook_size: int) -> dict[str, pa.Array]:
    """The columns of a shard of grids, whose ids are of the smallest unsigned type that the codebook fits into."""
    ids = np.concatenate([row.grid.ravel() for row in rows]) if rows else np.empty(0, np.int64)
    offsets = np.cumsum([0] + [row.grid.size for row in rows], dtype=np.int32)
    values = pa.array(ids.astype(np.min_scalar_type(codebook_size - 1)))
    return {
        "key": pa.array([row.key for row in rows], pa.string()),
        "height": pa.array([row.grid.shape[0] for row in rows], pa.int32()),
        "width": pa.array([row.grid.shape[1] for row in rows], pa.int32()),
        "ids": pa.ListArray.from_arrays(pa.array(offsets), values),
        "source_width": pa.array([row.source_size[0] for row in rows], pa.int32()),
        "source_height": pa.array([row.source_size[1] for row in rows], pa.int32()),
        "sha256": pa.array([row.sha256 for row in rows], pa.string()),
    }


def read_grids(path: Path) -> pa.RecordBatch:
    """Map a shard of grids into memory.

    Raises:
        ManifestError: if it is missing or damaged.
    """
    batch, _ = open_table(path, KIND, ("key", "height", "width", "ids"))
    sizes = np.diff(batch.column("ids").offsets.to_numpy())
    heights, widths = (batch.column(name).to_numpy() for name in ("height", "width"))
    faults = np.flatnonzero(sizes != heights.astype(np.int64) * widths)
    if len(faults):
        row = faults[0]
        raise ManifestError(
            f"{path}: grid {row} has {sizes[row]} ids for {heights[row]}x{widths[row]} cells; quantize again"
        )
    return batch


class ShardBlocks(Sequence[Block]):
    """Each shard as a block of views; mapped when it is asked for, so that pages of others take no memory."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        """Number of shards."""
        return len(self._paths)

    @overload
    def __getitem__(self, index: int) -> Block: ...

    @overload
    def __getitem__(self, index: slice) -> "ShardBlocks": ...

    def __getitem__(self, index: int | slice) -> "Block | ShardBlocks":
        """One shard's grids, or some of the shards."""
        if isinstance(index, slice):
            return ShardBlocks(self._paths[index])
        batch = read_grids(self._paths[index])
        ids, heights, widths = (batch.column(name) for name in ("ids", "height", "width"))
        return ids.flatten().to_numpy(), heights.to_numpy(), widths.to_numpy()


class GridStore(Mapping[str, NDArray[np.int64]]):
    """A folder of grids, read-only: key → ids (height, width), int64, in the order of the keys.

    Attributes:
        quantizer_name: Name of the quantizer that made the grids.
        quantizer_fingerprint: Its fingerprint.
        codebook_size: Ids are 0 to `codebook_size` - 1.
        failures: Key → reason, for the images that could not be read.
    """

    def __init__(
        self, paths: Sequence[Path], batches: Sequence[pa.RecordBatch], manifest: dict[str, Any]
    ) -> None:
        quantizer = manifest["quantizer"]
        self.quantizer_name: str = quantizer["name"]
        self.quantizer_fingerprint: str = quantizer["fingerprint"]
        self.codebook_size: int = quantizer["codebook_size"]
        self.failures: dict[str, str] = manifest["failures"]
        self._paths = paths
        columns = ((batch.column("ids"), batch) for batch in batches)
        self._shards = [(ids.values.to_numpy(), ids.offsets.to_numpy(), batch) for ids, batch in columns]

    @cached_property
    def _places(self) -> dict[str, tuple[int, int]]:
        """Key → number of the shard and of the row in it; those who read `blocks` do without."""
        return {
            key: (n, row)
            for n, (_, _, batch) in enumerate(self._shards)
            for row, key in enumerate(batch.column("key").to_pylist())
        }

    @classmethod
    def open(cls, folder: StrPath) -> Self:
        """Open a finished folder of grids.

        Args:
            folder: What `being-vl quantize` wrote.

        Raises:
            ManifestError: if the folder is missing, unfinished or damaged, or a file has other bytes than when it was
                written.
        """
        folder = Path(folder)
        manifest = read_manifest(folder, KIND)
        entries = read_entries(folder, manifest, "grids")
        verify_shards(entries, "quantize")
        paths, batches = [], []
        for entry in entries:
            batch = read_grids(entry.path)
            if batch.num_rows != entry.num_rows:
                raise ManifestError(
                    f"{entry.path}: holds {batch.num_rows} grids, the manifest says {entry.num_rows}"
                )
            paths.append(entry.path)
            batches.append(batch)
        return cls(paths, batches, manifest)

    def __getitem__(self, key: str) -> NDArray[np.int64]:
        n, row = self._places[key]
        values, offsets, batch = self._shards[n]
        shape = batch.column("height")[row].as_py(), batch.column("width")[row].as_py()
        ids: NDArray[np.integer[Any]] = values[offsets[row] : offsets[row + 1]]
        return ids.reshape(shape).astype(np.int64)

    def blocks(self) -> ShardBlocks:
        """The grids of each shard, without a copy: ids uint8, uint16 or uint32, heights and widths int32.

        This is how `VisualBPE.train` reads a store. The grids are in the order of the keys.
        """
        return ShardBlocks(self._paths)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
