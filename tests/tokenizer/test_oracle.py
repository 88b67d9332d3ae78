"""`VisualBPE` agrees with the oracle to the last id."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from being_vl import VisualBPE
from helpers import oracle
from helpers.photos import PHOTOS, PHOTOS_K


def random_grids(rng, k):
    """One to five small grids or a large one: noise, patches of equal ids, or stripes."""
    grids = []
    is_large = rng.random() < 0.05
    for _ in range(1 if is_large else rng.integers(1, 6)):
        height, width = rng.integers(1, 41 if is_large else 13, 2)
        kind = rng.integers(4)
        grid = rng.integers(0, k, (height, width))
        if kind == 0:
            grid = np.kron(grid, np.ones((3, 2), int))[:height, :width]
        elif kind == 1:
            grid = np.where(rng.random((height, width)) < 0.8, grid[:1, :1], grid)
        elif kind == 2:
            grid = np.broadcast_to(grid[:, :1], (height, width))
        grids.append(grid)
    return grids


def check(grids, k, num_merges, mode, alpha, sigma, min_frequency, threads):
    """Compare merges, statistics, final states and the encoding of the training grids; returns both sides."""
    merges, images = oracle.train(grids, k, num_merges, mode, alpha, sigma, min_frequency)
    bpe = VisualBPE.train(grids, k, num_merges, mode, alpha, sigma, min_frequency, threads)
    assert bpe.merges == [merge.key for merge in merges]
    assert [(i.n, i.n_offset, i.s) for i in bpe.merge_infos] == [(m.n, m.n_offset, m.s) for m in merges]
    for grid, image in zip(grids, images, strict=True):
        ids, regions = bpe.encode(grid, return_regions=True)
        assert ids.tolist() == image.ids()
        assert regions.tolist() == image.regions()
    return bpe, merges


@pytest.mark.parametrize("block", range(10))
def test_random_grids(block):
    rng = np.random.default_rng(block)
    for _ in range(30):
        k = int(rng.choice([1, 2, 3, 5, 30]))
        mode = str(rng.choice(["pair", "oriented"]))
        alpha = float(rng.choice([0, 0.1, 0.3, 1, 5]))
        sigma = float(rng.choice([0.4, 1, 3]))
        frequency, num_merges, threads = (int(n) for n in rng.integers((1, 0, 1), (5, 30, 5)))
        bpe, merges = check(random_grids(rng, k), k, num_merges, mode, alpha, sigma, frequency, threads)
        for grid in random_grids(rng, k):
            assert bpe.encode(grid).tolist() == oracle.encode(grid, merges, k).ids()
            ids = oracle.encode(grid, merges, k, dropout=0.3, seed=block).ids()
            assert bpe.encode(grid, dropout=0.3, seed=block).tolist() == ids


TINY = st.integers(1, 3).flatmap(
    lambda k: st.tuples(
        st.just(k),
        st.lists(
            npst.arrays(
                np.uint8,
                npst.array_shapes(min_dims=2, max_dims=2, max_side=6),
                elements=st.integers(0, k - 1),
            ),
            min_size=1,
            max_size=4,
        ),
    )
)


@given(
    case=TINY,
    mode=st.sampled_from(["pair", "oriented"]),
    alpha=st.sampled_from([0, 0.1, 0.3, 1, 5]),
    sigma=st.sampled_from([0.4, 1, 3]),
    min_frequency=st.integers(1, 3),
    threads=st.integers(1, 4),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=300, deadline=None)
def test_dense_ties(case, mode, alpha, sigma, min_frequency, threads, order):
    """Few ids and tiny grids, where nearly every choice is a tie; the order of the grids does not matter."""
    k, grids = case
    bpe, _ = check(grids, k, 20, mode, alpha, sigma, min_frequency, threads)
    order.shuffle(grids)
    assert VisualBPE.train(grids, k, 20, mode, alpha, sigma, min_frequency, 1).merges == bpe.merges
    if mode == "oriented":
        for grid in (*grids, grids[0].T):
            assert np.array_equal(bpe.decode(bpe.encode(grid), *grid.shape), grid)


@pytest.mark.parametrize("mode", ["pair", "oriented"])
@pytest.mark.parametrize(("alpha", "threads"), [(0, 1), (0.3, 2)])
def test_photo_grids(mode, alpha, threads):
    grids = PHOTOS[:6, :24, :28]
    bpe, merges = check(grids, PHOTOS_K, 40, mode, alpha, 1.0, 2, threads)
    grid = PHOTOS[-1]
    assert bpe.encode(grid).tolist() == oracle.encode(grid, merges, PHOTOS_K).ids()


@pytest.mark.parametrize("mode", ["pair", "oriented"])
def test_first_merges_by_hand(mode):
    """0 0 over 0 0: four pairs (0, 0), two to the right and two below, of which two merge."""
    bpe = VisualBPE.train(np.zeros((1, 2, 2), int), 1, 8, mode, alpha=0.0, min_frequency=1)
    if mode == "pair":
        assert bpe.merges == [(0, 0), (1, 1)]
    else:
        assert bpe.merges == [(0, 0, 0, 1), (1, 1, 1, 0)]
    first = bpe.merge_infos[0]
    assert (first.n, first.n_offset, first.s) == (4, 2, pytest.approx(np.exp(-0.25)))
    assert bpe.encode([[0, 0], [0, 0]]).tolist() == [2]
