"""The grids that a vocabulary is learned from, block by block, and the part of them that is held out."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, overload

import numpy as np
from numpy.typing import NDArray

from being_vl.errors import ConfigError, GridError

if TYPE_CHECKING:
    from being_vl.shards.grids import Block, GridStore

BLOCK_CELLS = 1 << 22
"""About how many cells of an array make a block."""


class Part(NamedTuple):
    """A block that is made when it is asked for, and where it comes from."""

    make: Callable[[], "Block"]
    grids: int
    """How many it has."""
    path: Path
    first: int
    """Index in the file of its first grid."""


class Corpus(Sequence["Block"]):
    """Grids in blocks, which are made when they are asked for: views of mapped files, or copies of one at a time."""

    def __init__(self, parts: Iterable[Part]) -> None:
        self._parts = list(parts)

    def blocks(self) -> Self:
        """What `VisualBPE.train` asks for."""
        return self

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self._parts)

    @overload
    def __getitem__(self, index: int) -> "Block": ...

    @overload
    def __getitem__(self, index: slice) -> "Corpus": ...

    def __getitem__(self, index: int | slice) -> "Block | Corpus":
        """One block, or some of them."""
        return Corpus(self._parts[index]) if isinstance(index, slice) else self._parts[index].make()

    def check(self, codebook_size: int) -> "Census":
        """Read all grids once: check their ids, count them, and take their fingerprint.

        Raises:
            GridError: what is no grid of such ids; names file, grid, row, column and value.
        """
        grids = cells = 0
        digest = hashlib.sha256()
        for part in self._parts:
            ids, heights, widths = block = part.make()
            _check(part, block, codebook_size)
            grids += len(heights)
            cells += ids.size
            for array in (heights.astype("<i8"), widths.astype("<i8"), ids):
                digest.update(np.ascontiguousarray(array).data)
        return Census(grids, cells, digest.hexdigest())

    def select(self, chosen: NDArray[np.bool_]) -> "Corpus":
        """The grids at which `chosen` is true; it has one entry for every grid."""
        parts, start = [], 0
        for part in self._parts:
            here = chosen[start : start + part.grids]
            if here.any():
                parts.append(part._replace(make=partial(_take, part.make, here), grids=int(here.sum())))
            start += part.grids
        return Corpus(parts)


class Census(NamedTuple):
    """What a corpus holds."""

    grids: int
    cells: int
    fingerprint: str
    """SHA-256 of all sizes and ids, in their order and as wide as they are stored."""


@dataclass(frozen=True)
class Source:
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


def open_source(paths: Sequence[Path], codebook_size: int | None) -> Source:
    """Open folders that `being-vl quantize` wrote, or .npy and .npz files.

    Raises:
        GridError, ManifestError: if one of them cannot be read.
        ConfigError: if they do not belong together, or the codebook's size is missing or another one.
    """
    folders = [path for path in paths if path.is_dir()]
    if not folders:
        if codebook_size is None:
            raise ConfigError(f"{paths[0]}: give base_vocab_size, the size of its codebook")
        return Source(Corpus(part for path in paths for part in _array_parts(path)), codebook_size)
    if len(folders) < len(paths):
        other = next(path for path in paths if path not in folders)
        raise ConfigError(
            f"{other}: an array does not say which quantizer made it, so it cannot be joined to {folders[0]}"
        )
    from being_vl.shards.grids import GridStore

    stores = [GridStore.open(folder) for folder in folders]
    first = stores[0]
    for folder, store in zip(folders, stores, strict=True):
        if store.quantizer_fingerprint != first.quantizer_fingerprint:
            raise ConfigError(
                f"{folder}: made by quantizer {store.quantizer_name!r} ({store.quantizer_fingerprint[:12]}), but "
                f"{folders[0]} by {first.quantizer_name!r} ({first.quantizer_fingerprint[:12]})"
            )
    if codebook_size not in (None, first.codebook_size):
        raise ConfigError(
            f"{folders[0]}: codebook size {first.codebook_size}, but base_vocab_size {codebook_size}"
        )
    corpus = Corpus(part for pair in zip(folders, stores, strict=True) for part in _store_parts(*pair))
    if not len(corpus):
        raise GridError(f"{', '.join(map(str, folders))}: no grid")
    return Source(corpus, first.codebook_size, first.quantizer_name, first.quantizer_fingerprint)


def held_out(count: int, share: float, every: int | None, seed: int) -> NDArray[np.bool_]:
    """Which of `count` grids are held out: a share drawn with a seed, or every n-th.

    Raises:
        ConfigError: if that is none of them, though some were asked for, or all.
    """
    chosen = np.zeros(count, bool)
    if every:
        chosen[every - 1 :: every] = True
    elif share:
        # The raw output of a bit generator, so that every version of numpy draws the same.
        order = np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")
        chosen[order[: round(share * count)]] = True
    if (share or every) and (not chosen.any() or chosen.all()):
        option = f"held_out_every = {every}" if every else f"held_out = {share:g}"
        raise ConfigError(f"{option} of {count} grids is {'all' if chosen.any() else 'none'} of them")
    return chosen


def grids_of(block: "Block") -> NDArray[np.integer[Any]] | list[NDArray[np.integer[Any]]]:
    """A block's grids as `VisualBPE.encode_batch` takes them: an (N, H, W) array if all have one size, else a list."""
    ids, heights, widths = block
    if np.ptp(heights) == 0 and np.ptp(widths) == 0:
        return ids.reshape(-1, heights[0], widths[0])
    starts = _starts(block)
    places = zip(starts, starts[1:], heights, widths, strict=False)
    return [ids[start:stop].reshape(height, width) for start, stop, height, width in places]


