"""Training from blocks of grids, in parts, and taken up again: always the vocabulary of training in one go."""

import numpy as np
import pytest

from being_vl import VisualBPE
from being_vl.errors import BeingVLError, GridError

K = 6
RNG = np.random.default_rng(0)
SIZES = [(7, 9), (1, 12), (9, 7), (4, 4), (7, 9)] * 6
GRIDS = [np.kron(RNG.integers(0, K, (h, w)), np.ones((2, 1), int)) for h, w in SIZES]


class Blocks:
    """Blocks of a few grids that are made when they are asked for."""

    def __init__(self, size, dtype=np.uint16):
        self.parts = [GRIDS[i : i + size] for i in range(0, len(GRIDS), size)]
        self.dtype = dtype

    def blocks(self):
        return self

    def __len__(self):
        return len(self.parts)

    def __getitem__(self, i):
        part = self.parts[i]
        ids = np.concatenate([grid.ravel() for grid in part]).astype(self.dtype)
        return ids, np.array([len(grid) for grid in part]), np.array([grid.shape[1] for grid in part])


@pytest.fixture(params=["pair", "oriented"])
def options(request):
    return {"base_vocab_size": K, "num_merges": 60, "merge_mode": request.param}


@pytest.mark.parametrize(("size", "dtype"), [(1, np.uint8), (7, np.int64), (100, np.uint32)])
def test_blocks_are_grids(options, size, dtype):
    assert VisualBPE.train(Blocks(size, dtype), **options) == VisualBPE.train(GRIDS, **options)


def test_memory_mapped_array(options, tmp_path):
    grids = RNG.integers(0, K, (20, 8, 8), dtype=np.uint16)
    np.save(tmp_path / "grids.npy", grids)
    mapped_grids = np.load(tmp_path / "grids.npy", mmap_mode="r")
    assert VisualBPE.train(mapped_grids, **options) == VisualBPE.train(grids, **options)


@pytest.mark.parametrize("num_merges", [0, 1, 17, 59, 60])
@pytest.mark.parametrize("threads", [1, 2])
def test_resume_from_a_file(options, num_merges, threads, tmp_path):
    full_bpe = VisualBPE.train(GRIDS, **options)
    VisualBPE.train(GRIDS, **(options | {"num_merges": num_merges})).save(tmp_path / "part.json")
    part = VisualBPE.load(tmp_path / "part.json")
    resumed_bpe = VisualBPE.train(Blocks(5), **options, num_threads=threads, resume=part)
    assert resumed_bpe.to_json() == full_bpe.to_json()


def test_checkpoints(options):
    parts = []
    full_bpe = VisualBPE.train(GRIDS, **options, checkpoint=parts.append, checkpoint_every=25)
    assert [part.num_merges for part in parts] == [25, 50, 60]
    assert parts[-1] == full_bpe == VisualBPE.train(GRIDS, **options)
    assert all(part.merges == full_bpe.merges[: part.num_merges] for part in parts)


def test_what_was_learned_outlives_an_exception(options):
    class StoppedError(Exception):
        pass

    def stop(info):
        raise StoppedError(info.done)

    parts = []
    grids = np.concatenate([RNG.integers(0, 500, (200, 32, 32))] * 2)
    options |= {"base_vocab_size": 500, "num_merges": 20_000}
    with pytest.raises(StoppedError):
        VisualBPE.train(grids, **options, progress=stop, checkpoint=parts.append, checkpoint_every=10**9)
    (part,) = parts
    assert 0 < part.num_merges < 20_000
    options_of_part = options | {"num_merges": part.num_merges}
    assert part == VisualBPE.train(grids, **options_of_part)


def test_progress_tells_lengths(options):
    infos = []
    bpe = VisualBPE.train(GRIDS, **options, progress=infos.append)
    assert infos[-1].cells == sum(grid.size for grid in GRIDS)
    assert infos[-1].tokens == len(bpe.encode_batch(GRIDS).values)
    assert infos[-1].elapsed > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 0.1}, r"alpha was 0\.3, now it is 0\.1"),
        ({"sigma": 2.0}, "sigma was 1, now it is 2"),
        ({"min_frequency": 3}, "min_frequency was 2, now it is 3"),
        ({"base_vocab_size": 7}, "base_vocab_size was 6, now it is 7"),
        ({"num_merges": 5}, "it has 10 merges already, more than the 5 asked for"),
        ({"quantizer_name": "other"}, "the quantizer was unknown, now it is other"),
        ({"merge_mode": "oriented"}, "merge_mode was Pair, now it is Oriented"),
        ({"grids": GRIDS[1:]}, "the grids differ in number or size"),
    ],
)
def test_other_options_cannot_be_resumed(change, message):
    part = VisualBPE.train(GRIDS, K, 10)
    options = {"grids": GRIDS, "base_vocab_size": K, "num_merges": 20} | change
    with pytest.raises(BeingVLError, match=message):
        VisualBPE.train(**options, resume=part)


class ChangedBlocks(Blocks):
    """Blocks of which one is changed."""

    def __init__(self, **change):
        super().__init__(10)
        self.change = change

    def __getitem__(self, i):
        block = dict(zip(("ids", "heights", "widths"), super().__getitem__(i), strict=True))
        return tuple((block | (self.change if i == 1 else {})).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": np.zeros(5, int)}, "block 1: 10 heights and 10 widths make .* cells, and there are 5 ids"),
        ({"heights": np.zeros(0, int)}, "block 1: 0 heights and 10 widths make 0 cells"),
        ({"ids": np.zeros((5, 5), int)}, r"ids of block 1: expected a 1-D array, got shape \(5, 5\)"),
    ],
)
def test_blocks_that_do_not_fit(change, message):
    with pytest.raises(GridError, match=message):
        VisualBPE.train(ChangedBlocks(**change), K)


def test_ids_outside_the_codebook_are_found_in_blocks():
    ids = Blocks(10)[1][0].astype(np.int64)
    ids[14 * 9 + 12 + 12 + 5] = -3
    with pytest.raises(GridError, match="grid 12, row 0, column 5: id -3"):
        VisualBPE.train(ChangedBlocks(ids=ids), K)
