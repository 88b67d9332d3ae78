"""The whole chain as a recipe, and the command line around it."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml

from being_vl import VisualBPE
from being_vl.shards.grids import GridStore
from being_vl.training.log import read_log
from helpers.commands import being_vl, expect_refusal

STAGES = [
    {"name": "rows", "unfreeze": 0.0, "learning_rate": 1e-3, "max_steps": 2, "mixture": {"foundation": 1}},
    {"name": "all", "unfreeze": "all", "learning_rate": 1e-3, "max_steps": 2, "mixture": {"reasoning": 1}},
]


def write_recipe(chain: Path, out: Path, **changes: object) -> Path:
    options = {
        "images": str(chain / "data" / "images"),
        "records": [str(chain / "data" / "train.json")],
        "llm": str(chain / "llm"),
        "out": str(out),
        "quantizer": str(chain / "quantizer"),
        "ranks": 1,
        "vocab": {"num_merges": 16},
        "train": {"stages": STAGES, "batches": {"micro_batch_size": 2}},
    }
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(options | changes))
    return path


@pytest.fixture(scope="module")
def finished_run(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished run: its recipe and its folder."""
    out = tmp_path_factory.mktemp("run") / "mine"
    path = write_recipe(chain, out)
    assert being_vl("run", str(path)) == 0
    return path, out


