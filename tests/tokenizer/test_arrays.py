"""Arrays that are no grids, or that another thread changes: one clear error with the grid's number, or a result."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from being_vl import VisualBPE
from being_vl.errors import BeingVLError, GridError
from being_vl.tokenizer import Regions

K = 4
GRID = np.array([[0, 1, 0], [2, 3, 2]])


@pytest.fixture(scope="module", params=["pair", "oriented"])
def bpe(request):
    return VisualBPE.train([GRID] * 3, K, 3, request.param)


def check_refusal(bpe, array, error, message):
    """Check that an array is refused as the second grid of a training set and of a batch, and alone."""
    for call in (lambda: VisualBPE.train([GRID, array], K), lambda: bpe.encode_batch([GRID, array])):
        with pytest.raises(error, match=message):
            call()
    with pytest.raises(error, match=message.replace("grid 1", "grid 0")):
        bpe.encode(array)


@pytest.mark.parametrize("id", [-1, K, 255, 2**31, 2**32, 2**32 + 1, -(2**63)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_ids_that_are_in_no_codebook(bpe, id, order):
    grid = np.array(GRID, np.int64, order=order)
    grid[1, 2] = id
    check_refusal(
        bpe, grid, GridError, f"grid 1, row 1, column 2: id {id} is not in the codebook, expected 0 to 3"
    )
    check_refusal(bpe, grid[::-1], GridError, f"grid 1, row 0, column 2: id {id} ")


torch = pytest.importorskip("torch")  # a wheel is tested where torch may not be had
FLOATS = torch.tensor([[1.0, 2.0], [0.0, 2.5]])
OTHER_TYPES = {
    "NaN": (np.array([[0.0, 1.0], [np.nan, 0.5]]), "float64 (nan at row 1, column 0)"),
    "infinity": ([[0.0, float("inf")]], "float64 (inf at row 0, column 1)"),
    "fractions": (np.array([[3.0, 0.25]], np.float16), "float16 (0.25 at row 0, column 1)"),
    "whole floats": (np.zeros((2, 2), ">f4"), ">f4 (0.0 at row 0, column 0)"),
    "complex": ([[1j]], "complex128 (1j at row 0, column 0)"),
    "bools": (np.zeros((2, 2), bool), "bool (False at row 0, column 0)"),
    "objects": (np.array([[0, 1]], object), "object (0 at row 0, column 0)"),
    "None": (None, "object (None)"),
    "None inside": ([[0, 1], [0, None]], "object (None at row 1, column 1)"),
    "huge ints": ([[1, 2**70]], f"object ({2**70} at row 0, column 1)"),
    "dates": (np.zeros((1, 1), "M8[D]"), "datetime64[D] (1970-01-01 at row 0, column 0)"),
    "durations": (np.zeros((1, 1), "m8[s]"), "timedelta64[s] (0 seconds at row 0, column 0)"),
    "records": (np.zeros((1, 1), "i4,i4"), "[('f0', '<i4'), ('f1', '<i4')] ((0, 0) at row 0, column 0)"),
    "digits": ([["0", "1"]], "<U1 (0 at row 0, column 0)"),
    "a string": ("010", "<U3 (010)"),
    "a dict": ({"a": 1}, "object ({'a': 1})"),
    "float tensor": (FLOATS, "float32 (2.5 at row 1, column 1)"),
    "bfloat16 tensor": (FLOATS.bfloat16(), "torch.bfloat16 (2.5 at row 1, column 1)"),
    "tensor with gradient": (FLOATS.clone().requires_grad_(), "torch.float32 (2.5 at row 1, column 1)"),
    "bool tensor": (FLOATS > 1, "bool (False at row 0, column 0)"),
}


@pytest.mark.parametrize("name", OTHER_TYPES)
def test_arrays_that_are_not_of_integers(bpe, name):
    array, message = OTHER_TYPES[name]
    check_refusal(bpe, array, TypeError, "grid 1: expected integers, got dtype " + re.escape(message))


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        (np.array([[[0]], [[0.5]]]), "grid 1: expected integers, got dtype float64 (0.5 at row 0, column 0)"),
        (np.full((2, 2, 3), 2**40, np.uint64), f"grid 0, row 0, column 0: id {2**40} is not in the codebook"),
        (np.full((2, 2, 3), -1, np.int8), "grid 0, row 0, column 0: id -1 is not in the codebook"),
        (
            FLOATS[None].bfloat16(),
            "grid 0: expected integers, got dtype torch.bfloat16 (2.5 at row 1, column 1)",
        ),
        (GRID, "expected an (N, H, W) array or a sequence of (H, W) arrays, got shape (2, 3)"),
        (
            np.zeros((1, 1, 2, 2), int),
            "expected an (N, H, W) array or a sequence of (H, W) arrays, got shape (1, 1, 2",
        ),
        (np.array(3), "expected an (N, H, W) array or a sequence of (H, W) arrays, got shape ()"),
        (np.array(None, object), "grids: expected integers, got dtype object (None)"),
        (np.array([[GRID, None]], object), "grid 0: expected integers, got dtype object ("),
        (3, "expected an (N, H, W) array or a sequence of (H, W) arrays, got int"),
        (None, "expected an (N, H, W) array or a sequence of (H, W) arrays, got NoneType"),
        ([1, 2], "grid 0: expected an (H, W) array, got shape ()"),
        (np.zeros((2, 0, 3), int), "grid 0 is 0x3; expected at least one cell"),
        (np.zeros((1, 1, 65_536), int), "grid 0 is 1x65536; expected at least one cell, at most 65535 rows"),
        (np.broadcast_to(np.uint8(0), (1, 16_385, 16_385)), "16385x16385; "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_all_grids_at_once(bpe, grids, message):
    for call in (lambda: VisualBPE.train(grids, K), lambda: bpe.encode_batch(grids)):
        with pytest.raises((GridError, TypeError), match=re.escape(message)):
            call()


@pytest.mark.parametrize("grids", [[], (), iter([]), np.zeros((0, 2, 3), int), torch.zeros(0, 2, 3).long()])
def test_no_grids(bpe, grids):
    assert len(bpe.encode_batch(grids)) == 0
    assert VisualBPE.train(grids, K).num_merges == 0


TOKEN_FAULTS = {
    "negative": ([0, -1], "position 1: token -1 is not in the vocabulary, expected 0 to "),
    "too large": ([0, 99], "position 1: token 99 is not in the vocabulary"),
    "past 32 bits": ([2**32 + 1], f"position 0: token {2**32 + 1} is not in the vocabulary"),
    "uint64": (np.array([2**64 - 1], np.uint64), f"position 0: token {2**64 - 1} is not in the vocabulary"),
    "huge": ([2**70], f"ids: expected integers, got dtype object ({2**70} at position 0)"),
    "NaN": ([0.0, np.nan], "ids: expected integers, got dtype float64 (nan at position 1)"),
    "bools": ([True], "ids: expected integers, got dtype bool (True at position 0)"),
    "bfloat16": (
        torch.ones(2).bfloat16(),
        "ids: expected integers, got dtype torch.bfloat16 (1.0 at position 0)",
    ),
    "rank 2": ([[0]], "ids: expected a 1-D array, got shape (1, 1)"),
    "rank 0": (0, "ids: expected a 1-D array, got shape ()"),
    "ragged": ([[0], [0, 1]], "ids: row 1 has 2 ids, and row 0 has 1"),
}


@pytest.mark.parametrize("name", TOKEN_FAULTS)
def test_tokens_that_are_none(bpe, name):
    """Refused alone, and as the second grid's of a batch."""
    tokens, message = TOKEN_FAULTS[name]
    ids, regions = bpe.encode(GRID, return_regions=True)
    with pytest.raises((GridError, TypeError), match=f"^{re.escape(message)}"):
        bpe.decode(tokens, 2, 3, regions)
    with pytest.raises((GridError, TypeError), match=f"^grid 1: {re.escape(message)}"):
        bpe.decode_batch([ids, tokens], (2, 3), [regions, regions])


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((0, 3), "a grid of 0x3: expected at least one cell"),
        ((65_536, 1), "a grid of 65536x1: expected at least one cell, at most 65535 rows"),
        ((16_385, 16_385), "a grid of 16385x16385: "),
        ((-1, 3), "height = -1: expected 0 to "),
        ((3, 2**70), f"width = {2**70}: expected 0 to "),
        ((3, 2.0), "width: expected an integer, got 2.0"),
        ((None, 3), "height: expected an integer, got None"),
    ],
)
def test_sizes_that_are_none(bpe, size, message):
    ids, regions = bpe.encode(GRID, return_regions=True)
    with pytest.raises((BeingVLError, TypeError), match=f"^{message}"):
        bpe.decode(ids, *size, regions)
    with pytest.raises((BeingVLError, TypeError), match=f"^grid 1: {message}"):
        bpe.decode_batch([ids, ids], [(2, 3), size], [regions, regions])


