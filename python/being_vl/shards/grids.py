"""Grids on disk: shards and a manifest. Reading them needs numpy and pyarrow alone."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, Self, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from being_vl.account import LEFT_OUT
from being_vl.errors import ManifestError
from being_vl.files import read_manifest
from being_vl.images.lookup import ImageLookup, Place
from being_vl.options import StrPath
from being_vl.quantizer_names import check_same_quantizer
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
        key: The image's name, as `being_vl.images.keys.image_key` makes it.
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
    batch, _ = open_table(path, KIND, ("key", "height", "width", "ids", "sha256"))
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
        folder: The folder.
        paths: Its shards.
        root: Folder of the images, which the keys are relative to.
        quantizer_name: Name of the quantizer that made the grids.
        quantizer_fingerprint: Its fingerprint.
        codebook_size: Ids are 0 to `codebook_size` - 1.
        failures: Key → reason, for the images that could not be read.
    """

    def __init__(
        self,
        folder: Path,
        paths: Sequence[Path],
        batches: Sequence[pa.RecordBatch],
        manifest: dict[str, Any],
    ) -> None:
        quantizer = manifest["quantizer"]
        self.folder = folder
        self.root = Path(manifest["root"])
        self.quantizer_name: str = quantizer["name"]
        self.quantizer_fingerprint: str = quantizer["fingerprint"]
        self.codebook_size: int = quantizer["codebook_size"]
        self.failures: dict[str, str] = manifest["failures"]
        self.paths = paths
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
        try:
            return cls(folder, paths, batches, manifest)
        except (KeyError, TypeError) as error:
            raise ManifestError(
                f"{folder}: its manifest is not one of grids (no {error}); quantize again"
            ) from None

    @property
    def title(self) -> str:
        """What messages call it."""
        return str(self.folder)

    @cached_property
    def left_out(self) -> dict[str, str]:
        """Path below the root → reason, of what `being-vl quantize` found and did not take for an image."""
        path = self.folder / LEFT_OUT
        if not path.is_file():
            return {}
        try:
            items = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            return {str(item["name"]): str(item["reason"]) for item in items}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def sha256(self, key: str) -> str:
        """Hex SHA-256 of the image file that a grid was made of."""
        n, row = self._places[key]
        return str(self._shards[n][2].column("sha256")[row].as_py())

    def __contains__(self, key: object) -> bool:
        return key in self._places

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
        return ShardBlocks(self.paths)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class Grids(Mapping[str, NDArray[np.int64]]):
    """Folders of grids that one quantizer made, together: key → ids (height, width), int64.

    A key that more than one folder has stands here with its root in front, as an absolute path.

    Args:
        stores: The folders.

    Attributes:
        stores: The folders.
        quantizer_name, quantizer_fingerprint, codebook_size: As those of each `GridStore`.

    Raises:
        QuantizerError: if they are of different quantizers, naming two folders.
    """

    def __init__(self, stores: Sequence[GridStore]) -> None:
        self.stores = list(stores)
        first = self.stores[0]
        quantizer = first.quantizer_name, first.quantizer_fingerprint
        for store in self.stores[1:]:
            store_quantizer = store.quantizer_name, store.quantizer_fingerprint
            check_same_quantizer(str(store.folder), store_quantizer, str(first.folder), quantizer)
        self.quantizer_name, self.quantizer_fingerprint = quantizer
        self.codebook_size = first.codebook_size
        self._lookup = ImageLookup(self.stores, "quantize it too, and give both folders of grids")

    @classmethod
    def open(cls, folders: StrPath | Iterable[StrPath]) -> Self:
        """Open finished folders of grids.

        Args:
            folders: What `being-vl quantize` wrote; a folder that is named twice counts once.

        Raises:
            ManifestError: if a folder is missing, unfinished or damaged.
            QuantizerError: if they are of different quantizers.
        """
        paths = [folders] if isinstance(folders, str | PathLike) else folders
        distinct_paths = {Path(path).resolve(): path for path in reversed(list(paths))}
        return cls([GridStore.open(path) for path in reversed(distinct_paths.values())])

    def find(self, name: str, folder: StrPath | None = None) -> str:
        """The key of the image that a name in a record means; see `being_vl.images.lookup.ImageLookup`.

        Args:
            name: The name.
            folder: Absolute path of the folder of the record's file.

        Raises:
            RecordError: if there is no grid of that image, or the name could mean two different images.
        """
        return self._unique_key(self._lookup.find(name, folder))

    def __getitem__(self, key: str) -> NDArray[np.int64]:
        place = self._place(key)
        if place is None:
            raise KeyError(key)
        return self.stores[place.number][place.key]

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._place(key) is not None

    def blocks(self) -> ShardBlocks:
        """The grids of all shards, as `GridStore.blocks` gives those of one folder."""
        return ShardBlocks([path for store in self.stores for path in store.paths])

    def __iter__(self) -> Iterator[str]:
        if len(self.stores) == 1:
            return iter(self.stores[0])
        places = (Place(number, key) for number, store in enumerate(self.stores) for key in store)
        return iter(dict.fromkeys(map(self._unique_key, places)))

    def __len__(self) -> int:
        return len(self.stores[0]) if len(self.stores) == 1 else sum(1 for _ in self)

    def _unique_key(self, place: Place) -> str:
        is_shared = len(self.stores) > 1 and sum(place.key in store for store in self.stores) > 1
        return self._lookup.path(place) if is_shared else place.key

    def _place(self, key: str) -> Place | None:
        """Where the grid of a key is that `_unique_key` made."""
        if len(self.stores) == 1:
            return Place(0, key) if key in self.stores[0] else None
        places = [Place(number, key) for number, store in enumerate(self.stores) if key in store]
        return places[0] if len(places) == 1 else self._lookup.place(key)
