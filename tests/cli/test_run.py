"""The whole chain as a recipe, and the command line around it."""

import io
import json
import os
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

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


@pytest.fixture(scope="module")
def quick_run(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run whose inputs and outputs a test may change, if it mends them again: its recipe and its folder."""
    tmp_path = tmp_path_factory.mktemp("quick")
    for name in ("data", "llm", "quantizer"):
        shutil.copytree(chain / name, tmp_path / name)
    sources = {
        "images": str(tmp_path / "data" / "images"),
        "records": [{"path": str(tmp_path / "data" / "train.json"), "category": "perception"}],
        "llm": str(tmp_path / "llm"),
        "quantizer": str(tmp_path / "quantizer"),
    }
    path = write_recipe(chain, tmp_path / "run", **sources)
    assert being_vl("run", path) == 0
    return path, tmp_path / "run"


def change_secretly(path: Path) -> None:
    """Change a byte in the middle of a file, but neither its size nor its time of change."""
    times, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def redraw_secretly(path: Path) -> None:
    """Make other pixels of an image, in a file of the same size and time of change."""
    times = path.stat()
    with Image.open(path) as image:
        size = image.size
    data = io.BytesIO()
    Image.new("RGB", size, "red").save(data, "PNG")
    path.write_bytes(data.getvalue().ljust(times.st_size, b"\0"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_inputs_count_by_their_content(
    quick_run: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """What has changed is named, also where size and time are as before; a touch or a bystander changes nothing."""
    path, tmp_path = quick_run[0], quick_run[0].parent
    weights = next((tmp_path / "quantizer").glob("*.safetensors"))
    image = tmp_path / "data" / "images" / "train-00001.png"
    inputs = {
        image: "'quantize'.*images train-00001.png has changed",
        weights: f"'quantize'.*quantizer {weights.name} has changed",
        tmp_path / "llm" / "model.safetensors": "'expand'.*llm model.safetensors has changed",
    }
    for file, message in inputs.items():
        data = file.read_bytes()
        change_secretly(file)
        code = being_vl("run", path)
        error = capsys.readouterr().err
        file.write_bytes(data)
        if code != 2 or not re.search(
            message, error
        ):  # a changed byte may make a file unreadable; that is told, too
            assert code == 2
            assert file.name in error
    records = tmp_path / "data" / "train.json"
    text = records.read_text()
    records.write_text(text.replace("how", "who", 1) if "how" in text else text + " ")
    assert re.search(
        "'train'.*records .*train.json has changed", expect_refusal(capsys, being_vl("run", path))
    )
    records.write_text(text)
    (tmp_path / "data" / "images" / "._copy.png").write_bytes(b"a bystander")
    (tmp_path / "data" / "images" / "notes.txt").write_text("another")
    image.touch()
    assert being_vl("run", path) == 0
    image.rename(image.with_name("train-99999.png"))
    other = tmp_path / "data" / "images" / "more.png"
    shutil.copy(image.with_name("train-99999.png"), other)
    line = expect_refusal(capsys, being_vl("run", path, "--train.lenient"))
    for change in ("more.png is new", "train-00001.png is gone", "train-99999.png is new"):
        assert change in line
    other.unlink()
    image.with_name("train-99999.png").rename(image)
    assert being_vl("run", path) == 0


def test_a_secretly_changed_image_is_quantized_again_where_asked(
    quick_run: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = quick_run
    tmp_path = path.parent
    key = "train-00001.png"
    old_grids = {name: GridStore.open(out / "grids")[name].tolist() for name in GridStore.open(out / "grids")}
    redraw_secretly(tmp_path / "data" / "images" / key)
    assert f"{key} has changed" in expect_refusal(capsys, being_vl("run", path))
    assert f"{key} has changed" in expect_refusal(capsys, being_vl("run", path))
    assert being_vl("run", path, "--overwrite", "--until", "quantize") == 0
    grids = GridStore.open(out / "grids")
    assert [name for name in grids if grids[name].tolist() != old_grids[name]] == [key]
    assert being_vl("run", path, "--overwrite") == 0
    assert being_vl("run", path) == 0


OUTPUTS = {
    "quantize": "grids/grids-00000.arrow",
    "vocab": "vocabulary.json",
    "expand": "expanded/model.safetensors",
    "train": "training/all/model.safetensors",
}


def test_outputs_that_were_deleted_are_made_again(
    quick_run: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    path, out = quick_run
    contents = {name: (out / name).read_bytes() for name in OUTPUTS.values()}
    for folder in ("grids", "expanded", "training/all"):
        shutil.rmtree(out / folder)
    (out / "vocabulary.json").unlink()
    caplog.clear()
    assert being_vl("run", path) == 0
    assert caplog.text.count("was deleted and is made again") == 4
    assert contents == {name: (out / name).read_bytes() for name in contents}
    # A shard alone, too.
    (out / "grids" / "grids-00000.arrow").unlink()
    caplog.clear()
    assert being_vl("run", path) == 0
    assert caplog.text.count("finished before, skipped") == 3
    assert contents == {name: (out / name).read_bytes() for name in contents}


@pytest.mark.parametrize("step", OUTPUTS)
def test_outputs_that_were_altered_are_refused(
    step: str, quick_run: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the file, as long as its step has made it; with --overwrite it is made again, and nothing else lost."""
    path, out = quick_run
    file = out / OUTPUTS[step]
    siblings = sorted(file.parent.iterdir()) if step != "vocab" else [file]
    for altered in {file, *(sibling for sibling in siblings if sibling.suffix in (".json", ".jinja"))}:
        data = altered.read_bytes()
        change_secretly(altered)
        line = expect_refusal(capsys, being_vl("run", path))
        assert f"step {step!r}" in line
        assert f"{altered.name if step != 'vocab' else ''} has changed" in line
        altered.write_bytes(data)
    data = file.read_bytes()
    change_secretly(file)
    stranger = out / "notes.txt"
    stranger.write_text("mine")
    assert being_vl("run", path, "--overwrite") == 0
    assert file.read_bytes() == data
    assert stranger.read_text() == "mine"
    assert being_vl("run", path) == 0


def test_a_part_of_a_model_that_is_gone_is_refused(
    quick_run: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = quick_run
    for folder, name in (("expanded", "config.json"), ("training/all", "tokenizer.json")):
        (out / folder / name).unlink()
        assert f"{name} is gone" in expect_refusal(capsys, being_vl("run", path))
        assert being_vl("run", path, "--overwrite") == 0
        assert (out / folder / name).is_file()


def test_the_end_accounts_for_images_and_records(
    finished_run: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.clear()
    assert being_vl("run", finished_run[0]) == 0
    assert "quantize: images: 24 seen, 24 used, 0 left out" in caplog.messages
    assert "train: records: 96 seen, 96 used, 0 left out" in caplog.messages
