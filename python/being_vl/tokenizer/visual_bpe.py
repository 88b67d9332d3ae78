"""`VisualBPE`: byte-pair encoding on two-dimensional grids of VQ ids."""

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, SupportsIndex, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from being_vl import _core
from being_vl._core import BeingVLError, GridError, VocabularyError
from being_vl.files import write_aside
from being_vl.tokenizer.batch import INT32_MAX, EncodedBatch, Regions
from being_vl.tokenizer.integers import check_integer, check_seed, check_threads, training_integers
from being_vl.tokenizer.published import read_published

log = logging.getLogger(__name__)

MergeMode = Literal["pair", "oriented"]


class GridBlocks(Protocol):
    """Many grids in a few long arrays."""

    def blocks(self) -> Sequence[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
        """Blocks of (ids, heights, widths): 1-D integer arrays, the grids one after the other in raster order.

        Each block is read twice, by its index. A sequence may read blocks from a file when they are indexed, so that
        only one is in memory at a time.
        """


Grids = ArrayLike | Iterable[ArrayLike]
"""An (N, H, W) integer array, or (H, W) integer arrays; torch tensors on the CPU are arrays, too."""

MAX_SIDE, MAX_CELLS = 65_535, 2**28


class MergeInfo(NamedTuple):
    """A merge and its statistics when it was chosen; in the progress callback also how far training is."""

    done: int
    """Merges learned so far; this one made token `base_vocab_size + done - 1`."""
    total: int
    """Most merges to learn; training stops earlier when no candidate is left."""
    a: int
    b: int
    dy: int | None
    """Rows from a's anchor down to b's, in oriented mode."""
    dx: int | None
    """Columns from a's anchor right to b's, in oriented mode."""
    n: int
    """Adjacent pairs (a, b) when the merge was chosen (N of the specification)."""
    n_offset: int
    """Number of these pairs at their most frequent offset."""
    s: float
    """Spatial consistency S of the pair, 0 to 1."""
    cells: int | None = None
    """Length of all grids in cells; known while training."""
    tokens: int | None = None
    """Length of all grids in tokens; known while training."""
    elapsed: float | None = None
    """Seconds since training was called; known while training."""


class VisualBPE:
    """A visual BPE vocabulary: learn it with `train` or read it with `load`, then `encode` and `decode` grids.

    Ids 0 to `base_vocab_size - 1` are the quantizer's, the others stand for merges in the order learned. Objects do not
    change, can be pickled, and are equal if the contents of their files are equal.
    """

    def __init__(self, core: _core.Vocabulary) -> None:
        """Not for users: see `train`, `load` and `from_json`."""
        if not isinstance(core, _core.Vocabulary):
            raise TypeError("make a VisualBPE with VisualBPE.train or VisualBPE.load")
        self._core = core

    @classmethod
    def train(
        cls,
        grids: Grids | GridBlocks,
        base_vocab_size: int,
        num_merges: int = 8192,
        merge_mode: MergeMode = "pair",
        alpha: float = 0.3,
        sigma: float = 1.0,
        min_frequency: int = 2,
        num_threads: int | None = None,
        progress: Callable[[MergeInfo], object] | None = None,
        *,
        resume: "VisualBPE | None" = None,
        checkpoint: "Callable[[VisualBPE], object] | None" = None,
        checkpoint_every: int = 1024,
        quantizer_name: str | None = None,
        quantizer_fingerprint: str | None = None,
    ) -> "VisualBPE":
        """Learn merges from grids (Algorithm 1 of Being-VL-0.5).

        Args:
            grids: an (N, H, W) integer array, which may be memory-mapped; or a sequence of (H, W) integer arrays of
                any sizes; or an object with `blocks()`, such as a `GridStore`. They are read in place and copied once.
            base_vocab_size: number of ids in the quantizer's codebook (K); all ids are below it.
            num_merges: most merges to learn; fewer are learned, and a warning logged, if no candidate is left.
            merge_mode: "pair" merges two tokens at any offset. "oriented" merges them at one offset per merge, so
                that every token has a fixed shape and ids alone give back the grid.
            alpha: weight of spatial consistency against relative frequency in a pair's priority, at least 0.
            sigma: width of the kernel of spatial consistency, in cells, above 0.
            min_frequency: least frequency of a pair that is merged, at least 1.
            num_threads: threads to use, by default one per core. The result does not depend on it.
            progress: called with a `MergeInfo` several times a second and after the last merge. An exception in it
                stops the training.
            resume: go on from this vocabulary, learned from the same grids with the same options. The result is that
                of training without a break.
            checkpoint: called with the vocabulary after every `checkpoint_every` merges, after the last one, and when
                Ctrl-C or an exception in `progress` stops the training, before it is raised again.
            checkpoint_every: merges from one call of `checkpoint` to the next, at least 1.
            quantizer_name: name of the quantizer, kept with the vocabulary.
            quantizer_fingerprint: hash of the quantizer's codebook, kept with the vocabulary.

        Raises:
            GridError: a grid of the wrong shape, or an id outside the codebook; names grid, row and column.
            BeingVLError: an option that cannot be used, or a vocabulary to resume from that has other options.
            TypeError, MemoryError: grids that are not integers, or too many, with the bytes and what they are for.
        """
        core = _core.Vocabulary.train(
            grids,
            **training_integers(base_vocab_size, num_merges, min_frequency, num_threads, checkpoint_every),
            merge_mode=merge_mode,
            alpha=alpha,
            sigma=sigma,
            progress=None if progress is None else lambda merge: progress(MergeInfo(**merge)),
            resume=None if resume is None else resume._core,
            checkpoint=None if checkpoint is None else lambda core: checkpoint(cls(core)),
            quantizer_name=quantizer_name,
            quantizer_fingerprint=quantizer_fingerprint,
        )
        _warn_of_fewer_merges(core.num_merges, num_merges, min_frequency)
        return cls(core)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "VisualBPE":
        """Read a vocabulary file and check all of it.

        Raises:
            VocabularyError: not a vocabulary file, or one that is damaged or whose content does not match its checksum;
                says where.
            OSError: a file that cannot be read.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (BeingVLError, UnicodeDecodeError) as error:
            raise VocabularyError(f"{path}: {error}") from None

    @classmethod
    def from_json(cls, text: str) -> "VisualBPE":
        """Read a vocabulary from the text of its file.

        Raises:
            VocabularyError: as `load`.
        """
        return cls(_core.Vocabulary.from_json(text))

    @classmethod
    def load_published(cls, path: str | PathLike[str], base_vocab_size: int = 8192) -> "VisualBPE":
        """Read a vocabulary as Being-VL-0.5 published it: a pickled list of ((a, b), new_id).

        Such files do not tell how they were learned, so alpha is 0 and all counts are 1. Being-VL's own encoder is
        one-dimensional after its first merge, so it joins other regions than `VisualBPE` does with the same merges.

        Raises:
            VocabularyError: a pickle of anything else, which is not executed, or merges that cannot be applied.
            OSError: a file that cannot be read.
        """
        merges = read_published(Path(path))
        for i, (_, token) in enumerate(merges):
            if token != base_vocab_size + i:
                raise VocabularyError(
                    f"{path}: merge {i} makes token {token}, expected {base_vocab_size + i}"
                    f" for a codebook of {base_vocab_size} ids"
                )
        content = json.loads(VisualBPE.train([], base_vocab_size, 0, alpha=0.0, min_frequency=1).to_json())
        del content["checksum"]
        content["num_merges"] = len(merges)
        content["merges"] = [{"a": a, "b": b, "n": 1, "n_offset": 1, "s": 1.0} for (a, b), _ in merges]
        try:
            return cls.from_json(json.dumps(content))
        except VocabularyError as error:
            raise VocabularyError(f"{path}: {error}") from None

    def save(self, path: str | PathLike[str]) -> None:
        """Write the vocabulary to a JSON file, which appears only when it is complete.

        Raises:
            OSError: a file that cannot be written.
        """
        path = Path(path)
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder; expected the name of a file")
        with write_aside(path) as temporary_path:
            temporary_path.write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """The text of the vocabulary's file."""
        return self._core.to_json()

    def truncate(self, num_merges: int) -> "VisualBPE":
        """The vocabulary of the first merges, which is what training learns with this `num_merges`.

        Raises:
            BeingVLError: more merges than there are, or a negative number.
        """
        content = json.loads(self.to_json())
        del content["checksum"]
        content["num_merges"] = check_integer("num_merges", num_merges, 0, self.num_merges)
        del content["merges"][content["num_merges"] :]
        return VisualBPE.from_json(json.dumps(content))

    @overload
    def encode(
        self,
        grid: ArrayLike,
        return_regions: Literal[False] = False,
        *,
        dropout: float = 0.0,
        seed: int | None = None,
    ) -> NDArray[np.uint32]: ...

    @overload
    def encode(
        self, grid: ArrayLike, return_regions: Literal[True], *, dropout: float = 0.0, seed: int | None = None
    ) -> tuple[NDArray[np.uint32], Regions]: ...

    def encode(
        self,
        grid: ArrayLike,
        return_regions: bool = False,
        *,
        dropout: float = 0.0,
        seed: int | None = None,
    ) -> NDArray[np.uint32] | tuple[NDArray[np.uint32], Regions]:
        """Turn a grid into tokens, in raster order of the first cells that they cover.

        Args:
            grid: (H, W) integers.
            return_regions: also return which token covers which cell.
            dropout: probability with which each merge is skipped (BPE-dropout), 0 to 1.
            seed: for dropout, 0 to 2**64 - 1. Same seed, same tokens.

        Returns:
            1-D uint32 tokens; with `return_regions` also their `Regions`.

        Raises:
            GridError: not an (H, W) grid, or an id outside the codebook; names row and column.
            TypeError: not integers.
        """
        ids, planes = self._core.encode(
            grid, regions=return_regions, dropout=dropout, seed=check_seed(dropout, seed)
        )
        return ids if planes is None else (ids, Regions(*planes))

    def encode_batch(
        self,
        grids: Grids,
        num_threads: int | None = None,
        return_regions: bool = False,
        *,
        dropout: float = 0.0,
        seed: int | None = None,
    ) -> EncodedBatch:
        """Turn many grids into tokens, in parallel if there is enough to do.

        Args:
            grids: an (N, H, W) integer array, or a sequence of (H, W) integer arrays of any sizes.
            num_threads: threads to use, by default one per core. The result does not depend on it.
            return_regions: also return which token covers which cell, in `EncodedBatch.regions`.
            dropout: probability with which each merge is skipped (BPE-dropout), 0 to 1.
            seed: for dropout; grid i is encoded as `encode` does with `seed + i`.

        Raises:
            GridError, TypeError: as `encode`; names the grid too.
        """
        values, offsets, planes = self._core.encode_batch(
            grids,
            num_threads=check_threads(num_threads),
            regions=return_regions,
            dropout=dropout,
            seed=check_seed(dropout, seed),
        )
        return EncodedBatch(values, offsets, None if planes is None else [Regions(*pair) for pair in planes])

    def decode(
        self, ids: ArrayLike, height: int, width: int, regions: Regions | None = None
    ) -> NDArray[np.uint32]:
        """Turn the tokens of a grid back into the grid.

        Args:
            ids: 1-D tokens.
            height: rows of the grid.
            width: columns of the grid.
            regions: what `encode(..., return_regions=True)` returned. Needed in pair mode.

        Returns:
            (height, width) uint32.

        Raises:
            GridError: tokens that do not tile the grid, naming the first bad position; regions that are missing or
                belong to other tokens.
        """
        height, width = (check_integer(n, v, 0, INT32_MAX) for n, v in (("height", height), ("width", width)))
        if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE and height * width <= MAX_CELLS):
            raise GridError(
                f"a grid of {height}x{width}: expected at least one cell, at most {MAX_SIDE} rows and columns, "
                f"and at most {MAX_CELLS} cells"
            )
        if regions is None:
            return self._core.decode(ids, height, width, regions=None)
        leaves = getattr(regions, "leaves", None)
        if leaves is None:
            raise GridError(
                "regions without leaves: expected the Regions that encode returned, no slice or result of arithmetic "
                "(an array of indices alone does not tell which cell of a token holds which id)"
            )
        return self._core.decode(ids, height, width, regions=(np.asarray(regions), leaves))

    def decode_batch(
        self,
        batch: EncodedBatch | Iterable[ArrayLike],
        sizes: tuple[int, int] | Iterable[tuple[int, int]],
        regions: Iterable[Regions] | None = None,
    ) -> list[NDArray[np.uint32]]:
        """Turn the tokens of many grids back into the grids.

        Args:
            batch: what `encode_batch` returned, or the 1-D tokens of grid after grid.
            sizes: (height, width) of each grid, or one for all.
            regions: each grid's `Regions`, needed in pair mode; by default those of the batch.

        Returns:
            (height, width) uint32 arrays.

        Raises:
            GridError, TypeError: as `decode`, names the grid; not as many sizes or regions as grids.
        """
        tokens = list(batch)
        if regions is None and isinstance(batch, EncodedBatch):
            regions = batch.regions
        match sizes:
            case (SupportsIndex() as height, SupportsIndex() as width):
                shapes = [(int(height), int(width))] * len(tokens)
            case _:
                shapes = list(sizes)
        all_regions: list[Regions | None] = [None] * len(tokens) if regions is None else list(regions)
        if not len(tokens) == len(shapes) == len(all_regions):
            raise GridError(f"tokens of {len(tokens)} grids, {len(shapes)} sizes, {len(all_regions)} regions")
        grids = []
        for i, (ids, shape, grid_regions) in enumerate(zip(tokens, shapes, all_regions, strict=True)):
            try:
                match shape:
                    case (height, width):
                        grids.append(self.decode(ids, height, width, grid_regions))
                    case _:
                        raise TypeError(f"size {shape!r}, expected (height, width)")
            except (BeingVLError, TypeError) as error:
                raise type(error)(f"grid {i}: {error}") from None
        return grids

    def token_to_cells(self, token: int) -> list[tuple[int, int, int]]:
        """The cells of a token of fixed shape, in raster order.

        Returns:
            (dy, dx, id) of each cell: rows down and columns right from the token's first cell, and the codebook id.

        Raises:
            GridError: no such token, or a merged one in pair mode, where shapes are not fixed.
        """
        return sorted(self._core.token_to_cells(check_integer("token", token, 0, INT32_MAX)))

    def token_shape(self, token: int) -> NDArray[np.bool_]:
        """The shape of a token's region, as a (height, width) array that is true where the region is.

        Raises:
            GridError: as `token_to_cells`.
        """
        cells = np.array(self.token_to_cells(token))[:, :2]
        cells -= cells.min(axis=0)
        shape = np.zeros(cells.max(axis=0) + 1, dtype=np.bool_)
        shape[tuple(cells.T)] = True
        return shape

    @property
    def merges(self) -> list[tuple[int, ...]]:
        """The merges in the order learned: (a, b), or (a, b, dy, dx) in oriented mode."""
        return [
            (a, b) if dy is None or dx is None else (a, b, dy, dx) for a, b, dy, dx, *_ in self._core.merges()
        ]

    @property
    def merge_infos(self) -> list[MergeInfo]:
        """The merges with their statistics at the time they were chosen."""
        total = self.num_merges
        return [MergeInfo(i, total, *merge) for i, merge in enumerate(self._core.merges(), 1)]

    @property
    def base_vocab_size(self) -> int:
        """Number of ids in the quantizer's codebook (K)."""
        return self._core.base_vocab_size

    @property
    def num_merges(self) -> int:
        """Number of merges learned."""
        return self._core.num_merges

    @property
    def vocab_size(self) -> int:
        """Number of tokens: `base_vocab_size + num_merges`."""
        return self.base_vocab_size + self.num_merges

    @property
    def merge_mode(self) -> MergeMode:
        """Either "pair" or "oriented"."""
        return self._core.merge_mode

    @property
    def alpha(self) -> float:
        """Weight of spatial consistency in training."""
        return self._core.alpha

    @property
    def sigma(self) -> float:
        """Width of the kernel of spatial consistency in training, in cells."""
        return self._core.sigma

    @property
    def min_frequency(self) -> int:
        """Least frequency that a pair needed to be merged."""
        return self._core.min_frequency

    @property
    def quantizer_name(self) -> str | None:
        """Name of the quantizer whose ids the merges were learned from."""
        return self._core.quantizer_name

    @property
    def quantizer_fingerprint(self) -> str | None:
        """Hash of the codebook of that quantizer."""
        return self._core.quantizer_fingerprint

    @property
    def grid_sizes(self) -> dict[tuple[int, int], int]:
        """Per (height, width), the number of grids learned from."""
        return {(height, width): grids for height, width, grids in self._core.grid_sizes()}

    @property
    def num_grids(self) -> int:
        """Number of grids learned from."""
        return sum(self.grid_sizes.values())

    def __eq__(self, other: object) -> bool:
        """Whether the contents of the two vocabularies' files are equal."""
        return self._core == other._core if isinstance(other, VisualBPE) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> Any:
        """Pickle by the content of the file."""
        return VisualBPE.from_json, (self.to_json(),)

    def __repr__(self) -> str:
        """The most important options."""
        return (
            f"VisualBPE(base_vocab_size={self.base_vocab_size}, num_merges={self.num_merges}, "
            f"merge_mode={self.merge_mode!r}, alpha={self.alpha}, sigma={self.sigma})"
        )


def _warn_of_fewer_merges(learned: int, num_merges: int, min_frequency: int) -> None:
    """Log a warning if training ended for want of candidates."""
    if learned < num_merges:
        log.warning(
            "no pair is left that occurs %d times: %d merges instead of %d",
            *(min_frequency, learned, num_merges),
        )
