"""Batches of grids in and out: any array, any threads, any process; lists, ragged arrays, regions, shapes."""

import json
import multiprocessing
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from being_vl import VisualBPE
from being_vl.errors import GridError
from helpers import oracle
from helpers.photos import PHOTOS
from helpers.photos import PHOTOS_K as K

MODES = ("pair", "oriented")


@st.composite
def textures(draw, k):
    """Grids of few ids: noise, patches, and stripes."""
    height, width = draw(st.integers(1, 14)), draw(st.integers(1, 14))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    grid = rng.integers(0, k, (height, width))
    kind = draw(st.sampled_from(["noise", "patches", "rows", "columns", "nearly blank"]))
    if kind == "patches":
        grid = np.kron(grid, np.ones((2, 3), int))[:height, :width]
    elif kind == "rows":
        grid[:] = grid[:, :1]
    elif kind == "columns":
        grid[:] = grid[:1]
    elif kind == "nearly blank":
        grid[rng.random(grid.shape) < 0.9] = 0
    return grid


@given(data=st.data(), mode=st.sampled_from(MODES), k=st.sampled_from([1, 2, 4]))
@settings(max_examples=150, deadline=None)
def test_batches_equal_merge_after_merge(data, mode, k):
    """Unseen grids of several sizes one after the other, with dropout or without, give what the oracle gives."""
    training_grids = data.draw(st.lists(textures(k), min_size=1, max_size=4))
    other_grids = data.draw(st.lists(textures(k), min_size=1, max_size=4))
    dropout = data.draw(st.sampled_from([0.0, 0.0, 0.3]))
    bpe = VisualBPE.train(training_grids, k, 40, mode, min_frequency=1, num_threads=1)
    merges = [oracle.Merge(m[0], m[1], m[2:] or None, 0, 0, 0.0) for m in bpe.merges]
    batch = bpe.encode_batch(other_grids, 1, return_regions=True, dropout=dropout, seed=7)
    for i, grid in enumerate(other_grids):
        image = oracle.encode(grid, merges, k, dropout, 7 + i)
        assert batch[i].tolist() == image.ids()
        assert batch.regions[i].tolist() == image.regions()
    for decoded_grid, grid in zip(
        bpe.decode_batch(batch, [g.shape for g in other_grids]), other_grids, strict=True
    ):
        assert np.array_equal(decoded_grid, grid)


def test_blocks_are_seamless(bpe):
    """More cells than are copied at a time: the same tokens, seeds and indices as grid by grid."""
    grids = np.concatenate([PHOTOS] * 25)[:1100]
    assert grids.size > 1 << 20
    tokens = bpe.encode_batch(PHOTOS)
    for container in (grids, list(grids), iter(grids)):
        batch = bpe.encode_batch(container, 2)
        assert len(batch) == 1100
        assert all(np.array_equal(ids, tokens[i % len(PHOTOS)]) for i, ids in enumerate(batch))
    batch = bpe.encode_batch(grids, 2, dropout=0.3, seed=2**64 - 5, return_regions=True)
    for i in (0, 4, 5, 1023, 1024, 1099):
        ids, regions = bpe.encode(grids[i], True, dropout=0.3, seed=(2**64 - 5 + i) % 2**64)
        assert np.array_equal(batch[i], ids)
        assert np.array_equal(batch.regions[i], regions)
    grids = grids.astype(np.int64)
    grids[1050, 3, 4] = -7
    for container in (grids, iter(grids)):
        with pytest.raises(GridError, match="grid 1050, row 3, column 4: id -7 "):
            bpe.encode_batch(container)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_an_iterable_that_fails(bpe, threads):
    """Its exception comes out, however many blocks are under way; of several grids with a fault the first is named."""

    def raise_error():
        yield from [*PHOTOS] * 4
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        bpe.encode_batch(raise_error(), threads)
    grids = np.concatenate([PHOTOS] * 8).astype(np.int16)
    grids[[100, 200, 300], 7, 31] = -1, -2, -3
    for container in (grids, list(grids)):
        with pytest.raises(GridError, match="grid 100, row 7, column 31: id -1 "):
            bpe.encode_batch(container, threads)


def test_dropout_is_the_same_for_any_number_of_threads(bpe):
    batch1, batch2, batch3 = (bpe.encode_batch(PHOTOS, n, dropout=0.1, seed=3) for n in (1, 2, 3))
    assert batch1.tolist() == batch2.tolist() == batch3.tolist()
    assert batch1.tolist() != bpe.encode_batch(PHOTOS).tolist()


def test_lists(bpe):
    batch = bpe.encode_batch(PHOTOS[:3])
    assert batch.tolist() == [bpe.encode(grid).tolist() for grid in PHOTOS[:3]]
    assert bpe.encode_batch([]).tolist() == []