def test_run_makes_every_part(
    finished_run: tuple[Path, Path], chain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out = finished_run
    for part in (
        "grids/manifest.json",
        "vocabulary.json",
        "expanded/being_vl.json",
        "training/all/config.json",
    ):
        assert (out / part).is_file()
    assert len(VisualBPE.load(out / "vocabulary.json").merges) == 16
    seconds = {file.stem: json.loads(file.read_text())["seconds"] for file in (out / "steps").glob("*.json")}
    assert seconds.keys() == {"quantize", "vocab", "expand", "train"}
    image_path = chain / "data" / "images" / "train-00000.png"
    ask = ["generate", "--model", str(out / "training" / "all"), "--image", str(image_path)]
    assert being_vl(*ask, "--prompt", "how many objects are there?", "--max_new_tokens", "4") == 0
    assert capsys.readouterr().out.count("\n") == 1


def test_second_run_skips_and_other_options_are_refused(
    finished_run: tuple[Path, Path], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = finished_run
    old_times = {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file()}
    with caplog.at_level("INFO", logger="being_vl"):
        assert being_vl("run", str(path)) == 0
    assert caplog.text.count("finished before, skipped") == 4
    assert old_times == {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file()}
    assert being_vl("run", str(path), "--vocab.alpha", "0.1") == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "step 'vocab'" in line
    assert "alpha" in line


def test_learning_the_vocabulary_goes_on_after_an_interruption(
    finished_run: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    path, out = finished_run
    vocabulary, partial_path = out / "vocabulary.json", out / "vocabulary.partial.json"
    content = vocabulary.read_bytes()
    # As it is left when learning is killed after a checkpoint.
    VisualBPE.load(vocabulary).truncate(5).save(partial_path)
    vocabulary.unlink()
    (out / "steps" / "vocab.json").unlink()
    with caplog.at_level("INFO", logger="being_vl"):
        assert being_vl("run", path) == 0
    assert "going on after 5 merges" in caplog.text
    assert vocabulary.read_bytes() == content
    assert not partial_path.exists()


def files_of(folder: Path) -> dict[Path, int]:
    """Every file of a folder with the time when it was last written."""
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


def test_dry_run_says_what_there_is_to_do_and_writes_nothing(
    finished_run: tuple[Path, Path], chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert being_vl("run", write_recipe(chain, tmp_path / "new"), "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["quantize:", "to", "do"],
        ["vocab:", "to", "do"],
        ["expand:", "to", "do"],
        ["train:", "to", "do"],
    ]
    assert not (tmp_path / "new").exists()
    path, out = finished_run
    old_files = files_of(out)
    assert being_vl("run", path, "--dry_run") == 0
    output = capsys.readouterr().out
    assert output.count("finished") == 4
    assert "rows" in output
    assert being_vl("run", path, "--vocab.alpha", "0.1", "--dry-run") == 2
    assert "step 'vocab'" in capsys.readouterr().err
    assert being_vl("run", path, "--vocab.alpha", "0.1", "--dry-run", "--overwrite") == 0
    assert capsys.readouterr().out.count("to do") == 3
    assert files_of(out) == old_files


def test_overwrite_does_a_step_of_other_options_and_those_after_it_again(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path, out = write_recipe(chain, tmp_path / "run", until="expand"), tmp_path / "run"
    assert being_vl("run", path) == 0
    grids = files_of(out / "grids")
    assert "alpha was 0.3, is 0.1" in expect_refusal(capsys, being_vl("run", path, "--vocab.alpha", "0.1"))
    caplog.clear()
    assert being_vl("run", path, "--vocab.alpha", "0.1", "--overwrite") == 0
    assert caplog.text.count("finished before, skipped") == 1
    assert files_of(out / "grids") == grids
    assert VisualBPE.load(out / "vocabulary.json").alpha == 0.1
    assert being_vl("run", path, "--vocab.alpha", "0.1") == 0


@pytest.mark.slow
def test_several_ranks_quantize_together(chain: Path, tmp_path: Path) -> None:
    """The grids are those of one rank, byte for byte."""
    folders = []
    for ranks in (1, 2):
        out = tmp_path / f"ranks{ranks}"
        path = write_recipe(chain, out, quantize={"shard_size": 5}, until="quantize")
        assert being_vl("run", path, "--ranks", ranks) == 0
        folders.append(out / "grids")
    names = sorted(file.name for file in folders[0].glob("*.arrow"))
    assert len(names) == 5
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_max_steps_makes_a_trial(chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "0")  # `-q` sets it in this process
    path = write_recipe(chain, tmp_path / "run")
    assert being_vl("run", path, "--max-steps", 1, "-q") == 0
    entries = [entry for entry in read_log(tmp_path / "run" / "training" / "log.jsonl") if "loss" in entry]
    assert [entry["stage"] for entry in entries] == ["rows", "all"]


def test_what_is_missing_or_wrong_is_named_before_any_work(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = json.loads((chain / "data" / "train.json").read_text())
    records[3]["image"] = "lost.png"
    (tmp_path / "lost.json").write_text(json.dumps(records))
    del records[3]["conversations"]
    (tmp_path / "silent.json").write_text(json.dumps(records))
    (tmp_path / "cut.json").write_text("[{")
    for changes, name in (
        ({"images": str(tmp_path / "pictures")}, "pictures"),
        ({"records": [str(tmp_path / "no.json")]}, "no.json"),
        ({"records": [str(tmp_path / "cut.json")]}, "cut.json: line 1"),
        ({"records": [str(tmp_path / "lost.json")]}, "lost.json: record 3 "),
        ({"records": [str(tmp_path / "silent.json")]}, "silent.json: record 3 "),
        ({"llm": str(tmp_path / "no-llm")}, "no-llm"),
        ({"llm": str(chain / "tied")}, "already expanded"),
        ({"quantizer": str(chain / "llm")}, "llm"),
    ):
        assert being_vl("run", str(write_recipe(chain, tmp_path / "run", **changes))) == 2
        assert name in capsys.readouterr().err.strip().splitlines()[-1]
        assert not (tmp_path / "run" / "grids").exists()


def test_all_bad_records_are_counted_before_any_work(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = json.loads((chain / "data" / "train.json").read_text())
    records[1]["image"] = "lost.png"
    records[3]["category"] = "other"
    (tmp_path / "bad.json").write_text(json.dumps(records))
    path = write_recipe(chain, tmp_path / "run", records=[str(tmp_path / "bad.json")])
    assert being_vl("run", path) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"2 of {len(records)} records have faults, the first: {tmp_path / 'bad.json'}: record 1 " in line
    assert "record 3 " in line


def test_records_and_images_out_of_one_tar(chain: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with tarfile.open(tmp_path / "data" / "web.tar", "w") as tar:
        for number, record in enumerate(json.loads((chain / "data" / "train.json").read_text())[:3]):
            image = (chain / "data" / "images" / record.pop("image")).read_bytes()
            for suffix, data in {"png": image, "json": json.dumps(record).encode()}.items():
                member = tarfile.TarInfo(f"{number}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    sources = {"images": str(tmp_path / "data"), "records": [str(tmp_path / "data" / "web.tar")]}
    assert being_vl("run", str(write_recipe(chain, tmp_path / "run", until="quantize", **sources))) == 0
    assert sorted(GridStore.open(tmp_path / "run" / "grids")) == [
        "web.tar/0.png",
        "web.tar/1.png",
        "web.tar/2.png",
    ]


def test_vocab_train_on_an_array(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:

    np.save(tmp_path / "grids.npy", np.random.default_rng(0).integers(4, size=(5, 6, 7)))
    out = tmp_path / "vocabulary.json"
    command = ["vocab", "train", str(tmp_path / "grids.npy"), "--out", str(out), "--num_merges", "3"]
    assert being_vl(*command) == 2
    assert "codebook_size" in capsys.readouterr().err
    assert being_vl(*command, "--codebook_size", "4") == 0
    assert VisualBPE.load(out).vocab_size == 7
    assert being_vl(*command, "--codebook_size", "3") == 2
    assert "3" in capsys.readouterr().err
    (tmp_path / "grids.npy").write_bytes(b"no array")
    assert being_vl(*command, "--codebook_size", "4") == 2
    assert "grids.npy" in capsys.readouterr().err
