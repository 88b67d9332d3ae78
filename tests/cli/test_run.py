"""The whole chain as a recipe, and the command line around it."""

import io
import json
import sys
import tarfile
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import yaml

from being_vl import VisualBPE
from being_vl.cli import main
from being_vl.run import recipe_parser
from being_vl.shards.grids import GridStore
from helpers.commands import refused

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
def done(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished run: its recipe and its folder."""
    out = tmp_path_factory.mktemp("run") / "mine"
    path = write_recipe(chain, out)
    assert main(["run", str(path)]) == 0
    return path, out


def test_run_makes_every_part(
    done: tuple[Path, Path], chain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out = done
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
    picture = chain / "data" / "images" / "train-00000.png"
    ask = ["generate", "--model", str(out / "training" / "all"), "--image", str(picture)]
    assert main([*ask, "--prompt", "how many objects are there?", "--max_new_tokens", "4"]) == 0
    assert capsys.readouterr().out.count("\n") == 1


def test_second_run_skips_and_other_options_are_refused(
    done: tuple[Path, Path], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = done
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file()}
    with caplog.at_level("INFO", logger="being_vl"):
        assert main(["run", str(path)]) == 0
    assert caplog.text.count("finished before, skipped") == 4
    assert before == {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file()}
    assert main(["run", str(path), "--vocab.alpha", "0.1"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "step 'vocab'" in line
    assert "alpha" in line


def test_learning_the_vocabulary_goes_on_after_an_interruption(
    done: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, out = done
    vocabulary, partial, step = (
        out / name for name in ("vocabulary.json", "vocabulary.partial.json", "steps/vocab.json")
    )
    before = vocabulary.read_bytes()
    with monkeypatch.context() as killed:  # after the last checkpoint
        killed.setattr("being_vl.tokenizer.train.Checkpoint.remove", lambda checkpoint: sys.exit(9))
        step.unlink()
        with pytest.raises(SystemExit):
            main(["run", str(path)])
    VisualBPE.load(partial).truncate(5).save(partial)
    vocabulary.unlink()
    with caplog.at_level("INFO", logger="being_vl"):
        assert main(["run", str(path)]) == 0
    assert "going on after 5 merges" in caplog.text
    assert vocabulary.read_bytes() == before
    assert not partial.exists()


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
        assert main(["run", str(write_recipe(chain, tmp_path / "run", **changes))]) == 2
        assert name in capsys.readouterr().err.strip().splitlines()[-1]
        assert not (tmp_path / "run" / "grids").exists()


def test_all_bad_records_are_counted_before_any_work(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = json.loads((chain / "data" / "train.json").read_text())
    records[1]["image"] = "lost.png"
    records[3]["category"] = "other"
    (tmp_path / "bad.json").write_text(json.dumps(records))
    assert (
        main(["run", str(write_recipe(chain, tmp_path / "run", records=[str(tmp_path / "bad.json")]))]) == 2
    )
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"2 of {len(records)} records are bad, the first: {tmp_path / 'bad.json'}: record 1 " in line
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
    assert main(["run", str(write_recipe(chain, tmp_path / "run", until="quantize", **sources))]) == 0
    assert sorted(GridStore.open(tmp_path / "run" / "grids")) == [
        "web.tar/0.png",
        "web.tar/1.png",
        "web.tar/2.png",
    ]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train", "--model", "m", "--records", "r", "--out", "o", "--learning", "1"], "--learning"),
        (["train", "--model", "m", "--records", "r", "--out", "o", "--zero", "4"], "zero"),
        (["vocab", "train", "g", "--out", "o", "--merge_mode", "diagonal"], "merge_mode"),
        (["quantize", "pictures"], "out"),
        (["nothing"], "nothing"),
    ],
)
def test_wrong_flags_are_named(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert named in refused(capsys, main(arguments))


@pytest.mark.parametrize("command", ["prepare", "check", "train"])
def test_recipe_of_a_run_is_not_one_of_a_training(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, main([command, "--recipe", "qwen3-1.7b"]))
    assert "qwen3-1.7b: is a recipe for `being-vl run`" in line


def test_wrong_key_in_a_recipe_is_named(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(chain, tmp_path / "run", vocab={"nun_merges": 3})
    line = refused(capsys, main(["run", str(path)]))
    assert line.startswith(f"being-vl: error: {path}: ")
    assert "nun_merges" in line


@pytest.mark.parametrize(
    "name", [f.name for f in files("being_vl.recipes").iterdir() if f.name.endswith(".yaml")]
)
def test_shipped_recipes_are_valid(name: str) -> None:
    text = files("being_vl.recipes").joinpath(name).read_text()
    required = {"images": "i", "records": ["r"], "llm": "l", "out": "o"} | yaml.safe_load(text)
    options = recipe_parser().instantiate(recipe_parser().parse_object(required))
    assert [stage.name for stage in options.train.stages]


def test_vocab_train_on_an_array(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:

    np.save(tmp_path / "grids.npy", np.random.default_rng(0).integers(4, size=(5, 6, 7)))
    out = tmp_path / "vocabulary.json"
    command = ["vocab", "train", str(tmp_path / "grids.npy"), "--out", str(out), "--num_merges", "3"]
    assert main(command) == 2
    assert "codebook_size" in capsys.readouterr().err
    assert main([*command, "--codebook_size", "4"]) == 0
    assert VisualBPE.load(out).vocab_size == 7
    assert main([*command, "--codebook_size", "3"]) == 2
    assert "3" in capsys.readouterr().err
    (tmp_path / "grids.npy").write_bytes(b"no array")
    assert main([*command, "--codebook_size", "4"]) == 2
    assert "grids.npy" in capsys.readouterr().err
