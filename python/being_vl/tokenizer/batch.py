"""What encoding returns: which token covers which cell, and the tokens of many grids."""

import operator
from collections.abc import Iterator
from typing import Any, Self, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, NDArray

from being_vl._core import GridError

INT32_MAX = 2**31 - 1


class Regions(np.ndarray[tuple[int, int], np.dtype[np.int32]]):
    """Which token covers which cell: an (H, W) int32 array of indices into the tokens that `encode` returned.

    In pair mode these indices do not determine the grid: `a b c` in an L can come from more than one arrangement of
    the same token. So the array carries a second one, `leaves`, which decoding needs. Slices and the results of
    arithmetic have no leaves. To store regions, keep both arrays and join them again with `Regions(tokens, leaves)`.
    """

    leaves: NDArray[np.int32] | None
    """(H, W) int32: per cell, the position of its id among its token's ids, which are those of a, then those of b."""

    def __new__(cls, tokens: ArrayLike, leaves: ArrayLike) -> Self:
        """Join the two arrays of one grid, each (H, W).

        Raises:
            GridError: not two arrays of the same size, or numbers that are negative or too large.
            TypeError: not integers.
        """
        regions = to_counts("regions", tokens).view(cls)
        regions.leaves = to_counts("regions.leaves", leaves)
        if regions.ndim != 2 or regions.shape != regions.leaves.shape:
            raise GridError(f"regions of shape {regions.shape} with leaves of shape {regions.leaves.shape}")
        return regions

    def __array_finalize__(self, source: object) -> None:
        """Start views and results without leaves, since they may have other cells."""
        self.leaves = None

    def __reduce__(self) -> Any:
        """Pickle with leaves."""
        if self.leaves is None:
            return np.asarray(self).__reduce__()
        return type(self), (np.asarray(self), self.leaves)


class EncodedBatch:
    """The tokens of many grids, one after the other.

    Attributes:
        values: 1-D uint32, the tokens of grid 0, then of grid 1, and so on.
        offsets: int64 of length n + 1; grid i's tokens are `values[offsets[i]:offsets[i + 1]]`.
        regions: each grid's `Regions`; None unless `return_regions` was true.
    """

    def __init__(
        self, values: NDArray[np.uint32], offsets: NDArray[np.int64], regions: list[Regions] | None = None
    ) -> None:
        """Keep the arrays without copying them."""
        self.values = values
        self.offsets = offsets
        self.regions = regions

    def __len__(self) -> int:
        """Number of grids."""
        return len(self.offsets) - 1

    def __getitem__(self, index: SupportsIndex) -> NDArray[np.uint32]:
        """The tokens of one grid, 1-D uint32, a view."""
        i = range(len(self))[operator.index(index)]
        return self.values[self.offsets[i] : self.offsets[i + 1]]

    def __iter__(self) -> Iterator[NDArray[np.uint32]]:
        """The tokens of grid after grid."""
        return (self[i] for i in range(len(self)))

    def tolist(self) -> list[list[int]]:
        """Each grid's tokens as a list."""
        return [ids.tolist() for ids in self]

    def __repr__(self) -> str:
        """Number of grids and tokens."""
        return f"EncodedBatch({len(self)} grids, {len(self.values)} tokens)"


def to_counts(name: str, values: ArrayLike) -> NDArray[np.int32]:
    """Convert to an int32 array, whose numbers are at least 0.

    Raises:
        GridError: numbers that are negative or too large; not an array.
        TypeError: not integers.
    """
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise GridError(f"{name}: {error}") from None
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers, got dtype {array.dtype}")
    if array.size and not 0 <= array.min() <= array.max() <= INT32_MAX:
        raise GridError(f"{name}: {array.min()} to {array.max()}, expected 0 to {INT32_MAX}")
    return array.astype(np.int32, copy=False)
