"""`being-vl vocab train`: where grids come from, the report, stopping and going on."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from being_vl import VisualBPE
from being_vl.files import sha256
from being_vl.shards.arrow import shard_path, write_table
from being_vl.shards.grids import GridStore, grid_columns
from being_vl.tokenizer import corpus
from being_vl.tokenizer.report import last_worthwhile_merge_count
from helpers.commands import being_vl, expect_refusal
from helpers.photos import PHOTOS, PHOTOS_K
from helpers.vocabularies import folder_of_grids, make_grids, train

# Where grids come from


def test_arrays_archives_and_folders_teach_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "BLOCK_CELLS", 5000)  # several blocks per file
    np.save(tmp_path / "all.npy", PHOTOS)
    np.save(tmp_path / "fortran.npy", np.asfortranarray(PHOTOS.astype(">i8")))
    np.savez(tmp_path / "all.npz", grids=PHOTOS, others=np.ones(3))
    np.save(tmp_path / "first.npy", PHOTOS[:7].astype(np.uint32))
    np.savez_compressed(tmp_path / "rest.npz", grids=PHOTOS[7:])
    expected = VisualBPE.train(PHOTOS, PHOTOS_K, 200)
    for n, names in enumerate((["all.npy"], ["fortran.npy"], ["all.npz"], ["first.npy", "rest.npz"])):
        assert train([tmp_path / name for name in names], tmp_path / f"{n}.json") == 0
        assert VisualBPE.load(tmp_path / f"{n}.json") == expected


def test_folders_with_grids_of_many_sizes(tmp_path: Path) -> None:
    grids = make_grids()
    grid_folder = folder_of_grids(tmp_path / "one", grids, shard_size=4)
    parts = [folder_of_grids(tmp_path / "a", grids[:9]), folder_of_grids(tmp_path / "b", grids[9:])]
    assert train(grid_folder, tmp_path / "1.json", size=None) == 0
    assert train(parts, tmp_path / "2.json", size=None) == 0
    expected = VisualBPE.train(
        grids, PHOTOS_K, 200, quantizer_name="vq", quantizer_fingerprint="vq-fingerprint"
    )
    write_table(
        shard_path(grid_folder, "grids", 1), grid_columns([], PHOTOS_K), {}
    )  # as if none of its images had been readable
    manifest = json.loads((grid_folder / "manifest.json").read_text())
    manifest["shards"][1] |= {"grids": 0, "sha256": sha256(shard_path(grid_folder, "grids", 1))}
    (grid_folder / "manifest.json").write_text(json.dumps(manifest))
    assert train(grid_folder, tmp_path / "3.json", "--held_out_every", 3, size=None) == 0
    assert VisualBPE.load(tmp_path / "3.json").num_grids == 14
    assert VisualBPE.load(tmp_path / "1.json") == VisualBPE.load(tmp_path / "2.json") == expected


def test_a_store_gives_its_files_without_a_copy(tmp_path: Path) -> None:
    grids = make_grids()
    store = GridStore.open(folder_of_grids(tmp_path / "grids", grids, shard_size=10))
    blocks = store.blocks()
    assert [len(heights) for _, heights, _ in blocks] == [10, 10, 5]
    for ids, _, _ in blocks:
        assert not ids.flags.owndata
        assert not ids.flags.writeable
    ids = np.concatenate([ids for ids, _, _ in blocks])
    assert np.array_equal(ids, np.concatenate([grid.ravel() for grid in grids]))
    sizes = [(h, w) for _, heights, widths in blocks for h, w in zip(heights, widths, strict=True)]
    assert sizes == [grid.shape for grid in grids]


# The report


def report(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(out.with_name(out.stem + ".report.json").read_text())
    return content


@pytest.mark.parametrize("mode", ["pair", "oriented"])
def test_held_out_report(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "BLOCK_CELLS", 5000)
    np.save(tmp_path / "grids.npy", PHOTOS)
    out = tmp_path / "v.json"
    assert train(tmp_path / "grids.npy", out, "--held_out_every", 6, "--merge_mode", mode) == 0
    held_out = np.arange(len(PHOTOS)) % 6 == 5
    bpe = VisualBPE.load(out)
    assert bpe == VisualBPE.train(PHOTOS[~held_out], PHOTOS_K, 200, mode)

    report_content = report(out)
    for part, grids in (
        (report_content["training"], PHOTOS[~held_out]),
        (report_content["held_out"], PHOTOS[held_out]),
    ):
        tokens = len(bpe.encode_batch(grids).values)
        assert (part["grids"], part["cells"], part["tokens"]) == (len(grids), grids.size, tokens)
        assert part["ratio"] == tokens / grids.size
        assert part["tokens_per_grid"] == tokens / len(grids)
    token_counts = np.bincount(bpe.encode_batch(PHOTOS[held_out]).values, minlength=bpe.vocab_size)
    unused_counts = report_content["held_out"]["unused"]
    assert unused_counts["codebook_ids"] == (token_counts[:PHOTOS_K] == 0).sum()
    assert unused_counts["merged_tokens"] == (token_counts[PHOTOS_K:] == 0).sum()
    assert unused_counts["merges"] <= unused_counts["merged_tokens"]

    curve = report_content["held_out"]["curve"]
    assert [curve[0]["merges"], curve[-1]["merges"]] == [0, 200]
    for point in curve:
        first = bpe.truncate(point["merges"])
        assert len(first.encode_batch(PHOTOS[held_out]).values) == point["tokens"]


def test_a_share_is_drawn_by_its_seed(tmp_path: Path) -> None:
    folder = folder_of_grids(tmp_path / "grids", make_grids(), shard_size=4)
    for name, seed in (("a", 1), ("again", 1), ("b", 2)):
        assert train(folder, tmp_path / f"{name}.json", "--held_out", 0.2, "--seed", seed, size=None) == 0
        assert report(tmp_path / f"{name}.json")["held_out"]["grids"] == 5
    a, again, b = (VisualBPE.load(tmp_path / f"{name}.json") for name in ("a", "again", "b"))
    assert a == again != b
    assert a.num_grids == 20


def test_report_on_the_terminal(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    np.save(tmp_path / "grids.npy", PHOTOS)
    with caplog.at_level("INFO", logger="being_vl"):
        assert train(tmp_path / "grids.npy", tmp_path / "v.json", "--held_out", 0.25) == 0
    held_out = report(tmp_path / "v.json")["held_out"]
    assert f"held out: 12 grids, {held_out['tokens_per_grid']:.1f} tokens per grid" in caplog.text
    assert f"{held_out['unused']['merged_tokens']} of 200 merged tokens" in caplog.text
    assert "instead of" in caplog.text

    caplog.clear()
    with caplog.at_level("INFO", logger="being_vl"):
        assert train(tmp_path / "grids.npy", tmp_path / "few.json", "--min_frequency", 900) == 0
    num_merges = VisualBPE.load(tmp_path / "few.json").num_merges
    assert 0 < num_merges < 200
    assert f"no pair is left that occurs 900 times: {num_merges} merges instead of 200" in caplog.text
    assert "no grids held out" in caplog.text


def test_progress_in_lines_where_there_is_no_terminal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("being_vl.tokenizer.train.LOG_SECONDS", 0)
    np.save(tmp_path / "grids.npy", PHOTOS)
    with caplog.at_level("INFO", logger="being_vl"):
        assert train(tmp_path / "grids.npy", tmp_path / "v.json", merges=50) == 0
    info = VisualBPE.load(tmp_path / "v.json").merge_infos[-1]
    ratio = report(tmp_path / "v.json")["training"]["ratio"]
    line = next(line for line in caplog.messages[::-1] if line.startswith("merge 50 of 50"))
    assert f"per second: ({info.a}, {info.b}) N={info.n} S={info.s:.3f}, {ratio:.1%} of the length" in line


def test_a_vocabulary_without_merges(tmp_path: Path) -> None:
    np.save(tmp_path / "grids.npy", np.arange(32).reshape(2, 4, 4))
    assert train(tmp_path / "grids.npy", tmp_path / "v.json", "--held_out", 0.5) == 0
    report_content = report(tmp_path / "v.json")
    assert report_content["num_merges"] == 0
    assert report_content["held_out"]["tokens"] == 16
    assert report_content["statistics"]["n"] == {}
    assert being_vl("vocab", "show", tmp_path / "v.json") == 0
    assert being_vl("vocab", "merge-stats", tmp_path / "v.json") == 0


def test_up_to_which_number_merges_are_worthwhile() -> None:
    """The last number of merges at which a tenth more of them saved 1 %."""
    lengths = np.concatenate([1000 * 0.999 ** np.arange(151), np.full(300, 1000 * 0.999**150)])
    # From 164 to 149.09 merges there is less than one merge that saves, from 165 to 150 none.
    savings = {m: 1 - lengths[m] / lengths[m * 10 // 11] for m in range(1, 451)}
    assert last_worthwhile_merge_count(lengths) == max(m for m, share in savings.items() if share >= 0.01)
    assert 140 < last_worthwhile_merge_count(lengths) < 165
    assert last_worthwhile_merge_count(np.full(100, 1000)) == 0
    assert last_worthwhile_merge_count(np.array([1000])) == 0
    assert last_worthwhile_merge_count(1000 - np.arange(501)) == 500


# Stopping and going on


NOISE = {"size": 256, "merges": 16000}


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Grids that take a while to learn from, and what is learned without interruption."""
    folder = tmp_path_factory.mktemp("noise")
    np.save(folder / "grids.npy", np.random.default_rng(0).integers(256, size=(500, 32, 32), dtype=np.uint16))
    assert train(folder / "grids.npy", folder / "whole.json", **NOISE) == 0
    return folder / "grids.npy", folder / "whole.json"


