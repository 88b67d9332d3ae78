"""Visual BPE the slow way, written from the specification and not from the Rust code.

Everything is counted again for every merge, and encoding applies all merges one after the other.
"""

import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

Cell = tuple[int, int]
MASK = 2**64 - 1


@dataclass
class Merge:
    """A merge (a, b) -> c, at one offset in oriented mode, with its statistics."""

    a: int
    b: int
    offset: Cell | None
    n: int
    n_offset: int
    s: float

    @property
    def key(self) -> tuple[int, ...]:
        """As in `VisualBPE.merges`."""
        return (self.a, self.b, *(self.offset or ()))


class Image:
    """The regions of one grid."""

    def __init__(self, grid):
        """Start with every cell as a region of its own."""
        self.height, self.width = np.shape(grid)
        cells = [(row, column) for row in range(self.height) for column in range(self.width)]
        self.anchor = {cell: cell for cell in cells}
        self.token = {cell: int(grid[cell[0]][cell[1]]) for cell in cells}

    def adjacent(self) -> list[tuple[Cell, Cell]]:
        """Adjacent regions as anchors (x, y), x before y; sorted by x, then y; each pair once."""
        pairs = set()
        for row, column in self.anchor:
            for other in ((row, column + 1), (row + 1, column)):
                if other in self.anchor:
                    x, y = sorted((self.anchor[row, column], self.anchor[other]))
                    if x != y:
                        pairs.add((x, y))
        return sorted(pairs)

    def apply(self, a, b, offset, c, skip=lambda x, y: False):
        """Apply one merge to the pairs as they stand before it."""
        joined_cells = set()
        for x, y in self.adjacent():
            if x in joined_cells or y in joined_cells or (self.token[x], self.token[y]) != (a, b):
                continue
            if offset is not None and offset != (y[0] - x[0], y[1] - x[1]):
                continue
            if skip(x, y):
                continue
            joined_cells |= {x, y}
            self.anchor = {cell: x if anchor == y else anchor for cell, anchor in self.anchor.items()}
            del self.token[y]
            self.token[x] = c

    def ids(self) -> list[int]:
        """Tokens in raster order of anchors."""
        return [self.token[anchor] for anchor in sorted(self.token)]

    def regions(self) -> list[list[int]]:
        """Per cell, the index of its token in `ids`."""
        index = {anchor: i for i, anchor in enumerate(sorted(self.token))}
        return [
            [index[self.anchor[row, column]] for column in range(self.width)] for row in range(self.height)
        ]


def consistency(histogram: dict[Cell, int], sigma: float) -> float:
    """Section 2's S, with sums in ascending order of offsets."""
    total = sum(histogram.values())
    mean_y = mean_x = 0.0
    for dy, dx in sorted(histogram):
        mean_y += histogram[dy, dx] * float(dy)
        mean_x += histogram[dy, dx] * float(dx)
    mean_y, mean_x = mean_y / total, mean_x / total
    s = 0.0
    for dy, dx in sorted(histogram):
        y, x = dy - mean_y, dx - mean_x
        s += histogram[dy, dx] * math.exp(-(y * y + x * x) / (2.0 * (sigma * sigma)))
    return s / total


def train(grids, base_vocab_size, num_merges, merge_mode, alpha, sigma, min_frequency):
    """Learn merges; returns them and the images as they are after the last one."""
    images = [Image(grid) for grid in grids]
    merges: list[Merge] = []
    while len(merges) < num_merges:
        histograms = defaultdict(lambda: defaultdict(int))
        for image in images:
            for x, y in image.adjacent():
                histograms[image.token[x], image.token[y]][y[0] - x[0], y[1] - x[1]] += 1

        candidates = {}
        for pair, histogram in histograms.items():
            n = sum(histogram.values())
            n_offset = max(histogram.values())
            offset = min(o for o in histogram if histogram[o] == n_offset)
            frequency = n if merge_mode == "pair" else n_offset
            if frequency >= min_frequency:
                candidates[pair] = frequency, n, n_offset, offset, consistency(histogram, sigma)
        if not candidates:
            break
        max_frequency = max(frequency for frequency, *_ in candidates.values())

        def priority(pair, candidates=candidates, max_frequency=max_frequency):
            frequency, *_, s = candidates[pair]
            return frequency / max_frequency + alpha * s

        max_priority = max(map(priority, candidates))
        a, b = min(pair for pair in candidates if priority(pair) == max_priority)
        _, n, n_offset, offset, s = candidates[a, b]
        merge = Merge(a, b, offset if merge_mode == "oriented" else None, n, n_offset, s)
        for image in images:
            image.apply(a, b, merge.offset, base_vocab_size + len(merges))
        merges.append(merge)
    return merges, images


def encode(grid, merges, base_vocab_size, dropout=0.0, seed=0) -> Image:
    """Apply all merges in the order learned."""
    image = Image(grid)
    for i, merge in enumerate(merges):

        def skip(x, y, i=i):
            return coin(seed, i, *(row * image.width + column for row, column in (x, y))) < dropout

        image.apply(merge.a, merge.b, merge.offset, base_vocab_size + i, skip)
    return image


def coin(seed, merge, x, y) -> float:
    """The uniform number in [0, 1) that decides on dropping a merge: SplitMix64 of what identifies it."""
    state = mix(seed)
    for part in (merge, x, y):
        state = mix(state ^ part)
    return (state >> 11) / 2**53


def mix(state) -> int:
    """One step of SplitMix64."""
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)
