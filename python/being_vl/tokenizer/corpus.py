"""The grids that a vocabulary is learned from, block by block, and the part of them that is held out."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, overload

import numpy as np
from numpy.typing import NDArray

from being_vl.errors import ConfigError, GridError
from being_vl.options import StrPath

if TYPE_CHECKING:
    from being_vl.shards.grids import Block, GridStore

BLOCK_CELLS = 1 << 22
"""About how many cells of an array make a block."""


class LazyBlock(NamedTuple):
    """A block that is read when it is asked for, and where it comes from."""

    load: Callable[[], "Block"]
    num_grids: int
    """Grids in it."""
    path: Path
    first_grid: int
    """Index in the file of its first grid."""


class Corpus(Sequence["Block"]):
    """Grids in blocks, which are read when they are asked for: views of mapped files, or copies of one at a time."""

    def __init__(self, blocks: Iterable[LazyBlock]) -> None:
        self._blocks = list(blocks)

    def blocks(self) -> Self:
        """What `VisualBPE.train` asks for."""
        return self

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self._blocks)

    @overload
    def __getitem__(self, index: int) -> "Block": ...

    @overload
    def __getitem__(self, index: slice) -> "Corpus": ...

    def __getitem__(self, index: int | slice) -> "Block | Corpus":
        """One block, or some of them."""
        return Corpus(self._blocks[index]) if isinstance(index, slice) else self._blocks[index].load()

    def summarize(self, codebook_size: int) -> "CorpusSummary":
        """Read all grids once: check their ids, count them, and take their fingerprint.

        Raises:
            GridError: if an id is not in the codebook; names file, grid, row, column and value.
        """
        sizes: Counter[tuple[int, int]] = Counter()
        checksum = hashlib.sha256()
        for lazy_block in self._blocks:
            ids, heights, widths = block = lazy_block.load()
            _check(lazy_block, block, codebook_size)
            sizes += count_sizes(block)
            for array in (heights.astype("<i8"), widths.astype("<i8"), ids):
                checksum.update(np.ascontiguousarray(array).data)
        return CorpusSummary(sizes, checksum.hexdigest())

    def select(self, mask: NDArray[np.bool_]) -> "Corpus":
        """The grids at which `mask` is true; it has one entry for every grid."""
        blocks, start = [], 0
        for block in self._blocks:
            selection = mask[start : start + block.num_grids]
            if selection.any():
                load = partial(_select_grids, block.load, selection)
                blocks.append(block._replace(load=load, num_grids=int(selection.sum())))
            start += block.num_grids
        return Corpus(blocks)


class CorpusSummary(NamedTuple):
    """What a corpus holds."""

    sizes: "Counter[tuple[int, int]]"
    """Height and width → how many grids have them."""
    fingerprint: str
    """SHA-256 of all sizes and ids, in their order and as wide as they are stored."""

    @property
    def grids(self) -> int:
        """Number of grids."""
        return self.sizes.total()

    @property
    def cells(self) -> int:
        """Number of cells of all grids."""
        return sum(height * width * count for (height, width), count in self.sizes.items())


def count_sizes(block: "Block") -> Counter[tuple[int, int]]:
    """Height and width → how many grids of a block have them."""
    _, heights, widths = block
    sizes, counts = np.unique(np.stack([heights, widths]), axis=1, return_counts=True)
    return Counter(
        {(height, width): n for (height, width), n in zip(sizes.T.tolist(), counts.tolist(), strict=True)}
    )


def describe_sizes(sizes: Counter[tuple[int, int]]) -> str:
    """How many grids have which size, the five most frequent ones, such as `2,000 of 32x32 and 3 of 8x9`.

    If no grid has neighbours in one direction, a warning follows: an array (N, 1, L) is a list of rows, not of images.
    """
    names = [f"{count:,} of {height}x{width}" for (height, width), count in sizes.most_common()]
    text = ", ".join(names[:5])
    if len(names) > 5:
        text += f" and {len(names) - 5} other size{'s' * (len(names) > 6)}"
    for axis, neighbours in enumerate(("below each other", "beside each other")):
        if sizes and all(size[axis] == 1 for size in sizes):
            text += f"; no cells lie {neighbours}: is that an array (N, height, width)?"
    return text


@dataclass(frozen=True)
class GridSource:
    """Grids of one codebook, out of one or more files.

    Args:
        corpus: All of them.
        codebook_size: Ids are below it.
        quantizer_name: Name of the quantizer, if it is known.
        quantizer_fingerprint: Its fingerprint, if it is known.
    """

    corpus: Corpus
    codebook_size: int
    quantizer_name: str | None = None
    quantizer_fingerprint: str | None = None


def open_grids(paths: Sequence[StrPath], codebook_size: int | None) -> GridSource:
    """Open folders that `being-vl quantize` wrote, or .npy and .npz files.

    Raises:
        GridError, ManifestError: if one of them cannot be read.
        QuantizerError: if folders are of different quantizers, naming both.
        ConfigError: if folders and arrays are mixed, or the codebook's size is missing or another one.
    """
    # Arrays do not say which quantizer made them, so its number of ids must be given.
    locations = [Path(path) for path in paths]
    folders = [path for path in locations if path.is_dir()]
    if not folders:
        if codebook_size is None:
            raise ConfigError(f"{locations[0]}: give codebook_size, the number of ids of its quantizer")
        return GridSource(Corpus(block for path in locations for block in _array_blocks(path)), codebook_size)
    if len(folders) < len(locations):
        array_path = next(path for path in locations if path not in folders)
        raise ConfigError(
            f"{array_path}: an array does not say which quantizer made it, so it cannot be joined to {folders[0]}"
        )
    from being_vl.shards.grids import Grids

    grids = Grids.open(folders)
    if codebook_size not in (None, grids.codebook_size):
        raise ConfigError(
            f"{folders[0]}: made with a codebook of {grids.codebook_size}, but codebook_size is {codebook_size}"
        )
    corpus = Corpus(block for store in grids.stores for block in _store_blocks(store))
    if not len(corpus):
        raise GridError(f"{', '.join(map(str, folders))}: no grid")
    return GridSource(corpus, grids.codebook_size, grids.quantizer_name, grids.quantizer_fingerprint)


def choose_held_out(count: int, share: float, every: int | None, seed: int) -> NDArray[np.bool_]:
    """Which of `count` grids are held out: a share drawn with a seed, or every n-th.

    Raises:
        ConfigError: if that is none of them, though some were asked for, or all.
    """
    mask = np.zeros(count, bool)
    if every:
        mask[every - 1 :: every] = True
    elif share:
        # The raw output of a bit generator, so that every version of numpy draws the same.
        order = np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")
        mask[order[: round(share * count)]] = True
    if (share or every) and (not mask.any() or mask.all()):
        option = f"held_out_every = {every}" if every else f"held_out = {share:g}"
        raise ConfigError(f"{option} of {count} grids is {'all' if mask.any() else 'none'} of them")
    return mask


def split_block(block: "Block") -> NDArray[np.integer[Any]] | list[NDArray[np.integer[Any]]]:
    """A block's grids as `VisualBPE.encode_batch` takes them: an (N, H, W) array if all have one size, else a list."""
    ids, heights, widths = block
    if np.ptp(heights) == 0 and np.ptp(widths) == 0:
        return ids.reshape(-1, heights[0], widths[0])
    offsets = _grid_offsets(block)
    extents = zip(offsets, offsets[1:], heights, widths, strict=False)
    return [ids[start:stop].reshape(height, width) for start, stop, height, width in extents]


