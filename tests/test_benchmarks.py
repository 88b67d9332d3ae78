"""The benchmarks run, on a few grids and a few merges; nothing is said of their times."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import being_vl
from being_vl import VisualBPE
from helpers import tiny

ROOT = Path(__file__).parent.parent
PHOTOS = np.load(ROOT / "tests" / "helpers" / "photo_grids.npz")["grids"]
K = 1024


def python(*words):
    command = [sys.executable, *(str(word) for word in words)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_a_version_gives_the_same_as_itself(tmp_path):
    np.save(tmp_path / "few.npy", PHOTOS[:6])
    package = Path(being_vl.__file__).parents[1]
    settings = "--grids", tmp_path / "few.npy", "--merges", 20, "--rounds", 1
    lines = python("-m", "benchmarks.bpe.versions", package, package, *settings).splitlines()
    assert len([line for line in lines if line.endswith(": the same")]) == 12
    assert len([line for line in lines if line.endswith("times (1 rounds)")]) == 4


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_measurements_tables_and_plots(tmp_path):
    np.save(tmp_path / "few.npy", PHOTOS[:12])
    results = tmp_path / "results.json"
    sizes = ("--count", 12, "--counts", 4, 12, "--merges", 1024, "--small", 3, 4, "--codebook-size", K)
    few = ("--threads", 1, 2, "--modes", "pair", "--alphas", 0, 1, "--repeats", 1, "--vbpe", tmp_path)
    parts = ("--parts", "compare", "merges", "images", "threads", "alpha", "encode", "small")
    python("-m", "benchmarks.bpe", results, "--grids", tmp_path / "few.npy", *sizes, *few, *parts)
    measurements = json.loads(results.read_text())["measurements"]
    failed_contenders = {entry["job"]["contender"] for entry in measurements if "error" in entry["runs"][0]}
    assert failed_contenders == {"vBPE"}  # there is none at that path
    lengths = {
        entry["job"]["contender"]: entry["runs"][0]["tokens"]
        for entry in measurements
        if entry["job"]["part"] == "small"
        and entry["job"].get("alpha", 0.3) == 0.3
        and "error" not in entry["runs"][0]
    }
    assert lengths["recount"] == lengths["being-vl"] < 3 * 32 * 32
    assert str(tmp_path) not in json.dumps([entry["job"] for entry in measurements])

    page = tmp_path / "page.md"
    page.write_text(
        "Before.\n<!-- bpe: alpha -->\nold\n<!-- end -->\nAfter.\n<!-- bpe: threads -->\n<!-- end -->\n"
    )
    python("-m", "benchmarks.bpe.report", results, "--into", page, "--images", tmp_path)
    text = page.read_text()
    assert re.match(r"Before\.\n<!-- bpe: alpha -->\n.*, \d+ cores, tokenizers .*\n\n\| mode \|", text)
    assert "<!-- end -->\nAfter.\n" in text
    assert all(
        text.count(f"| 12 | {programs} | {threads} |") == 1 for programs, threads in [(1, 1), (1, 2), (2, 1)]
    )
    assert "old" not in text
    for name in ("bpe-merges.svg", "bpe-grids.svg"):
        assert "tokenizers, 1-D" in (tmp_path / name).read_text()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_naive_recount_learns_the_same(alpha, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.bpe import naive

    merges, regions = naive.train(PHOTOS[:3], K, 25, alpha)
    bpe = VisualBPE.train(PHOTOS[:3], K, 25, alpha=alpha)
    assert merges == bpe.merges
    assert regions.tokens() == len(bpe.encode_batch(PHOTOS[:3]).values)


def test_statistics_of_grids(tmp_path):
    np.save(tmp_path / "photos.npy", PHOTOS)
    table = python("-m", "benchmarks.bpe.grids", "--describe", tmp_path / "photos.npy")
    share = (PHOTOS[:, :, 1:] == PHOTOS[:, :, :-1]).mean()
    assert f"| {share:.4g} |" in table.splitlines()[-1]


def test_grids_are_of_images(tmp_path):
    """Those of a folder; what is plain stays plain, and the same seed gives the same."""
    Image.new("RGB", (300, 400), (200, 30, 30)).save(tmp_path / "plain.png")
    for name in ("one.npy", "two.npy"):
        python("-m", "benchmarks.bpe.grids", tmp_path / name, "--count", 2, "--images", tmp_path)
    first_grids = np.load(tmp_path / "one.npy")
    assert (first_grids.shape, first_grids.dtype, len(np.unique(first_grids))) == ((2, 32, 32), np.uint16, 1)
    np.testing.assert_array_equal(first_grids, np.load(tmp_path / "two.npy"))
    python("-m", "benchmarks.bpe.grids", tmp_path / "demo.npy", "--count", 6)
    grids = np.load(tmp_path / "demo.npy")
    assert len(np.unique(grids, axis=0)) == 6
    assert 200 < len(np.unique(grids)) <= grids.max() + 1 <= 4096


def test_the_speed_of_quantizing():
    table = python("-m", "benchmarks.quantize", "--count", 6, "--batch-size", 4, "--workers", 0, 1)
    rows = [line.split()[1::2] for line in table.splitlines()[2:]]
    assert [row[0] for row in rows] == ["0", "1"]
    for _, _, times, encoding, waiting in rows:
        assert float(times) > 0
        assert int(encoding[:-1]) + int(waiting[:-1]) == pytest.approx(100, abs=1)


def test_the_speed_of_reading_records():
    table = python("-m", "benchmarks.records", "--count", 50).splitlines()
    assert [line.split()[1] for line in table[2:]] == ["json", "jsonl", "messages", "parquet", "tar"]


def test_the_speed_of_preparing_records(tmp_path):
    model = tiny.expanded(tmp_path, ["a.png"])[0]
    command = ["-m", "benchmarks.prepare", "--model", model, "--grids", tmp_path / "grids"]
    header, _, row = python(*command, "--count", 30, "--opened", 60).splitlines()
    cells = dict(zip(header.split("|")[1:-1], row.split("|")[1:-1], strict=True))
    assert (cells[" records "], cells[" opened "]) == (" 30 ", " 60 ")
