"""Arrays that are no grids, or that change meanwhile: one clear error with the grid's number, or the right result."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from being_vl import VisualBPE
from being_vl.errors import GridError

K = 4
GOOD = np.array([[0, 1, 0], [2, 3, 2]])


@pytest.fixture(scope="module", params=["pair", "oriented"])
def bpe(request):
    return VisualBPE.train([GOOD] * 3, K, 3, request.param)


def refused(bpe, bad, error, message):
    """The array is refused as the second grid of a training set and of a batch, and alone."""
    for call in (lambda: VisualBPE.train([GOOD, bad], K), lambda: bpe.encode_batch([GOOD, bad])):
        with pytest.raises(error, match=message):
            call()
    with pytest.raises(error, match=message.replace("grid 1", "grid 0")):
        bpe.encode(bad)


@pytest.mark.parametrize("bad", [-1, K, 255, 2**31, 2**32, -(2**63)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_ids_that_are_in_no_codebook(bpe, bad, order):
    grid = np.array(GOOD, np.int64, order=order)
    grid[1, 2] = bad
    refused(
        bpe, grid, GridError, f"grid 1, row 1, column 2: id {bad} is not in the codebook, expected 0 to 3"
    )
    refused(bpe, grid[::-1], GridError, f"grid 1, row 0, column 2: id {bad} ")


@pytest.mark.parametrize(
    "bad",
    [
        np.full((2, 2), np.nan),
        np.array([[0.0, np.inf]]),
        np.zeros((2, 2), np.float16),
        np.zeros((2, 2), complex),
        np.zeros((2, 2), bool),
        np.zeros((2, 2), object),
        np.zeros((2, 2), "M8[s]"),
        np.zeros((2, 2), "i4,i4"),
        np.array([["0", "1"]]),
        [[2**70]],
        [[None]],
        "0",
    ],
    ids=repr,
)
def test_what_is_no_integers(bpe, bad):
    refused(bpe, bad, TypeError, "grid 1: expected integers, got dtype")


@pytest.mark.parametrize("shape", [(), (3,), (1, 2, 3), (1, 1, 2, 3)])
def test_wrong_rank(bpe, shape):
    text = str(shape).replace("(", r"\(").replace(")", r"\)")
    refused(bpe, np.zeros(shape, int), GridError, rf"grid 1: expected an \(H, W\) array, got shape {text}")


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_no_cells(bpe, shape):
    refused(bpe, np.zeros(shape, int), GridError, f"grid 1 is {shape[0]}x{shape[1]}; expected at least one")


def test_ragged_rows(bpe):
    refused(bpe, [[1, 2], [3]], ValueError, "grid 1|inhomogeneous")


def test_layouts_that_must_work(bpe, tmp_path):
    """Fortran order, views, read-only and memory-mapped arrays give what plain ones give."""
    rng = np.random.default_rng(0)
    plain = rng.integers(0, K, (7, 6, 5))
    np.save(tmp_path / "grids.npy", plain.astype(np.uint16))
    read_only = plain.copy()
    read_only.flags.writeable = False
    wide = np.zeros((7, 12, 15), np.int32)
    wide[:, ::2, ::3] = plain
    layouts = {
        "Fortran": np.asfortranarray(plain),
        "read-only": read_only,
        "memory-mapped": np.load(tmp_path / "grids.npy", mmap_mode="r"),
        "strided": wide[:, ::2, ::3],
        "transposed": np.ascontiguousarray(plain.transpose(2, 1, 0)).transpose(2, 1, 0),
        "backwards": np.ascontiguousarray(plain[::-1, ::-1, ::-1])[::-1, ::-1, ::-1],
        "big-endian": plain.astype(">i8"),
        "grids of their own": [np.asfortranarray(grid) for grid in plain],
    }
    expected = VisualBPE.train(plain.tolist(), K, 20, bpe.merge_mode)
    values = expected.encode_batch(plain.tolist()).values
    for name, grids in layouts.items():
        assert VisualBPE.train(grids, K, 20, bpe.merge_mode) == expected, name
        assert np.array_equal(expected.encode_batch(grids).values, values), name
        assert np.array_equal(expected.encode(grids[3]), expected.encode(plain[3].tolist())), name


def test_more_merges_than_the_data_yields():
    """Training stops by itself; the vocabulary and the last report say how far it came."""
    seen = []
    bpe = VisualBPE.train([GOOD] * 3, K, 1000, progress=seen.append)
    assert 0 < bpe.num_merges < 6
    assert (seen[-1].done, seen[-1].total) == (bpe.num_merges, 1000)
    assert len(bpe.encode(GOOD)) == 1


CHANGED_MEANWHILE = """
import sys, threading
import numpy as np
from being_vl import VisualBPE
from being_vl.errors import GridError

rng = np.random.default_rng(0)
grids = rng.integers(0, 50, (120, 32, 32)).astype(np.uint32)
values = [0, 7, 49, 50, 2**32 - 1]
done = threading.Event()

def change():
    draw = np.random.default_rng(1)
    while not done.is_set():
        cells = draw.integers(0, grids.size, 1000)
        grids.reshape(-1)[cells] = draw.choice(values if draw.random() < 0.05 else values[:3], 1000)

bpe = VisualBPE.train(grids[:50], 50, 100, sys.argv[1], num_threads=1)
thread = threading.Thread(target=change)
thread.start()
finished = refused = 0
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
                finished += 1
            except GridError as error:
                assert "is not in the codebook" in str(error), error
                refused += 1
finally:
    done.set()
    thread.join()
print(finished + refused)
"""


@pytest.mark.parametrize("mode", ["pair", "oriented"])
def test_array_changed_by_another_thread(mode):
    """What is learned is anyone's guess, but nothing crashes and nothing but a GridError is raised."""
    command = [sys.executable, "-c", CHANGED_MEANWHILE, mode]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parent)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "30\n"
