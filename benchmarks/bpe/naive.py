"""Two-dimensional BPE in the plainest way that wastes nothing: numpy, everything counted again for every merge.

It learns what `VisualBPE` learns in pair mode (the same merges), so the benchmark shows what counting again costs.
Regions are kept as two arrays with one entry per cell: the number of the region's first cell, and its token.
"""

import math
from collections import defaultdict

import numpy as np


class Regions:
    """All grids (N, H, W) and the regions that merges have made in them."""

    def __init__(self, grids):
        """Start with every cell as a region of its own."""
        self.shape = grids.shape
        self.token = grids.astype(np.int64).ravel()
        self.anchor = np.arange(self.token.size)
        cells = self.anchor.reshape(self.shape)
        # Every edge between neighbouring cells, as two cells.
        self.edges = np.concatenate(
            [
                np.stack([cells[:, :, :-1].ravel(), cells[:, :, 1:].ravel()], 1),
                np.stack([cells[:, :-1].ravel(), cells[:, 1:].ravel()], 1),
            ]
        )

    def pairs(self):
        """Adjacent regions as anchors (x, y), x before y, ascending, each pair once."""
        ends = np.sort(self.anchor[self.edges], 1)
        keys = np.unique(ends[:, 0] * self.token.size + ends[:, 1])
        x, y = np.divmod(keys, self.token.size)
        return x[x != y], y[x != y]

    def offsets(self, x, y):
        """Rows and columns from x to y."""
        _, _, width = self.shape
        return y // width - x // width, y % width - x % width

    def merge(self, a, b, token):
        """Apply the merge (a, b) → token everywhere."""
        x, y = self.pairs()
        matches = (self.token[x] == a) & (self.token[y] == b)
        merged_anchors, new_anchor = set(), np.arange(self.token.size)
        for p, q in zip(x[matches].tolist(), y[matches].tolist(), strict=True):
            if p not in merged_anchors and q not in merged_anchors:
                merged_anchors |= {p, q}
                self.token[p] = token
                new_anchor[q] = p
        self.anchor = new_anchor[self.anchor]

    def tokens(self):
        """Number of regions in all grids."""
        return int((self.anchor == np.arange(self.anchor.size)).sum())


def train(grids, base_vocab_size, num_merges, alpha=0.3, sigma=1.0, min_frequency=2):
    """Learn merges (a, b) in pair mode; returns them and the regions after the last one."""
    regions = Regions(grids)
    merges = []
    while len(merges) < num_merges:
        x, y = regions.pairs()
        dy, dx = regions.offsets(x, y)
        rows = np.stack([regions.token[x], regions.token[y], dy, dx], 1)
        rows, counts = np.unique(rows, axis=0, return_counts=True)
        histograms = defaultdict(list)
        for (a, b, dy, dx), n in zip(rows.tolist(), counts.tolist(), strict=True):
            histograms[a, b].append((dy, dx, n))
        frequency = {pair: sum(n for *_, n in histogram) for pair, histogram in histograms.items()}
        candidates = [pair for pair in histograms if frequency[pair] >= min_frequency]
        if not candidates:
            break
        max_frequency = max(frequency[pair] for pair in candidates)
        priority = {
            pair: frequency[pair] / max_frequency
            + alpha * consistency(histograms[pair], frequency[pair], sigma)
            for pair in candidates
        }
        a, b = min(candidates, key=lambda pair: (-priority[pair], pair))
        regions.merge(a, b, base_vocab_size + len(merges))
        merges.append((a, b))
    return merges, regions


def consistency(histogram, total, sigma):
    """How well the offsets agree with their mean."""
    mean_y = sum(n * float(dy) for dy, _, n in histogram) / total
    mean_x = sum(n * float(dx) for _, dx, n in histogram) / total
    kernel = 0.0
    for dy, dx, n in histogram:
        y, x = dy - mean_y, dx - mean_x
        kernel += n * math.exp(-(y * y + x * x) / (2.0 * (sigma * sigma)))
    return kernel / total