def test_several_python_threads_at_once(vocabularies):
    """Two vocabularies and several sizes in turn, on threads that take over each other's memory."""
    sizes = [(32, 32), (5, 32), (32, 1), (17, 23)]
    jobs = [(bpe, PHOTOS[i, :h, :w]) for bpe in vocabularies.values() for i, (h, w) in enumerate(sizes * 3)]
    expected = [bpe.encode_batch([grid]).tolist() for bpe, grid in jobs]
    results = [[] for _ in range(4)]

    def encode(result):
        for _ in range(20):
            result.append([bpe.encode(grid).tolist() for bpe, grid in jobs])

    threads = [threading.Thread(target=encode, args=(result,)) for result in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[[ids for [ids] in expected]] * 20] * 4


def _lengths(bpe):
    return [len(ids) for ids in bpe.encode_batch(PHOTOS, num_threads=2)]


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_fork_in_the_middle_of_encoding(bpe):
    """Processes forked while another thread encodes can encode."""
    stop = threading.Event()

    def encode():
        while not stop.is_set():
            bpe.encode_batch(PHOTOS, num_threads=2)

    thread = threading.Thread(target=encode)
    thread.start()
    try:
        for _ in range(3):
            with multiprocessing.get_context("fork").Pool(1) as pool:
                assert pool.apply_async(_lengths, [bpe]).get(timeout=60) == _lengths(bpe)
    finally:
        stop.set()
        thread.join()


def test_large_grids(vocabularies):
    """Long sides, and areas of one token: decoding gives the grid back."""
    for grid in (
        np.tile(PHOTOS[0][:1], (1, 2047))[:, :65_500],
        np.tile(PHOTOS[0][:, :1], (2047, 1))[:65_500],
        np.zeros((256, 256), np.uint8),
        np.tile([3, 8], (256, 128)),
        np.tile([[3], [8]], (128, 256)),
    ):
        vocabularies_of_grid = [VisualBPE.train([grid], K, 60, mode, num_threads=1) for mode in MODES]
        for bpe in [*vocabularies.values(), *vocabularies_of_grid]:
            batch = bpe.encode_batch([grid], return_regions=True)
            assert np.array_equal(bpe.decode_batch(batch, grid.shape)[0], grid)


def test_decode_batch(bpe):
    grids = [PHOTOS[0], PHOTOS[1][:7], PHOTOS[2][:, :1]]
    batch = bpe.encode_batch(grids, return_regions=True)
    sizes = [grid.shape for grid in grids]
    for copies in (bpe.decode_batch(batch, sizes), bpe.decode_batch(batch.tolist(), sizes, batch.regions)):
        assert all(np.array_equal(a, b) for a, b in zip(copies, grids, strict=True))
    copies = bpe.decode_batch(bpe.encode_batch(PHOTOS[:2], return_regions=True), (32, 32))
    assert np.array_equal(copies, PHOTOS[:2])
    with pytest.raises(GridError, match="tokens of 3 grids, 2 sizes, 3 regions"):
        bpe.decode_batch(batch, sizes[:2])
    with pytest.raises(GridError, match="grid 1: "):
        bpe.decode_batch([batch[0], batch[1][:-1], batch[2]], sizes, batch.regions)


def test_token_shape(vocabularies):
    oriented_bpe = vocabularies["oriented"]
    for token in range(K, oriented_bpe.vocab_size):
        cells = oriented_bpe.token_to_cells(token)
        shape = oriented_bpe.token_shape(token)
        left = min(dx for _, dx, _ in cells)
        assert {(y, x + left) for y, x in zip(*np.nonzero(shape), strict=True)} == {c[:2] for c in cells}
        assert shape.any(axis=0).all()
        assert shape.any(axis=1).all()
    assert vocabularies["pair"].token_shape(5).tolist() == [[True]]
    with pytest.raises(GridError, match="no fixed shape"):
        vocabularies["pair"].token_shape(K)


def test_merges_whose_tokens_never_touch():
    """A file may hold an offset at which the two shapes are not adjacent: such a merge joins nothing."""
    grid = [[0, 1, 2, 0, 1], [2, 2, 2, 2, 2], [0, 1, 0, 1, 2]]
    content = json.loads(VisualBPE.train([[[0, 1]]], 3, 1, "oriented", min_frequency=1).to_json())
    del content["checksum"]
    content["merges"] += [content["merges"][0] | {"a": 3, "b": 3, "dx": dx} for dx in (3, 2)]
    bpe = VisualBPE.from_json(json.dumps(content | {"num_merges": 3}))
    assert bpe.encode(grid).tolist() == [3, 2, 3, 2, 2, 2, 2, 2, 5, 2]