@pytest.mark.parametrize(
    ("tokens", "leaves", "message"),
    [
        ([[0, -1]], [[0, 0]], "regions: -1 to 0, expected 0 to 2147483647"),
        ([[0, 0]], [[0, 2**32]], f"regions.leaves: 0 to {2**32}, expected 0 to 2147483647"),
        ([[0, 0.5]], [[0, 0]], "regions: expected integers, got dtype float64"),
        ([[0, 0], [0]], [[0, 0]], "regions: .*inhomogeneous"),
        ([[0, 0]], [[0], [0]], r"regions of shape \(1, 2\) with leaves of shape \(2, 1\)"),
        ([0, 0], [0, 0], "regions of shape"),
    ],
)
def test_regions_that_are_none(tokens, leaves, message):
    with pytest.raises((GridError, TypeError), match=f"^{message}"):
        Regions(tokens, leaves)


@pytest.mark.parametrize("shape", [(), (3,), (1, 2, 3), (1, 1, 2, 3)])
def test_wrong_rank(bpe, shape):
    text = str(shape).replace("(", r"\(").replace(")", r"\)")
    check_refusal(
        bpe, np.zeros(shape, int), GridError, rf"grid 1: expected an \(H, W\) array, got shape {text}"
    )


@pytest.mark.parametrize(
    ("dtype", "id"),
    [("i1", -128), ("i2", -1), ("i4", -(2**31)), (">i8", -2), ("u1", 255), (">u2", 4), ("u4", 2**32 - 1)]
    + [(order + "u8", id) for order in "<>" for id in (2**32, 2**32 + 1, 2**63, 2**64 - 1)],
)
def test_ids_of_every_type(bpe, dtype, id):
    """The value is told as it stands in the array, whatever its width, sign and byte order."""
    grid = GRID.astype(dtype)
    grid[1, 1] = id
    check_refusal(
        bpe, grid, GridError, f"grid 1, row 1, column 1: id {id} is not in the codebook, expected 0 to 3"
    )
    assert np.array_equal(bpe.encode(GRID.astype(dtype)), bpe.encode(GRID))


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"])
def test_tensors(bpe, dtype):
    """Tensors of any integer type, layout and, where they have signs, negative ids."""
    dtype = getattr(torch, dtype)
    plain_grids = torch.tensor(np.array([GRID, GRID[::-1], GRID[:, ::-1]])).to(dtype)
    expected = bpe.encode_batch(plain_grids.tolist()).tolist()
    wide_grids = torch.zeros(3, 4, 3, dtype=dtype)
    wide_grids[:, ::2] = plain_grids
    transposed_grids = torch.from_numpy(
        np.ascontiguousarray(plain_grids.numpy().transpose(0, 2, 1))
    ).transpose(1, 2)
    for grids in (
        plain_grids,
        wide_grids[:, ::2],
        transposed_grids,
        list(plain_grids),
        plain_grids.numpy().astype(plain_grids.numpy().dtype.newbyteorder()),
    ):
        assert bpe.encode_batch(grids).tolist() == expected
        assert VisualBPE.train(grids, K, 3) == VisualBPE.train(plain_grids.tolist(), K, 3)
    assert bpe.encode(transposed_grids[1]).tolist() == expected[1]
    ids, regions = bpe.encode(plain_grids[2], return_regions=True)
    decoded_grid = bpe.decode(torch.from_numpy(ids.astype(np.int64)).to(dtype), 2, 3, regions)
    assert decoded_grid.tolist() == plain_grids[2].tolist()
    if dtype.is_signed:
        plain_grids[1, 1, 2] = -3
        with pytest.raises(GridError, match="grid 1, row 1, column 2: id -3 "):
            bpe.encode_batch(plain_grids)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_no_cells(bpe, shape):
    for dtype in (int, float):
        check_refusal(
            bpe, np.zeros(shape, dtype), GridError, f"grid 1 is {shape[0]}x{shape[1]}; expected at least one"
        )


