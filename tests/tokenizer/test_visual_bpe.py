"""`VisualBPE` as a user meets it: inputs, files, errors, threads, processes, Ctrl-C."""

import json
import multiprocessing
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from being_vl import EncodedBatch, VisualBPE
from being_vl.errors import BeingVLError, GridError, VocabularyError
from being_vl.tokenizer import MergeInfo, Regions

PHOTOS = np.load(Path(__file__).parents[1] / "helpers" / "photo_grids.npz")["grids"]
K = 1024
MODES = ("pair", "oriented")


@pytest.fixture(scope="module")
def vocabularies():
    return {mode: VisualBPE.train(PHOTOS[:40], K, 400, mode, num_threads=1) for mode in MODES}


@pytest.fixture(scope="module", params=MODES)
def bpe(request, vocabularies):
    return vocabularies[request.param]


@pytest.fixture(scope="module")
def pair(vocabularies):
    return vocabularies["pair"]


@pytest.fixture(scope="module")
def oriented(vocabularies):
    return vocabularies["oriented"]


# What it gives


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
    for one in (grid, grid.T[::-1]):
        assert np.array_equal(bpe.decode(bpe.encode(one), *one.shape), one)


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
    plain = bpe.encode(grid)
    assert np.array_equal(bpe.encode(grid, dropout=0.0), plain)
    assert np.array_equal(bpe.encode(grid, dropout=1.0, seed=0), grid.ravel())
    some = bpe.encode(grid, dropout=0.2, seed=5)
    assert len(plain) < len(some) < grid.size
    assert np.array_equal(bpe.encode(grid, dropout=0.2, seed=5), some)
    assert not np.array_equal(bpe.encode(grid, dropout=0.2, seed=6), some)
    batch = bpe.encode_batch([grid, grid], dropout=0.2, seed=4)
    assert np.array_equal(batch[1], some)
    with pytest.raises(BeingVLError, match="needs a seed"):
        bpe.encode(grid, dropout=0.1)
    for probability in (-0.1, 1.5, float("nan")):
        with pytest.raises(BeingVLError, match="dropout"):
            bpe.encode(grid, dropout=probability, seed=0)


def test_token_to_cells(oriented, pair):
    for token in range(K, oriented.vocab_size):
        cells = oriented.token_to_cells(token)
        height = max(dy for dy, _, _ in cells) + 1
        left = min(dx for _, dx, _ in cells)
        width = max(dx for _, dx, _ in cells) - left + 1
        assert cells[0][:2] == (0, 0)
        assert len({cell[:2] for cell in cells}) == len(cells)
        assert max(height, width) <= 32
    a, b, dy, dx = oriented.merges[0]
    assert oriented.token_to_cells(K) == [(0, 0, a), (dy, dx, b)]
    assert pair.token_to_cells(7) == [(0, 0, 7)]
    with pytest.raises(GridError, match="no fixed shape"):
        pair.token_to_cells(K)
    with pytest.raises(GridError, match="not in the vocabulary"):
        oriented.token_to_cells(K + 400)


def test_progress(bpe):
    seen = []
    VisualBPE.train(PHOTOS, K, 60, bpe.merge_mode, progress=seen.append)
    assert all(isinstance(info, MergeInfo) for info in seen)
    assert [info.done for info in seen] == sorted({info.done for info in seen})
    assert (seen[-1].done, seen[-1].total) == (60, 60)
    assert seen[-1][:9] == VisualBPE.train(PHOTOS, K, 60, bpe.merge_mode).merge_infos[-1][:9]

    def stop(info):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        VisualBPE.train(PHOTOS, K, 60, progress=stop)


def test_nothing_to_learn():
    for grids in (PHOTOS[:0], [], [[[5]]]):
        bpe = VisualBPE.train(grids, K, 10)
        assert (bpe.merges, bpe.vocab_size) == ([], K)
    assert VisualBPE.train(PHOTOS, K, 0).encode(PHOTOS[0]).tolist() == PHOTOS[0].ravel().tolist()