def stop_training(grids: Path, out: Path, number: signal.Signals) -> tuple[int, str]:
    """Start a training, send a signal after the first checkpoint, and return the status and what was said."""
    words = ["vocab", "train", grids, "--out", out, "--codebook_size", NOISE["size"]]
    words += ["--num_merges", NOISE["merges"], "--checkpoint_every", 200]
    for _ in range(10):
        process = subprocess.Popen(
            [sys.executable, "-m", "being_vl", *map(str, words)], stderr=subprocess.PIPE, text=True
        )
        while process.poll() is None and not out.with_name(out.stem + ".partial.json").exists():
            time.sleep(0.001)
        process.send_signal(number)
        _, output = process.communicate(timeout=60)
        if process.returncode:
            return process.returncode, output
        out.unlink()  # it had ended before the signal came
    pytest.fail("ten trainings ended before they could be stopped")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_training_goes_on(
    number: signal.Signals,
    noise: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    grids, complete_path = noise
    out, partial_path = tmp_path / "v.json", tmp_path / "v.partial.json"
    status, output = stop_training(grids, out, number)
    bpe = VisualBPE.load(partial_path)
    assert not out.exists()
    assert 200 <= bpe.num_merges < NOISE["merges"]
    assert bpe == VisualBPE.load(complete_path).truncate(bpe.num_merges)
    if number == signal.SIGINT:
        assert status == 130, output
        assert f"{partial_path}: the {bpe.num_merges} merges learned so far" in output
        assert "the same command goes on from there" in output
        assert "Traceback" not in output

    for change, difference in CHANGES:
        assert difference in expect_refusal(capsys, train(grids, out, *change, **NOISE))
    for name, difference in write_other_grids(grids, tmp_path).items():
        assert difference in expect_refusal(capsys, train(tmp_path / name, out, **NOISE))

    monkeypatch.setattr("being_vl.tokenizer.train.LOG_SECONDS", 0)
    with caplog.at_level("INFO", logger="being_vl"):
        assert train(grids, out, **NOISE) == 0
    assert f"going on after {bpe.num_merges} merges" in caplog.text
    numbers = [int(line.split()[1]) for line in caplog.messages if line.startswith("merge ")]
    assert min(numbers) > bpe.num_merges
    assert out.read_bytes() == complete_path.read_bytes()
    names = ["v.fingerprint.json", "v.json", "v.report.json"]
    assert sorted(path.name for path in tmp_path.glob("v.*")) == names
    assert report(out)["training"] == report(complete_path)["training"]


CHANGES = [
    (("--alpha", 0.5), "alpha was 0.3, is 0.5"),
    (("--merge_mode", "oriented"), "merge_mode was 'pair', is 'oriented'"),
    (("--held_out", 0.1), "held_out was 0.0, is 0.1"),
    (("--codebook_size", 300), "codebook_size was 256, is 300"),
    (("--num_merges", 100), "num_merges was 16000, is 100"),
]


def write_other_grids(grids: Path, folder: Path) -> dict[str, str]:
    """Files of grids with a changed id and with a grid less, and by what they are known to differ."""
    other_grids = np.load(grids)
    other_grids[17, 3, 4] ^= 1
    np.save(folder / "other.npy", other_grids)
    np.save(folder / "fewer.npy", other_grids[1:])
    return {"other.npy": "ids_sha256", "fewer.npy": "grids was 500, is 499"}


def test_a_finished_vocabulary_is_kept_or_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "grids.npy", PHOTOS)
    out = tmp_path / "v.json"
    assert train(tmp_path / "grids.npy", out) == 0
    content, mtime = out.read_bytes(), out.stat().st_mtime_ns

    # The same options keep it, with as many threads and from wherever the grids lie.
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "grids.npy").rename(tmp_path / "elsewhere" / "grids.npy")
    grids = tmp_path / "elsewhere" / "grids.npy"
    with caplog.at_level("INFO", logger="being_vl"):
        assert train(grids, out, "--num_threads", 1, "--overwrite") == 0
    assert "v.json: finished before, kept" in caplog.text
    assert out.stat().st_mtime_ns == mtime

    # Other options are refused and change nothing, unless they are to overwrite.
    assert "num_merges was 200, is 100" in expect_refusal(capsys, train(grids, out, merges=100))
    assert out.read_bytes() == content
    assert train(grids, out, "--overwrite", merges=100) == 0
    assert VisualBPE.load(out) == VisualBPE.train(PHOTOS, PHOTOS_K, 100)
    assert train(grids, out, merges=100) == 0