def test_ragged_rows(bpe):
    check_refusal(bpe, [[1, 2], [3]], GridError, "grid 1: row 1 has 1 ids, and row 0 has 2")
    check_refusal(bpe, [[1, 2], [1, 2], []], GridError, "grid 1: row 2 has 0 ids, and row 0 has 2")
    check_refusal(bpe, [[1, 2], 3], GridError, "grid 1: row 1 is no row of ids")
    for call in (lambda: VisualBPE.train([[[1, 2], [3]]], K), lambda: bpe.encode_batch([[[1, 2], [3]]])):
        with pytest.raises(GridError, match="grid 0: row 1 has 1 ids"):
            call()


def test_layouts_that_must_work(bpe, tmp_path):
    """Fortran order, views, read-only and memory-mapped arrays give what plain ones give."""
    rng = np.random.default_rng(0)
    plain_grids = rng.integers(0, K, (7, 6, 5))
    np.save(tmp_path / "grids.npy", plain_grids.astype(np.uint16))
    read_only_grids = plain_grids.copy()
    read_only_grids.flags.writeable = False
    wide_grids = np.zeros((7, 12, 15), np.int32)
    wide_grids[:, ::2, ::3] = plain_grids
    layouts = {
        "Fortran": np.asfortranarray(plain_grids),
        "read-only": read_only_grids,
        "memory-mapped": np.load(tmp_path / "grids.npy", mmap_mode="r"),
        "strided": wide_grids[:, ::2, ::3],
        "transposed": np.ascontiguousarray(plain_grids.transpose(2, 1, 0)).transpose(2, 1, 0),
        "backwards": np.ascontiguousarray(plain_grids[::-1, ::-1, ::-1])[::-1, ::-1, ::-1],
        "big-endian": plain_grids.astype(">i8"),
        "grids of their own": [np.asfortranarray(grid) for grid in plain_grids],
    }
    expected = VisualBPE.train(plain_grids.tolist(), K, 20, bpe.merge_mode)
    values = expected.encode_batch(plain_grids.tolist()).values
    for name, grids in layouts.items():
        assert VisualBPE.train(grids, K, 20, bpe.merge_mode) == expected, name
        assert np.array_equal(expected.encode_batch(grids).values, values), name
        assert np.array_equal(expected.encode(grids[3]), expected.encode(plain_grids[3].tolist())), name