# What it takes


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", ">u2", ">i8"])
def test_integer_types(dtype):
    grids = PHOTOS % 100
    expected = VisualBPE.train(grids, 100, 50)
    assert VisualBPE.train(grids.astype(dtype), 100, 50) == expected
    assert np.array_equal(expected.encode(grids[0].astype(dtype)), expected.encode(grids[0]))


def test_memory_layouts(bpe):
    grid = PHOTOS[0]
    packed = np.zeros((32, 32), dtype=[("flag", "u1"), ("id", "<i4")])
    packed["id"] = grid
    layouts = {
        "rows skipped": (PHOTOS[0][::2], PHOTOS[0].tolist()[::2]),
        "columns reversed": (grid[:, ::-1], [row[::-1] for row in grid.tolist()]),
        "transposed": (grid.T, grid.T.tolist()),
        "Fortran": (np.asfortranarray(grid), grid.tolist()),
        "unaligned": (packed["id"], grid.tolist()),
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


# What it refuses


@pytest.mark.parametrize("bad", [-1, K, 2**40, -(2**62)])
def test_ids_outside_the_codebook(bpe, bad):
    grids = PHOTOS[:3].astype(np.int64)
    grids[1, 30, 4] = bad
    place = rf"grid 1, row 30, column 4: id {bad} is not in the codebook, expected 0 to 1023"
    for call in (
        lambda: VisualBPE.train(grids, K),
        lambda: bpe.encode_batch(grids),
        lambda: bpe.encode_batch(list(grids)),
    ):
        with pytest.raises(GridError, match=place):
            call()
    with pytest.raises(GridError, match=rf"row 30, column 4: id {bad} "):
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


def test_tokens_that_do_not_tile(oriented):
    ids = oriented.encode(PHOTOS[0])
    cases = [
        (ids[:-1], 32, 32, rf"position {len(ids) - 1}: no token is left for the cell at row 31"),
        ([*ids, 3], 32, 32, rf"position {len(ids)}: token 3 is one too many"),
        ([*ids[:5], 9999], 32, 32, "position 5: token 9999 is not in the vocabulary, expected 0 to 1423"),
        ([-1], 1, 1, "position 0"),
        ([], 1, 1, "position 0: no token is left"),
        ([1, 2], 0, 2, "0x2"),
    ]
    wide = next(K + i for i, merge in enumerate(oriented.merges) if merge[2:] == (0, 1))
    cases.append(
        ([0, wide, 0, 0], 2, 2, "position 1: .*row 0, column 1, does not fit .* row 0, column 2 is outside")
    )
    for bad, height, width, message in cases:
        with pytest.raises(GridError, match=message):
            oriented.decode(bad, height, width)
    with pytest.raises(GridError, match="1-D"):
        oriented.decode(ids[None], 32, 32)
    with pytest.raises(TypeError, match="expected integers"):
        oriented.decode(ids * 0.5, 32, 32)


def test_pair_mode_needs_regions(pair):
    ids, regions = pair.encode(PHOTOS[0], return_regions=True)
    with pytest.raises(GridError, match="needed to decode in pair mode"):
        pair.decode(ids, 32, 32)
    with pytest.raises(GridError, match="without leaves"):
        pair.decode(ids, 32, 32, regions=np.asarray(regions))
    with pytest.raises(GridError, match=r"shape \(16, 64\)"):
        pair.decode(ids, 16, 64, regions=regions)
    with pytest.raises(GridError, match="position"):
        pair.decode(ids[:-1], 32, 32, regions=regions)
    with pytest.raises(GridError, match="cell 0"):
        pair.decode(ids, 32, 32, regions=Regions(regions, regions.leaves + 50))
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


# Files and processes


def test_save_and_load(bpe, tmp_path):
    path = tmp_path / "folder" / "vocab.json"
    bpe.save(path)
    loaded = VisualBPE.load(str(path))
    assert loaded == bpe
    assert loaded.merge_infos == bpe.merge_infos
    assert np.array_equal(loaded.encode(PHOTOS[47]), bpe.encode(PHOTOS[47]))
    assert [file.name for file in path.parent.iterdir()] == ["vocab.json"]
    other = VisualBPE.train(PHOTOS, K, 3, quantizer_name="vq", quantizer_fingerprint="ab12")
    other.save(path)
    assert VisualBPE.load(path) == other != bpe
    assert (other.quantizer_name, other.quantizer_fingerprint) == ("vq", "ab12")
    with pytest.raises(IsADirectoryError):
        bpe.save(tmp_path)
    with pytest.raises(FileNotFoundError):
        VisualBPE.load(tmp_path / "none.json")


def test_file_describes_itself(oriented):
    content = json.loads(oriented.to_json())
    assert content["format"] == "being-vl/visual-bpe"
    assert content["version"] == 1
    assert (content["merge_mode"], content["alpha"]) == ("oriented", 0.3)
    assert content["num_grids"] == 40
    assert content["grid_sizes"] == [{"height": 32, "width": 32, "grids": 40}]
    info, merge = oriented.merge_infos[7], content["merges"][7]
    assert merge == dict(zip(("a", "b", "dy", "dx", "n", "n_offset", "s"), info[2:9], strict=True))


def set_rule(index, **fields):
    return lambda content: content["merges"][index].update(fields)


def set_head(**fields):
    return lambda content: content.update(fields)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (set_head(format="tokenizer"), "its format is"),
        (set_head(version=2), "its version is 2"),
        (lambda content: content.pop("format"), "missing field `format`"),
        (lambda content: content.pop("alpha"), "missing field `alpha`"),
        (lambda content: content["merges"][2].pop("n"), "missing field `n` at line"),
        (set_head(extra=1), "unknown field `extra`"),
        (set_rule(3, dz=1), "unknown field `dz`"),
        (set_head(num_merges=401), "num_merges is 401, but there are 400"),
        (lambda content: content["merges"].pop(), "num_merges is 400, but there are 399"),
        (set_head(num_grids=41), "num_grids is 41, but grid_sizes add up to 40"),
        (set_head(grid_sizes=[{"height": 0, "width": 1, "grids": 40}]), r"grid_sizes\[0\]"),
        (set_head(base_vocab_size=0), "base_vocab_size = 0"),
        (set_head(base_vocab_size=2**32 - 1), "more than 16777216 tokens"),
        (set_head(base_vocab_size=2**32), "invalid value"),
        (set_head(base_vocab_size=-1), "invalid value"),
        (set_head(alpha=-1.0), "alpha = -1"),
        (set_head(alpha=None), "invalid type"),
        (set_head(sigma=0), "sigma = 0"),
        (set_head(min_frequency=0), "min_frequency = 0"),
        (set_head(merge_mode="both"), "unknown variant `both`"),
        (set_head(merge_mode="pair"), "merge 0: dy and dx belong to oriented mode"),
        (lambda content: content["merges"][4].pop("dx"), "merge 4: oriented mode needs dy and dx"),
        (set_rule(5, a=K + 5), "merge 5: a = 1029 is not an earlier token, expected 0 to 1028"),
        (set_rule(6, b=2**31), "merge 6: b = 2147483648 is not an earlier token"),
        (set_rule(6, b=1.5), "invalid type: floating point"),
        (lambda content: content["merges"].__setitem__(9, content["merges"][8]), "merge 9: the same merge"),
        (set_rule(7, dy=0, dx=0), r"merge 7: offset \(0, 0\)"),
        (set_rule(7, dy=0, dx=-1), r"merge 7: offset \(0, -1\)"),
        (set_rule(7, dy=-1, dx=1), r"merge 7: offset \(-1, 1\)"),
        (set_rule(7, dy=1, dx=-(2**31)), r"merge 7: offset \(1, -2147483648\)"),
        (set_rule(7, dy=65535), "merge 7: offset"),
        (set_rule(8, n=0, n_offset=0), "merge 8: n_offset = 0"),
        (set_rule(8, n=1, n_offset=2), "merge 8: n_offset = 2 is not in 1 to n = 1"),
        (set_rule(8, s=1.5), "merge 8: s = 1.5"),
        (set_rule(8, s=10**400), "number out of range"),
    ],
)
def test_hostile_files(oriented, tmp_path, damage, message):
    content = json.loads(oriented.to_json())
    damage(content)
    path = tmp_path / "vocab.json"
    path.write_text(json.dumps(content))
    with pytest.raises(VocabularyError, match=message) as caught:
        VisualBPE.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"[" * 10**6, b"\xff\xfe", b"\x80\x04K\x01."])