def test_a_partial_vocabulary_is_overwritten(noise: tuple[Path, Path], tmp_path: Path) -> None:
    grids, _ = noise
    out = tmp_path / "v.json"
    stop_training(grids, out, signal.SIGKILL)
    assert train(grids, out, "--overwrite", size=256, merges=100) == 0
    assert VisualBPE.load(out).num_merges == 100
    assert not (tmp_path / "v.partial.json").exists()


def test_a_file_of_unknown_origin_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "grids.npy", PHOTOS)
    out = tmp_path / "v.json"
    VisualBPE.train(PHOTOS, PHOTOS_K, 200).save(out)
    assert "no v.fingerprint.json" in expect_refusal(capsys, train(tmp_path / "grids.npy", out))
    assert train(tmp_path / "grids.npy", out, "--overwrite") == 0

    records = tmp_path / "records.json"
    records.write_text("[]")
    for flags in ([], ["--overwrite"]):
        line = expect_refusal(capsys, train(tmp_path / "grids.npy", records, *flags))
        assert "is there, and is no vocabulary" in line
    assert records.read_text() == "[]"


def test_partial_vocabularies_whose_fingerprint_is_damaged(
    noise: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grids, complete_path = noise
    out, partial_path, fingerprint = (
        tmp_path / name for name in ("v.json", "v.partial.json", "v.fingerprint.json")
    )
    VisualBPE.load(complete_path).truncate(600).save(partial_path)
    for content in (None, "{", "[]"):
        if content:
            fingerprint.write_text(content)
        assert "v.fingerprint.json" in expect_refusal(capsys, train(grids, out, **NOISE))


@pytest.mark.parametrize(
    ("shape", "sizes", "warning"),
    [
        ((7, 8, 9), "grids: 7 of 8x9;", None),
        ((3, 1, 64), "grids: 3 of 1x64;", "no cells lie below each other"),
        ((3, 64, 1), "grids: 3 of 64x1;", "no cells lie beside each other"),
        ((1200, 2, 2), "grids: 1,200 of 2x2;", None),
    ],
)
def test_the_sizes_of_the_grids_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, shape: tuple[int, ...], sizes: str, warning: str | None
) -> None:
    np.save(tmp_path / "grids.npy", np.arange(np.prod(shape)).reshape(shape) % 4)
    caplog.set_level("INFO", "being_vl")
    assert train(tmp_path / "grids.npy", tmp_path / "out.json", merges=2, size=4) == 0
    line, account = (message for message in caplog.messages if message.startswith("grids: "))
    assert account == caplog.messages[-1]
    assert line.startswith(sizes)
    assert ("no cells lie" in line) == (warning is not None)
    assert warning is None or warning in line


def test_the_sizes_of_several_files_are_told_together(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    grids = [np.zeros((1, width), int) for width in (1, 2, 3, 4, 5, 6, 6)]
    folders = [
        folder_of_grids(tmp_path / name, part, 2) for name, part in (("a", grids[:4]), ("b", grids[4:]))
    ]
    caplog.set_level("INFO", "being_vl")
    assert train(folders, tmp_path / "out.json", merges=1, size=None) == 0
    line, account = (message for message in caplog.messages if message.startswith("grids: "))
    assert account == caplog.messages[-1]
    assert line.startswith(
        "grids: 2 of 1x6, 1 of 1x1, 1 of 1x2, 1 of 1x3, 1 of 1x4 and 1 other size; no cells"
    )
    assert being_vl("grids", "info", folders[1]) == 0
    assert "3: 2 of 1x6, 1 of 1x5; no cells lie below each other" in capsys.readouterr().out
