"""`VisualBPE` as a user meets it: results, inputs, errors."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from being_vl import EncodedBatch, VisualBPE
from being_vl.errors import BeingVLError, GridError
from being_vl.tokenizer import MergeInfo, Regions
from helpers.photos import PHOTOS
from helpers.photos import PHOTOS_K as K

# Results


def test_surface(bpe):
    assert bpe.base_vocab_size == K
    assert (bpe.num_merges, bpe.vocab_size) == (400, K + 400)
    assert (bpe.alpha, bpe.sigma, bpe.min_frequency) == (0.3, 1.0, 2)
    assert bpe.grid_sizes == {(32, 32): 40}
    assert bpe.num_grids == 40
    assert len(bpe.merges) == 400
    assert {len(merge) for merge in bpe.merges} == {2 if bpe.merge_mode == "pair" else 4}
    assert repr(bpe).startswith("VisualBPE(base_vocab_size=1024, num_merges=400, merge_mode=")
    assert (bpe.quantizer_name, bpe.quantizer_fingerprint) == (None, None)


def test_tokens_are_fewer_and_cover_every_cell(bpe):
    grid = PHOTOS[45]
    ids, regions = bpe.encode(grid, return_regions=True)
    assert ids.dtype == np.uint32
    assert ids.ndim == 1
    assert len(ids) < grid.size
    assert regions.shape == grid.shape
    first_cells = [np.flatnonzero(np.ravel(regions) == i)[0] for i in range(len(ids))]
    assert first_cells == sorted(first_cells)
    assert np.array_equal(np.unique(regions), np.arange(len(ids)))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_decoding_inverts_encoding(bpe, dropout):
    for grid in PHOTOS[38:]:
        ids, regions = bpe.encode(grid, return_regions=True, dropout=dropout, seed=3)
        assert np.array_equal(bpe.decode(ids, *grid.shape, regions=regions), grid)
        if bpe.merge_mode == "oriented":
            assert np.array_equal(bpe.decode(ids, *grid.shape), grid)
            assert np.array_equal(bpe.decode(ids.tolist(), 32, 32), grid)


@given(
    grid=npst.arrays(
        np.int16, npst.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.integers(0, 2)
    )
)
@settings(max_examples=100, deadline=None)
def test_oriented_mode_is_lossless_on_any_grid(grid):
    bpe = VisualBPE.train([grid], 3, 50, "oriented", min_frequency=1, num_threads=1)
    for view in (grid, grid.T[::-1]):
        assert np.array_equal(bpe.decode(bpe.encode(view), *view.shape), view)


def test_batch(bpe):
    grids = [PHOTOS[0], PHOTOS[1][:5], PHOTOS[2][:, :1], PHOTOS[3][:1]]
    batch = bpe.encode_batch(grids, return_regions=True)
    assert isinstance(batch, EncodedBatch)
    assert len(batch) == 4
    assert (batch.values.dtype, batch.offsets.dtype) == (np.uint32, np.int64)
    assert batch.offsets[-1] == len(batch.values)
    for i, (grid, ids) in enumerate(zip(grids, batch, strict=True)):
        expected, regions = bpe.encode(grid, return_regions=True)
        assert np.array_equal(ids, expected)
        assert np.array_equal(batch[i - 4], expected)
        assert np.array_equal(batch.regions[i], regions)
        assert np.array_equal(bpe.decode(ids, *grid.shape, regions=batch.regions[i]), grid)
    with pytest.raises(IndexError):
        batch[4]
    assert len(bpe.encode_batch([])) == 0


def test_threads_change_nothing(bpe):
    grids = [*PHOTOS[:30], *PHOTOS[30:40, :20, :31], *PHOTOS[40:, 5:]]
    options = {"merge_mode": bpe.merge_mode, "num_merges": 300}
    one, two, five = (VisualBPE.train(grids, K, num_threads=n, **options) for n in (1, 2, 5))
    assert one == two == five
    one, two = (bpe.encode_batch(grids * 3, n) for n in (1, 2))
    assert np.array_equal(one.values, two.values)
    assert np.array_equal(one.offsets, two.offsets)


def test_order_of_grids_changes_nothing(bpe):
    assert VisualBPE.train(PHOTOS[39::-1], K, 400, bpe.merge_mode) == bpe


def test_dropout(bpe):
    grid = PHOTOS[0]
    tokens = bpe.encode(grid)
    assert np.array_equal(bpe.encode(grid, dropout=0.0), tokens)
    assert np.array_equal(bpe.encode(grid, dropout=1.0, seed=0), grid.ravel())
    ids = bpe.encode(grid, dropout=0.2, seed=5)
    assert len(tokens) < len(ids) < grid.size
    assert np.array_equal(bpe.encode(grid, dropout=0.2, seed=5), ids)
    assert not np.array_equal(bpe.encode(grid, dropout=0.2, seed=6), ids)
    batch = bpe.encode_batch([grid, grid], dropout=0.2, seed=4)
    assert np.array_equal(batch[1], ids)
    with pytest.raises(BeingVLError, match="needs a seed"):
        bpe.encode(grid, dropout=0.1)
    for probability in (-0.1, 1.5, float("nan")):
        with pytest.raises(BeingVLError, match="dropout"):
            bpe.encode(grid, dropout=probability, seed=0)


def test_token_to_cells(oriented_bpe, pair_bpe):
    for token in range(K, oriented_bpe.vocab_size):
        cells = oriented_bpe.token_to_cells(token)
        height = max(dy for dy, _, _ in cells) + 1
        left = min(dx for _, dx, _ in cells)
        width = max(dx for _, dx, _ in cells) - left + 1
        assert cells[0][:2] == (0, 0)
        assert len({cell[:2] for cell in cells}) == len(cells)
        assert max(height, width) <= 32
    a, b, dy, dx = oriented_bpe.merges[0]
    assert oriented_bpe.token_to_cells(K) == [(0, 0, a), (dy, dx, b)]
    assert pair_bpe.token_to_cells(7) == [(0, 0, 7)]
    with pytest.raises(GridError, match="no fixed shape"):
        pair_bpe.token_to_cells(K)
    with pytest.raises(GridError, match="not in the vocabulary"):
        oriented_bpe.token_to_cells(K + 400)


def test_progress(bpe):
    infos = []
    VisualBPE.train(PHOTOS, K, 60, bpe.merge_mode, progress=infos.append)
    assert all(isinstance(info, MergeInfo) for info in infos)
    assert [info.done for info in infos] == sorted({info.done for info in infos})
    assert (infos[-1].done, infos[-1].total) == (60, 60)
    assert infos[-1][:9] == VisualBPE.train(PHOTOS, K, 60, bpe.merge_mode).merge_infos[-1][:9]

    def stop(info):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        VisualBPE.train(PHOTOS, K, 60, progress=stop)


def test_nothing_to_learn():
    for grids in (PHOTOS[:0], [], [[[5]]]):
        bpe = VisualBPE.train(grids, K, 10)
        assert (bpe.merges, bpe.vocab_size) == ([], K)
    assert VisualBPE.train(PHOTOS, K, 0).encode(PHOTOS[0]).tolist() == PHOTOS[0].ravel().tolist()


# Inputs


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", ">u2", ">i8"])
def test_integer_types(dtype):
    grids = PHOTOS % 100
    expected = VisualBPE.train(grids, 100, 50)
    assert VisualBPE.train(grids.astype(dtype), 100, 50) == expected
    assert np.array_equal(expected.encode(grids[0].astype(dtype)), expected.encode(grids[0]))


def test_memory_layouts(bpe):
    grid = PHOTOS[0]
    structured_array = np.zeros((32, 32), dtype=[("flag", "u1"), ("id", "<i4")])
    structured_array["id"] = grid
    layouts = {
        "rows skipped": (PHOTOS[0][::2], PHOTOS[0].tolist()[::2]),
        "columns reversed": (grid[:, ::-1], [row[::-1] for row in grid.tolist()]),
        "transposed": (grid.T, grid.T.tolist()),
        "Fortran": (np.asfortranarray(grid), grid.tolist()),
        "unaligned": (structured_array["id"], grid.tolist()),
        "broadcast": (np.broadcast_to(grid[0], (8, 32)), [grid[0].tolist()] * 8),
        "read-only": (np.frombuffer(grid.tobytes(), np.uint16).reshape(32, 32), grid.tolist()),
    }
    for name, (array, rows) in layouts.items():
        assert np.array_equal(bpe.encode(array), bpe.encode(rows)), name
    stack = np.asfortranarray(PHOTOS[:6])
    assert np.array_equal(bpe.encode_batch(stack).values, bpe.encode_batch(PHOTOS[:6].tolist()).values)
    assert np.array_equal(bpe.encode_batch(stack.T).values, bpe.encode_batch(list(stack.T)).values)


def test_containers(bpe):
    expected = bpe.encode_batch(PHOTOS[:4]).values
    objects = np.empty(4, object)
    objects[:] = list(PHOTOS[:4])
    for grids in (
        tuple(PHOTOS[:4]),
        (grid for grid in PHOTOS[:4]),
        objects,
        dict(enumerate(PHOTOS[:4])).values(),
    ):
        assert np.array_equal(bpe.encode_batch(grids).values, expected)


def test_torch_tensors(bpe):
    torch = pytest.importorskip("torch")
    grids = torch.from_numpy(PHOTOS[:4].astype(np.int64))
    expected = bpe.encode_batch(PHOTOS[:4]).values
    for tensors in (grids, list(grids), grids.int(), grids.transpose(1, 2).contiguous().transpose(1, 2)):
        assert np.array_equal(bpe.encode_batch(tensors).values, expected)
    assert np.array_equal(bpe.encode(grids[0]), bpe.encode(PHOTOS[0]))
    assert VisualBPE.train(grids, K, 30) == VisualBPE.train(PHOTOS[:4], K, 30)


def test_input_is_left_alone(bpe):
    grid = PHOTOS[0].copy()
    bpe.encode(grid)
    VisualBPE.train([grid], K, 100)
    assert np.array_equal(grid, PHOTOS[0])


# Errors


@pytest.mark.parametrize("id", [-1, K, 2**40, -(2**62)])
def test_ids_outside_the_codebook(bpe, id):
    grids = PHOTOS[:3].astype(np.int64)
    grids[1, 30, 4] = id
    place = rf"grid 1, row 30, column 4: id {id} is not in the codebook, expected 0 to 1023"
    for call in (
        lambda: VisualBPE.train(grids, K),
        lambda: bpe.encode_batch(grids),
        lambda: bpe.encode_batch(list(grids)),
    ):
        with pytest.raises(GridError, match=place):
            call()
    with pytest.raises(GridError, match=rf"row 30, column 4: id {id} "):
        bpe.encode(grids[1])
    with pytest.raises(GridError, match="row 4, column 30"):
        bpe.encode(grids[1].T)
    with pytest.raises(GridError, match="id 18446744073709551615"):
        bpe.encode(np.full((2, 2), 2**64 - 1, np.uint64))


@pytest.mark.parametrize(
    ("grids", "error", "message"),
    [
        (PHOTOS[0], GridError, r"expected an \(N, H, W\) array .* got shape \(32, 32\)"),
        ([PHOTOS[0], PHOTOS[:1]], GridError, r"grid 1: expected an \(H, W\) array, got shape \(1, 32, 32\)"),
        ([PHOTOS[0], PHOTOS[0][:, :0]], GridError, "grid 1 is 32x0"),
        (PHOTOS[:, :0], GridError, "grid 0 is 0x32"),
        (
            np.broadcast_to(np.uint8(0), (1, 30_000, 30_000)),
            GridError,
            "30000x30000; .* at most 268435456 cells",
        ),
        (np.zeros((1, 1, 65_536), np.uint8), GridError, "grid 0 is 1x65536; .* at most 65535"),
        ([PHOTOS[0], PHOTOS[0] / 2], TypeError, "grid 1: expected integers, got dtype float64"),
        (PHOTOS * 1.0, TypeError, "expected integers, got dtype float64"),
        (PHOTOS > 3, TypeError, "expected integers, got dtype bool"),
        (["abc"], TypeError, "expected integers"),
        ([None], TypeError, "expected integers"),
        (5, TypeError, "sequence of .* arrays, got int"),
        (None, TypeError, "sequence of .* arrays, got NoneType"),
    ],
)
def test_grids_that_cannot_be(bpe, grids, error, message):
    with pytest.raises(error, match=message):
        VisualBPE.train(grids, K)
    with pytest.raises(error, match=message):
        bpe.encode_batch(grids)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("base_vocab_size", 0),
        ("base_vocab_size", -1),
        ("base_vocab_size", 2**24 + 1),
        ("num_merges", -1),
        ("num_merges", 2**24),
        ("num_merges", 2**70),
        ("merge_mode", "diagonal"),
        ("alpha", -0.1),
        ("alpha", float("nan")),
        ("alpha", float("inf")),
        ("sigma", 0.0),
        ("sigma", -1.0),
        ("sigma", 1e-200),
        ("sigma", float("inf")),
        ("min_frequency", 0),
        ("num_threads", 0),
        ("num_threads", -2),
    ],
)
def test_options_that_cannot_be(option, value):
    options = {"base_vocab_size": K, option: value}
    with pytest.raises(BeingVLError, match=f"{option} = |make more than"):
        VisualBPE.train(PHOTOS, **options)


def test_options_of_the_wrong_type():
    for options in ({"num_merges": 1.5}, {"alpha": "high"}, {"merge_mode": 3}, {"base_vocab_size": "8"}):
        with pytest.raises(TypeError):
            VisualBPE.train(PHOTOS, **({"base_vocab_size": K} | options))
    with pytest.raises(TypeError, match=r"VisualBPE.train or VisualBPE.load"):
        VisualBPE("vocab.json")


def test_tokens_that_do_not_tile(oriented_bpe):
    ids = oriented_bpe.encode(PHOTOS[0])
    cases = [
        (ids[:-1], 32, 32, rf"position {len(ids) - 1}: no token is left for the cell at row 31"),
        ([*ids, 3], 32, 32, rf"position {len(ids)}: token 3 is one too many"),
        ([*ids[:5], 9999], 32, 32, "position 5: token 9999 is not in the vocabulary, expected 0 to 1423"),
        ([-1], 1, 1, "position 0"),
        ([], 1, 1, "position 0: no token is left"),
        ([1, 2], 0, 2, "0x2"),
    ]
    wide_token = next(K + i for i, merge in enumerate(oriented_bpe.merges) if merge[2:] == (0, 1))
    cases.append(
        (
            [0, wide_token, 0, 0],
            2,
            2,
            "position 1: .*row 0, column 1, does not fit .* row 0, column 2 is outside",
        )
    )
    for tokens, height, width, message in cases:
        with pytest.raises(GridError, match=message):
            oriented_bpe.decode(tokens, height, width)
    with pytest.raises(GridError, match="1-D"):
        oriented_bpe.decode(ids[None], 32, 32)
    with pytest.raises(TypeError, match="expected integers"):
        oriented_bpe.decode(ids * 0.5, 32, 32)


def test_pair_mode_needs_regions(pair_bpe):
    ids, regions = pair_bpe.encode(PHOTOS[0], return_regions=True)
    with pytest.raises(GridError, match="needed to decode in pair mode"):
        pair_bpe.decode(ids, 32, 32)
    with pytest.raises(GridError, match="without leaves"):
        pair_bpe.decode(ids, 32, 32, regions=np.asarray(regions))
    with pytest.raises(GridError, match=r"shape \(16, 64\)"):
        pair_bpe.decode(ids, 16, 64, regions=regions)
    with pytest.raises(GridError, match="position"):
        pair_bpe.decode(ids[:-1], 32, 32, regions=regions)
    with pytest.raises(GridError, match="cell 0"):
        pair_bpe.decode(ids, 32, 32, regions=Regions(regions, regions.leaves + 50))
    with pytest.raises(GridError, match="with leaves of shape"):
        Regions(regions, regions.leaves[:4])


def test_same_tokens_and_regions_of_different_grids():
    """Why Regions carry leaves: an L of three cells can hold the same token in two ways."""
    one, other = [[0, 1], [2, 3]], [[0, 2], [1, 4]]
    bpe = VisualBPE.train([one, other], 5, 2, "pair", alpha=0.0)
    assert bpe.merges == [(0, 1), (5, 2)]
    one[1][1] = other[1][1]
    (ids, regions), (other_ids, other_regions) = (bpe.encode(g, return_regions=True) for g in (one, other))
    assert np.array_equal(ids, other_ids)
    assert np.array_equal(regions, other_regions)
    assert bpe.decode(ids, 2, 2, regions=regions).tolist() == one
    assert bpe.decode(ids, 2, 2, regions=other_regions).tolist() == other