def test_files_that_are_no_vocabulary(content, tmp_path):
    path = tmp_path / "vocab.json"
    path.write_bytes(content)
    with pytest.raises(VocabularyError, match=r"vocab.json"):
        VisualBPE.load(path)


def test_truncated_files(pair):
    text = pair.to_json()
    for end in range(0, len(text) - 2, 997):
        with pytest.raises(VocabularyError, match="line"):
            VisualBPE.from_json(text[:end])


def test_altered_files(oriented, tmp_path):
    """Digits that changed make other rules, which the checksum does not let pass; spaces change nothing."""
    text = oriented.to_json()
    path = tmp_path / "vocab.json"
    # Not the digits of S, the last of which may stand for the same number.
    digits = [
        place.start()
        for place in re.finditer(r"\d", text)
        if "." not in text[place.start() - 20 : place.start()]
    ]
    for place in digits[:: len(digits) // 200]:
        path.write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])
        with pytest.raises(VocabularyError, match=r"vocab.json: "):
            VisualBPE.load(path)
    path.write_text(text.replace('"n": ', '"n":  '))
    assert VisualBPE.load(path) == oriented
    swapped = json.loads(text)
    swapped["merges"][0]["n"] += 1
    path.write_text(json.dumps(swapped))
    with pytest.raises(VocabularyError, match="it was altered: its checksum is"):
        VisualBPE.load(path)
    del swapped["checksum"]
    path.write_text(json.dumps(swapped))
    assert VisualBPE.load(path).merges == oriented.merges