def _array_parts(path: Path) -> Iterator[Part]:
    array = _read_array(path)
    n, height, width = array.shape
    heights, widths = np.full(n, height), np.full(n, width)
    step = max(1, BLOCK_CELLS // (height * width))

    def make(start: int) -> "Block":
        # Mapped anew for each block, so that the pages of those before do not fill up the process.
        grids = np.load(path, mmap_mode="r") if isinstance(array, np.memmap) else array
        stop = start + step
        return grids[start:stop].reshape(-1), heights[start:stop], widths[start:stop]

    return (Part(partial(make, start), min(step, n - start), path, start) for start in range(0, n, step))


def _read_array(path: Path) -> NDArray[np.integer[Any]]:
    """An (N, H, W) array of integers; a .npy file is mapped into memory."""
    expected = "expected a folder of grids, or a .npy or .npz file with an integer array (N, H, W)"
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(loaded, np.lib.npyio.NpzFile):
            if "grids" not in loaded:
                names = ", ".join(map(repr, loaded.files)) or "nothing"
                raise GridError(f"{path}: holds {names}, expected an array named 'grids'")
            loaded = loaded["grids"]
    except GridError:
        raise
    except FileNotFoundError:
        raise GridError(f"{path}: no such file or folder; {expected}") from None
    except Exception as error:  # damaged archives raise almost anything
        if "allow_pickle" in str(error) or "Python objects" in str(error):
            problem = (
                "holds Python objects (rows or grids of different lengths, or a pickle), which are not read"
            )
        else:
            problem = f"cannot be read ({error})"
        raise GridError(f"{path}: {problem}; {expected}") from None
    array: NDArray[np.integer[Any]] = loaded
    if array.ndim != 3:
        hint = "; a single grid is array[None]" if array.ndim == 2 else ""
        raise GridError(f"{path}: an array of shape {array.shape}; expected (N, H, W){hint}")
    if not array.size:
        raise GridError(f"{path}: an empty array of shape {array.shape}")
    if array.dtype.kind not in "iu":
        raise GridError(f"{path}: expected integers, got dtype {array.dtype} ({_not_an_integer(array)})")
    return array


def _not_an_integer(array: NDArray[Any]) -> str:
    """The first value that is none and where it is; the very first if all are whole numbers."""
    place = (0, 0, 0)
    if array.dtype.kind == "f":
        for i, grid in enumerate(array):
            wrong = np.argwhere(~np.isfinite(grid) | (grid != np.floor(grid)))
            if len(wrong):
                place = i, *wrong[0]
                break
    return "grid {}, row {}, column {} holds {}".format(*place, array[place])


def _store_parts(folder: Path, store: "GridStore") -> Iterator[Part]:
    blocks, first = store.blocks(), 0
    for n, (_, heights, _) in enumerate(blocks):
        if len(heights):  # none of a file's images may have been readable
            yield Part(partial(blocks.__getitem__, n), len(heights), folder, first)
        first += len(heights)


def _starts(block: "Block") -> NDArray[np.int64]:
    """Where each grid's ids begin, and where the last one's end."""
    _, heights, widths = block
    return np.concatenate([[0], np.cumsum(heights.astype(np.int64) * widths)])


def _take(make: Callable[[], "Block"], chosen: NDArray[np.bool_]) -> "Block":
    """The chosen grids of a block: a view if they stand together, else a copy."""
    ids, heights, widths = block = make()
    starts = _starts(block)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]])))
    runs = [ids[starts[begin] : starts[end]] for begin, end in edges.reshape(-1, 2)]
    return runs[0] if len(runs) == 1 else np.concatenate(runs), heights[chosen], widths[chosen]


def _check(part: Part, block: "Block", codebook_size: int) -> None:
    """Make sure that a block's ids are in the codebook.

    Raises:
        GridError: if one is not; names file, grid, row, column and value.
    """
    ids, _, widths = block
    if not ids.size or (ids.min() >= 0 and ids.max() < codebook_size):
        return
    position = int(np.argmax((ids < 0) | (ids >= codebook_size)))
    starts = _starts(block)
    grid = int(np.searchsorted(starts, position, side="right")) - 1
    row, column = divmod(position - int(starts[grid]), int(widths[grid]))
    raise GridError(
        f"{part.path}: grid {part.first + grid}, row {row}, column {column}: id {ids[position]} is not in the "
        f"codebook, expected 0 to {codebook_size - 1}"
    )