def _array_blocks(path: Path) -> Iterator[LazyBlock]:
    array = _read_array(path)
    n, height, width = array.shape
    heights, widths = np.full(n, height), np.full(n, width)
    step = max(1, BLOCK_CELLS // (height * width))

    def load_block(start: int) -> "Block":
        # Mapped again for each block, so that the pages of earlier ones do not fill up the process.
        grids = np.load(path, mmap_mode="r") if isinstance(array, np.memmap) else array
        stop = start + step
        return grids[start:stop].reshape(-1), heights[start:stop], widths[start:stop]

    return (
        LazyBlock(partial(load_block, start), min(step, n - start), path, start)
        for start in range(0, n, step)
    )


def _read_array(path: Path) -> NDArray[np.integer[Any]]:
    """An (N, H, W) array of integers; a .npy file is mapped into memory."""
    expectation = "expected a folder of grids, or a .npy or .npz file with an integer array (N, H, W)"
    try:
        content = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(content, np.lib.npyio.NpzFile):
            if "grids" not in content:
                names = ", ".join(map(repr, content.files)) or "nothing"
                raise GridError(f"{path}: holds {names}, expected an array named 'grids'")
            content = content["grids"]
    except GridError:
        raise
    except FileNotFoundError:
        raise GridError(f"{path}: no such file or folder; {expectation}") from None
    except Exception as error:  # damaged archives raise almost anything
        if "allow_pickle" in str(error) or "Python objects" in str(error):
            problem = (
                "holds Python objects (rows or grids of different lengths, or a pickle), which are not read"
            )
        else:
            problem = f"cannot be read ({error})"
        raise GridError(f"{path}: {problem}; {expectation}") from None
    array: NDArray[np.integer[Any]] = content
    _check_array(path, array)
    return array


def _check_array(path: Path, array: NDArray[Any]) -> None:
    if array.ndim != 3:
        hint = "; a single grid is array[None]" if array.ndim == 2 else ""
        raise GridError(f"{path}: an array of shape {array.shape}; expected (N, H, W){hint}")
    if not array.size:
        raise GridError(f"{path}: an empty array of shape {array.shape}")
    if array.dtype.kind not in "iu":
        raise GridError(
            f"{path}: expected integers, found dtype {array.dtype} ({_describe_non_integer(array)})"
        )


def _describe_non_integer(array: NDArray[Any]) -> str:
    """The first value that is no integer and where it is; the very first value if all are whole numbers."""
    place = (0, 0, 0)
    if array.dtype.kind == "f":
        for i, grid in enumerate(array):
            fractions = np.argwhere(~np.isfinite(grid) | (grid != np.floor(grid)))
            if len(fractions):
                place = i, *fractions[0]
                break
    return "grid {}, row {}, column {} holds {}".format(*place, array[place])


def _store_blocks(store: "GridStore") -> Iterator[LazyBlock]:
    blocks, first_grid = store.blocks(), 0
    for n, (_, heights, _) in enumerate(blocks):
        if len(heights):  # none of a file's images may have been readable
            yield LazyBlock(partial(blocks.__getitem__, n), len(heights), store.folder, first_grid)
        first_grid += len(heights)


def _grid_offsets(block: "Block") -> NDArray[np.int64]:
    """(number of grids + 1,): where each grid's ids begin, and where the last one's end."""
    _, heights, widths = block
    return np.concatenate([[0], np.cumsum(heights.astype(np.int64) * widths)])


def _select_grids(load: Callable[[], "Block"], mask: NDArray[np.bool_]) -> "Block":
    """The grids of a block at which `mask` is true: a view if they are neighbours, else a copy."""
    ids, heights, widths = block = load()
    # Neighbours are cut out together, from the first of them to behind the last.
    offsets = _grid_offsets(block)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]])))
    runs = [ids[offsets[run_start] : offsets[end]] for run_start, end in edges.reshape(-1, 2)]
    return runs[0] if len(runs) == 1 else np.concatenate(runs), heights[mask], widths[mask]


def _check(lazy_block: LazyBlock, block: "Block", codebook_size: int) -> None:
    """Make sure that a block's ids are in the codebook.

    Raises:
        GridError: if one is not; names file, grid, row, column and value.
    """
    ids, _, widths = block
    if not ids.size or (ids.min() >= 0 and ids.max() < codebook_size):
        return
    # Find the first id that is not, and the grid, row and column that it stands in.
    position = int(np.argmax((ids < 0) | (ids >= codebook_size)))
    offsets = _grid_offsets(block)
    grid = int(np.searchsorted(offsets, position, side="right")) - 1
    row, column = divmod(position - int(offsets[grid]), int(widths[grid]))
    raise GridError(
        f"{lazy_block.path}: grid {lazy_block.first_grid + grid}, row {row}, column {column}: id {ids[position]} is "
        f"not in the codebook, expected 0 to {codebook_size - 1}"
    )