def test_more_merges_than_the_data_yields(caplog):
    """Training stops by itself; a warning, the vocabulary and the last report say how far it came."""
    infos = []
    bpe = VisualBPE.train([GRID] * 3, K, 1000, progress=infos.append)
    assert 0 < bpe.num_merges < 6
    assert (infos[-1].done, infos[-1].total) == (bpe.num_merges, 1000)
    assert len(bpe.encode(GRID)) == 1
    assert caplog.messages == [
        f"no pair is left that occurs 2 times: {bpe.num_merges} merges instead of 1000"
    ]
    caplog.clear()
    assert VisualBPE.train([GRID] * 3, K, bpe.num_merges) == bpe
    assert not caplog.messages


CHANGING_ARRAY = """
import sys, threading
import numpy as np
from being_vl import VisualBPE
from being_vl.errors import GridError

rng = np.random.default_rng(0)
grids = rng.integers(0, 50, (120, 32, 32)).astype(np.uint32)
values = [0, 7, 49, 50, 2**32 - 1]
stop = threading.Event()

def change():
    draw = np.random.default_rng(1)
    while not stop.is_set():
        cells = draw.integers(0, grids.size, 1000)
        grids.reshape(-1)[cells] = draw.choice(values if draw.random() < 0.05 else values[:3], 1000)

bpe = VisualBPE.train(grids[:50], 50, 100, sys.argv[1], num_threads=1)
thread = threading.Thread(target=change)
thread.start()
num_results = num_refusals = 0
try:
    for turn in range(10):
        grids[:] = turn % 50
        for work in (
            lambda: VisualBPE.train(grids, 50, 40, sys.argv[1], num_threads=1 + turn % 2),
            lambda: bpe.encode_batch(grids, num_threads=1 + turn % 2, return_regions=turn % 3 == 0),
            lambda: bpe.encode(grids[turn]),
        ):
            try:
                work()
                num_results += 1
            except GridError as error:
                assert "is not in the codebook" in str(error), error
                num_refusals += 1
finally:
    stop.set()
    thread.join()
print(num_results + num_refusals)
"""


@pytest.mark.parametrize("mode", ["pair", "oriented"])
def test_array_changed_by_another_thread(mode):
    """The result may be anything, but nothing crashes and nothing but a GridError is raised."""
    command = [sys.executable, "-c", CHANGING_ARRAY, mode]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parent)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "30\n"