def test_tokens_that_grow_without_end(oriented):
    """Two hundred doublings: more cells than there are atoms, refused at once by decoding."""
    content = json.loads(oriented.to_json())
    del content["checksum"]
    rule = {"dy": 1, "dx": 0, "n": 1, "n_offset": 1, "s": 1.0}
    content["merges"] = [{"a": max(K + i - 1, 0), "b": max(K + i - 1, 0), **rule} for i in range(200)]
    content["num_merges"] = 200
    bpe = VisualBPE.from_json(json.dumps(content))
    with pytest.raises(GridError, match="position 0"):
        bpe.decode([bpe.vocab_size - 1], 4, 4)
    with pytest.raises(GridError, match="more cells"):
        bpe.token_to_cells(bpe.vocab_size - 1)
    assert bpe.encode([[0, 1], [1, 0]]).tolist() == [0, 1, 1, 0]


def test_pickle(bpe):
    copy = pickle.loads(pickle.dumps(bpe))
    assert copy == bpe
    ids, regions = copy.encode(PHOTOS[0], return_regions=True)
    regions = pickle.loads(pickle.dumps(regions))
    assert np.array_equal(copy.decode(ids, 32, 32, regions=regions), PHOTOS[0])
    with pytest.raises(TypeError, match="unhashable"):
        hash(bpe)


