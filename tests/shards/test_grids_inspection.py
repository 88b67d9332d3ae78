"""`being-vl grids info`, `verify` and `decode`."""

import json
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from being_vl.quantizer.models.tiled import VQGAN
from helpers import tiny
from helpers.commands import being_vl, expect_refusal

CODES = 16


@pytest.fixture(scope="module")
def quantizer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, VQGAN]:
    folder = tmp_path_factory.mktemp("quantizer")
    return folder, tiny.quantizer(folder, codebook_size=CODES)


@pytest.fixture
def content() -> dict[str, NDArray[np.int64]]:
    rng = np.random.default_rng(0)
    shapes = [(4, 4)] * 5 + [(2, 7), (1, 1), (5, 3)]
    return {f"{n}.png": rng.integers(0, rng.integers(2, CODES), shape) for n, shape in enumerate(shapes)}


def entropy(counts: Counter[Any]) -> float:
    total = sum(counts.values())
    return -sum(n / total * math.log2(n / total) for n in counts.values())


def test_info_counts_as_a_slow_loop_does(
    content: dict[str, NDArray[np.int64]],
    quantizer: tuple[Path, VQGAN],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny.write_grids(tmp_path, content, quantizer[1], failures={"bad.png": "bad.png: gone"})
    assert being_vl("grids", "info", tmp_path, "--format", "json") == 0
    facts = json.loads(capsys.readouterr().out)
    grids = [grid.tolist() for grid in content.values()]
    ids = Counter(i for grid in grids for row in grid for i in row)
    right_pairs = Counter(pair for grid in grids for row in grid for pair in pairwise(row))
    columns = [list(zip(*grid, strict=True)) for grid in grids]
    down_pairs = Counter(pair for grid in columns for row in grid for pair in pairwise(row))
    assert (facts["grids"], facts["failures"], facts["cells"]) == (8, 1, 5 * 16 + 14 + 1 + 15)
    assert facts["sizes"][0] == [4, 4, 5]
    assert facts["counts"] == [ids[i] for i in range(CODES)]
    assert facts["ids_used"] == len(ids)
    assert facts["entropy_bits"] == pytest.approx(entropy(ids))
    assert [n for _, n in facts["most_frequent"]] == [n for _, n in ids.most_common(5)]
    for name, pairs in (("right", right_pairs), ("down", down_pairs)):
        statistics = facts["neighbours"][name]
        assert statistics["distinct"] == len(pairs)
        assert statistics["equal"] == pytest.approx(
            sum(n for (a, b), n in pairs.items() if a == b) / pairs.total()
        )
        first_counts, second_counts = Counter(), Counter()  # type: Counter[int], Counter[int]
        for (a, b), n in pairs.items():
            first_counts[a] += n
            second_counts[b] += n
        information = entropy(first_counts) + entropy(second_counts) - entropy(pairs)
        assert statistics["mutual_information_bits"] == pytest.approx(information)

    assert being_vl("grids", "info", tmp_path, "--top", 2) == 0
    text = capsys.readouterr().out
    assert f"{quantizer[1].fingerprint[:12]}" in text
    assert "8: 5 of 4x4, 1 of" in text


def test_info_of_single_cells(quantizer: tuple[Path, VQGAN], tmp_path: Path) -> None:
    tiny.write_grids(tmp_path, {"a.png": np.zeros((1, 1), np.int64)}, quantizer[1])
    assert being_vl("grids", "info", tmp_path) == 0


def test_verify_finds_what_is_missing_changed_or_too_much(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from being_vl.quantizer.job import quantize
    from being_vl.quantizer.options import QuantizeOptions

    out = tmp_path / "grids"
    quantize(QuantizeOptions(chain / "data" / "images", out, str(chain / "quantizer"), shard_size=5))
    assert being_vl("grids", "verify", out) == 0
    assert "5 shards, 24 grids" in capsys.readouterr().out
    files = [out / f"grids-{n:05d}.arrow" for n in range(5)]
    files[0].unlink()
    data = bytearray(files[1].read_bytes())
    data[len(data) // 2] ^= 1
    files[1].write_bytes(data)
    files[2].write_bytes(files[3].read_bytes())
    (out / "grids-00009.arrow").touch()
    message = expect_refusal(capsys, being_vl("grids", "verify", out))
    assert "grids-00000.arrow: missing" in message
    assert "grids-00001.arrow: checksum" in message
    assert "grids-00003.arrow: key" in message
    assert "is in grids-00002.arrow as well" in message
    assert "grids-00009.arrow: not in the manifest" in message
    (out / "manifest.json").unlink()
    assert "no manifest.json" in expect_refusal(capsys, being_vl("grids", "verify", out))


def test_decode_draws_a_sheet(
    content: dict[str, NDArray[np.int64]],
    quantizer: tuple[Path, VQGAN],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, vqgan = quantizer
    tiny.write_grids(tmp_path / "grids", content, vqgan)
    out = tmp_path / "sheet.png"
    command = ("grids", "decode", tmp_path / "grids", "--out", out, "--quantizer", folder)
    assert being_vl(*command, "--key", "5.png", "0.png") == 0
    sheet = np.asarray(Image.open(out))
    assert sheet.shape == (4 + 36, 4 + 2 * (56 + 4), 3)
    for left, key in ((4, "5.png"), (64, "0.png")):
        (image,) = vqgan.decode([content[key]])
        np.testing.assert_array_equal(sheet[4 : 4 + image.height, left : left + image.width], image)
    assert being_vl(*command, "--count", 3, "--side", 16) == 0
    assert max(Image.open(out).size) <= 4 + 2 * 20
    capsys.readouterr()
    assert "no grid 'x'" in expect_refusal(capsys, being_vl(*command, "--key", "x"))
    tiny.quantizer(tmp_path / "other", codebook_size=CODES, seed=1, name="other")
    message = expect_refusal(capsys, being_vl(*command[:-1], tmp_path / "other"))
    assert "'tiny'" in message
    assert "'other'" in message