def lengths(bpe, grids):
    return [len(ids) for ids in bpe.encode_batch(grids)]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes(bpe, method):
    grids = np.concatenate([PHOTOS] * 2)
    expected = lengths(bpe, grids)
    context = multiprocessing.get_context(method)
    with context.Pool(2) as pool:
        found = pool.starmap_async(lengths, [(bpe, grids)] * 3).get(timeout=60)
        assert found == [expected] * 3


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_data_loader_workers(bpe):
    data = pytest.importorskip("torch.utils.data")

    class Encoded(data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return bpe.encode_batch([PHOTOS[index]] * 40).values

    bpe.encode_batch(np.concatenate([PHOTOS] * 2))
    loader = data.DataLoader(Encoded(), batch_size=None, num_workers=2, timeout=60)
    for index, values in enumerate(loader):
        assert values.tolist() == bpe.encode(PHOTOS[index]).tolist() * 40


LONG_WORK = {
    "train": "VisualBPE.train(noise, 8192, 10**6, num_threads={threads}, min_frequency=1)",
    "train, all alike": "VisualBPE.train(np.zeros((800, 256, 256), np.uint8), 1, 99, num_threads={threads})",
    "encode_batch": "bpe.encode_batch(np.zeros((800, 256, 256), np.uint8), num_threads={threads})",
    "encode": "bpe.encode(np.zeros((6000, 6000), np.uint8))",
}
SCRIPT = """
import sys, threading, time, os, signal
import numpy as np
from being_vl import VisualBPE
noise = np.random.default_rng(0).integers(0, 8192, (3000, 32, 32), np.uint16)
bpe = VisualBPE.train(np.zeros((1, 256, 256), int), 1, 99)
sent = []
def interrupt():
    sent.append(time.monotonic())
    os.kill(os.getpid(), signal.SIGINT)
threading.Timer(0.5, interrupt).start()
try:
    {work}
except KeyboardInterrupt:
    print("stopped", time.monotonic() - sent[0])
else:
    print("finished")
"""


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("work", LONG_WORK)
def test_ctrl_c(work, threads):
    """SIGINT ends long work with KeyboardInterrupt soon (about 0.1 s on an idle machine), and the process lives on."""
    script = SCRIPT.format(work=LONG_WORK[work].format(threads=threads))
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("stopped"), run.stdout


def test_the_gil_is_free_meanwhile():
    """Other Python threads go on while training runs."""
    import threading

    ticks = []
    done = threading.Event()

    def tick():
        while not done.is_set():
            ticks.append(time.monotonic())
            time.sleep(0.01)

    thread = threading.Thread(target=tick)
    thread.start()
    VisualBPE.train(np.zeros((60, 256, 256), np.uint8), 1, 99, num_threads=1)
    done.set()
    thread.join()
    assert len(ticks) > 5


def test_no_zombie_handlers():
    """Training leaves Python's own handling of Ctrl-C as it was."""
    before = signal.getsignal(signal.SIGINT)
    VisualBPE.train(PHOTOS, K, 10)
    assert signal.getsignal(signal.SIGINT) is before


def test_published_vocabularies(tmp_path):
    """Being-VL-0.5's format, by every protocol of pickle."""
    merges = [((0, 1), 4), ((4, 4), 5), ((1, 0), 6)]
    path = tmp_path / "vocab.pkl"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps(merges, protocol))
        bpe = VisualBPE.load_published(path, 4)
        assert bpe.merges == [(0, 1), (4, 4), (1, 0)]
        assert bpe.encode([[0, 1, 0, 1]]).tolist() == [5]


class Evil:
    def __reduce__(self):
        return exit, ("executed",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Evil(), "in a pickle that may hold only ints"),
        ([((0, 1), 4), Evil()], "in a pickle that may hold only ints"),
        ({}, "EMPTY_DICT"),
        ([((0, 1.5), 4)], "BINFLOAT"),
        ((((0, 1), 4),), "holds tuple"),
        ([((0, 1), 4), ((0,), 5)], "merge 1 is not"),
        ([((0, -1), 4)], "merge 0 is not"),
        ([((0, 2**70), 4)], "merge 0 is not"),
        ([((0, 1), 5)], "merge 0 makes token 5, expected 4"),
        ([((0, 9), 4)], "merge 0: b = 9 is not an earlier token"),
        ([((0, 1), 4), ((0, 1), 5)], "merge 1: the same merge"),
    ],
)
def test_published_files_that_are_something_else(content, message, tmp_path):
    path = tmp_path / "vocab.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(VocabularyError, match=message) as caught:
        VisualBPE.load_published(path, 4)
    assert str(path) in str(caught.value)
    path.write_bytes(pickle.dumps([((0, 1), 4)])[:-3])
    with pytest.raises(VocabularyError, match="not a pickled list"):
        VisualBPE.load_published(path, 4)
