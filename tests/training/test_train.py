"""Staged training: real DeepSpeed engines, real processes, a plain torch loop as the oracle."""

import fcntl
import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from being_vl.cli import main
from being_vl.errors import FingerprintError
from being_vl.launch.local import train_on_ranks
from being_vl.layout import VocabularyLayout
from being_vl.outputs import LOCK
from being_vl.recipes.recipe import Recipe
from being_vl.training.engine import plan_training
from being_vl.training.log import read_log
from being_vl.training.options import TrainOptions
from helpers.commands import being_vl, expect_refusal
from helpers.plain_training import oracle
from helpers.ranks import ForkedTraining, train_by_command, train_in_forks
from helpers.training import MIXTURES, losses, recipe, weights


@pytest.fixture(scope="session")
def reference(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one rank without ZeRO, by the command; `output` beside it is what it printed."""
    out = tmp_path_factory.mktemp("reference") / "run"
    out.with_name("output").write_text(train_by_command(recipe(chain, out)))
    return out


def test_without_a_recipe_the_stages_are_the_papers() -> None:
    """Learning rates, epochs, accumulation, warm-up and layers as in Being-VL-0.5, section 4."""
    stages = TrainOptions(Path("model"), [Path("records.json")], Path("out")).stages
    assert [stage.unfreeze for stage in stages] == [0, 0.25, "all"]
    assert [stage.learning_rate for stage in stages] == [1e-3, 3e-5, 5e-5]
    assert [stage.epochs for stage in stages] == [2, 3, 3]
    assert [stage.accumulation for stage in stages] == [2, 4, 4]
    assert [stage.warmup for stage in stages] == [0.03] * 3
    shares = [{name: share for name, share in stage.mixture.items() if share} for stage in stages]
    assert shares == MIXTURES


def test_losses_are_those_of_plain_torch(chain: Path, reference: Path) -> None:
    expected = [entry["loss"] for entry in oracle(chain, "tied", stages=3, steps=4)]
    assert losses(reference) == pytest.approx(expected, rel=2e-5)
    assert expected[0] - expected[-1] > 0.3, "the oracle itself should learn something"


def test_losses_are_those_of_plain_torch_untied(chain: Path, tmp_path: Path) -> None:
    train_in_forks(recipe(chain, tmp_path / "run", tied=False))
    expected = [entry["loss"] for entry in oracle(chain, "untied", stages=3, steps=4)]
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=2e-5)


def test_packed_records_train_as_if_each_were_alone(chain: Path, tmp_path: Path) -> None:
    """On two ranks that read in two processes each, with loss on questions and images too."""
    loss = {"questions": 0.5, "images": 0.25}
    train_in_forks(
        recipe(
            chain,
            tmp_path / "run",
            2,
            steps=(3, 3, 3),
            workers=2,
            batches={"packing": 700},
            sequences={"loss": loss},
        ),
        2,
    )
    entries = read_log(tmp_path / "run" / "log.jsonl")
    for entry, expected in zip(entries, oracle(chain, "tied", 3, 3, packing=700, **loss), strict=True):
        assert "visual" in expected
        assert entry["losses"] | {"loss": entry["loss"]} == pytest.approx(expected, rel=2e-5)
    assert sum(entry["padding"] for entry in entries) / len(entries) < 0.05


@pytest.mark.parametrize(("zero", "ranks"), [(0, 2), (1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2)])
def test_zero_and_ranks_do_not_change_the_losses(
    zero: int, ranks: int, chain: Path, reference: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    train_in_forks(recipe(chain, out, ranks=ranks, zero=zero, gradient_checkpointing=zero == 2), ranks)
    assert losses(out) == pytest.approx(losses(reference), rel=2e-5)
    assert_what_trains(chain / "tied", out)
    final_weights, expected = weights(out / "stage3"), weights(reference / "stage3")
    for name, tensor in final_weights.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)


def test_bf16_leaves_frozen_parameters_as_they_are(chain: Path, reference: Path, tmp_path: Path) -> None:
    """Also in bf16, where the engine rounds all parameters: the checkpoint is written from the float32 original."""
    out = tmp_path / "run"
    train_in_forks(recipe(chain, out, precision={"dtype": "bf16"}, zero=2))
    assert losses(out) == pytest.approx(losses(reference), rel=0.02)
    assert_what_trains(chain / "tied", out)
    assert all(tensor.dtype == torch.float32 for tensor in weights(out / "stage3").values())


def assert_what_trains(start: Path, out: Path) -> None:
    """Each stage moved exactly what it says, to the bit, although weight decay is on."""
    text = VocabularyLayout.load(start).text_size
    start_weights, weights1, weights2, weights3 = (
        weights(f) for f in (start, *(out / f"stage{n}" for n in (1, 2, 3)))
    )
    for name in start_weights:
        rows = slice(0, text) if "embed_tokens" in name or "lm_head" in name else slice(None)
        assert torch.equal(weights1[name][rows], start_weights[name][rows]), f"stage 1 moved {name}"
        has_moved = not torch.equal(weights2[name][rows], weights1[name][rows])
        assert has_moved == (".layers.0." in name), f"stage 2: {name}"
        assert not torch.equal(weights3[name], weights2[name]), f"stage 3 left {name}"
    new_rows = start_weights["model.embed_tokens.weight"][text:]
    assert not torch.equal(weights1["model.embed_tokens.weight"][text:], new_rows)


def test_stage_folders_are_plain_and_complete(chain: Path, reference: Path) -> None:
    assert_what_trains(chain / "tied", reference)
    for stage in ("stage1", "stage2", "stage3"):
        _, info = AutoModelForCausalLM.from_pretrained(reference / stage, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert VocabularyLayout.load(reference / stage) == VocabularyLayout.load(chain / "tied")
        assert AutoTokenizer.from_pretrained(reference / stage)("red").input_ids
        assert (reference / stage / "visual_vocabulary.json").is_file()


def test_each_stage_says_first_what_trains(chain: Path, reference: Path) -> None:
    """The table's numbers are those of the model, and stand above the stage's first step."""
    start, text = weights(chain / "tied"), VocabularyLayout.load(chain / "tied").text_size
    width = start["model.embed_tokens.weight"].shape[1]
    layer = [sum(w.numel() for name, w in start.items() if f".layers.{n}." in name) for n in range(4)]
    new_size, total = (len(start["model.embed_tokens.weight"]) - text) * width, sum(layer) + width
    total += start["model.embed_tokens.weight"].numel()
    output = reference.with_name("output").read_text()
    for number, trained_size in enumerate((new_size, new_size + layer[0], total), start=1):
        table, _, _ = output.partition(f"stage{number} step 1/4")
        rows = {
            name: (size, end)
            for name, size, end in re.findall(
                r"^  (\w[\w ,]*?) +([\d,]+)  (trains|frozen|of .*)$",
                table[table.index(f"stage{number}: what trains") :],
                re.MULTILINE,
            )
        }
        assert rows["new visual rows"] == (f"{new_size:,}", "trains")
        assert rows["text rows"] == (f"{text * width:,}", "trains" if number == 3 else "frozen")
        assert rows["trained"][0] == f"{trained_size:,}"
        assert rows["trained"][1].startswith(f"of {total:,} ")
        sizes = {name: int(size.replace(",", "")) for name, (size, end) in rows.items() if end == "trains"}
        assert sum(sizes.values()) == trained_size
    assert "layers 1 to 3" not in rows


def test_log_says_what_happened(reference: Path) -> None:
    entries = read_log(reference / "log.jsonl")
    assert [(e["stage"], e["step"]) for e in entries] == [
        (f"stage{s}", n) for s in (1, 2, 3) for n in range(1, 5)
    ]
    assert entries[3]["mixture"] == {"foundation": 26 / 32, "perception": 6 / 32}
    assert all(e["gradient_norm"] > 0 and 0 <= e["padding"] < 1 for e in entries)
    board = EventAccumulator(str(reference / "tensorboard")).Reload()
    names = board.Tags()["scalars"]
    (name,) = (name for name in names if name.rpartition("/")[2] == "loss")
    assert [event.value for event in board.Scalars(name)] == pytest.approx(losses(reference), rel=1e-6)


STEPS = (2, 12, 2)  # time to be killed in the middle of stage 2


def test_killed_and_resumed_run_has_the_same_losses(chain: Path, tmp_path: Path) -> None:
    """Kill -9 after some steps of stage 2, cut the newest checkpoint short, and train again; in bf16 under ZeRO-2."""
    baseline, out, model = tmp_path / "whole", tmp_path / "killed", tmp_path / "model"
    shutil.copytree(chain / "tied", model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.2}))
    changes = {"steps": STEPS, "model": str(model), "precision": {"dtype": "bf16"}, "zero": 2}
    train_in_forks(recipe(chain, baseline, **changes))
    path = recipe(chain, out, checkpoint={"every": 2}, **changes)
    training = ForkedTraining(path)
    deadline = time.monotonic() + 240
    while not (out / "checkpoints" / "stage2-00000004" / "complete.json").exists():
        assert not training.has_ended(), training.output.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    training.kill()
    assert (out / "stage1" / "manifest.json").is_file()
    assert not (out / "stage2").exists()
    checkpoints = sorted((out / "checkpoints").glob("stage2-????????"))
    largest_file = max(checkpoints[-1].rglob("*.pt"), key=lambda file: file.stat().st_size)
    os.truncate(largest_file, largest_file.stat().st_size // 2)
    output = train_in_forks(path)
    if len(checkpoints) > 1:
        assert f"{checkpoints[-1].name} is damaged" in output
        assert f"resumed after step {int(checkpoints[-2].name[-8:])}" in output
    assert losses(out) == losses(baseline)
    assert [(e["stage"], e["step"]) for e in read_log(out / "log.jsonl")] == [
        (f"stage{s}", n) for s in (1, 2, 3) for n in range(1, STEPS[s - 1] + 1)
    ]
    for name, tensor in weights(out / "stage3").items():
        assert torch.equal(tensor, weights(baseline / "stage3")[name])


def test_second_run_does_nothing(
    chain: Path, reference: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Here; and on ranks of their own, started while this one is a world of one rank, only what is left to do.

    That may be done under another ZeRO stage, and in other micro-batches.
    """
    out = tmp_path / "again"
    shutil.copytree(reference, out)
    path = recipe(chain, out)
    assert main(["train", "--recipe", str(path)]) == 0
    assert losses(out) == losses(reference)
    shutil.rmtree(out / "stage3")
    options = Recipe.find(recipe(chain, out, zero=3, ranks=2, batches={"micro_batch_size": 4})).training()
    train_on_ranks(options, 2)
    assert capfd.readouterr().err.count("finished before") == 2
    assert losses(out) == pytest.approx(losses(reference), rel=2e-5)


def test_text_model_trains_on_text(chain: Path, tmp_path: Path) -> None:
    stage = {"name": "text", "unfreeze": "all", "learning_rate": 3e-3, "max_steps": 6, "mixture": MIXTURES[2]}
    out = tmp_path / "text"
    path = recipe(
        chain,
        out,
        model=str(chain / "llm"),
        records=[str(chain / "data" / "text.json")],
        grids=[],
        stages=[stage],
    )
    train_in_forks(path)
    first, *_, last = losses(out)
    assert last < first
    assert weights(out / "text").keys() == weights(chain / "llm").keys()
    assert AutoTokenizer.from_pretrained(out / "text")("red").input_ids


def test_another_recipe_is_refused(
    chain: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(reference, out)
    line = expect_refusal(
        capsys, being_vl("train", "--recipe", recipe(chain, out, optimizer={"weight_decay": 0.2}))
    )
    assert "optimizer.weight_decay was 0.1, is 0.2" in line
    assert str(out) in line


@pytest.mark.parametrize("change", ["records", "model", "config", "categories", "grids", "sequences"])
def test_other_inputs_are_refused_before_anything_is_written(
    chain: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    """Also what the training has prepared stays, which the other one would prepare in the same place."""
    out = tmp_path / "run"
    shutil.copytree(reference, out)
    records = tmp_path / "fewer.json"
    records.write_text(json.dumps(json.loads((chain / "data" / "train.json").read_text())[:-1]))
    shutil.copytree(chain / "grids", tmp_path / "grids")
    (tmp_path / "grids" / "manifest.json").write_text((chain / "grids" / "manifest.json").read_text() + " ")
    changes: dict[str, object] = {
        "records": [str(records)],
        "model": str(chain / "untied"),
        "grids": str(tmp_path / "grids"),
        "sequences": {"max_length": 1999},
    }
    if change == "config":  # the same weights, but to be computed with otherwise
        shutil.copytree(chain / "tied", tmp_path / "tied")
        config = json.loads((tmp_path / "tied" / "config.json").read_text())
        (tmp_path / "tied" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
        changes = {"model": str(tmp_path / "tied")}
    elif change == "categories":
        changes = {"records": [{"path": str(chain / "data" / "train.json"), "category": "reasoning"}]}
    else:
        changes = {change: changes[change]}
    old_times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    line = expect_refusal(capsys, being_vl("train", "--recipe", recipe(chain, out, **changes)))
    assert "was made with other options or inputs" in line
    assert change in line
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == old_times


def test_another_training_is_replaced_only_where_asked(
    chain: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stages, checkpoints and logs go, also those of stages that there are no more; what else lies there stays."""
    out = tmp_path / "run"
    shutil.copytree(reference, out)
    (out / "notes.txt").write_text("mine")
    (out / "mine").mkdir()
    stage = {"name": "one", "unfreeze": 0.0, "learning_rate": 1e-3, "mixture": MIXTURES[0]}
    changes: dict[str, object] = {"stages": [stage], "max_steps": 2}
    assert "stages.0.name was 'stage1', is 'one'" in expect_refusal(
        capsys, being_vl("train", "--recipe", recipe(chain, out, **changes))
    )
    changes_to_mine = {"stages": [stage | {"name": "mine"}], "max_steps": 2, "overwrite": True}
    command = "train", "--recipe"
    assert "no training has made it" in expect_refusal(
        capsys, being_vl(*command, recipe(chain, out, **changes_to_mine))
    )
    changes_from_stage = changes | {"model": str(out / "stage2"), "overwrite": True}
    assert "was made with other options" in expect_refusal(
        capsys, being_vl(*command, recipe(chain, out, **changes_from_stage))
    )
    assert losses(out) == losses(reference)
    (out / "fingerprint.json").write_text("{")
    assert "cannot be read" in expect_refusal(capsys, being_vl(*command, recipe(chain, out, **changes)))
    train_in_forks(recipe(chain, out, **changes, overwrite=True))
    assert len(losses(out)) == 2
    assert sorted(path.name for path in out.glob("*") if path.is_dir()) == [
        "mine",
        "one",
        "prepared",
        "tensorboard",
    ]
    assert (out / "notes.txt").read_text() == "mine"
    train_in_forks(recipe(chain, out, **changes, overwrite=True))  # which is finished, and stays
    assert len(losses(out)) == 2


def test_a_plan_is_what_the_training_says_and_writes_nothing(
    chain: Path, reference: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    options = Recipe.find(recipe(chain, out)).training()
    plan = plan_training(options)
    output = reference.with_name("output").read_text()
    assert all(line in output for line in plan.splitlines())
    assert not out.exists()
    shutil.copytree(reference, out)
    old_times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert plan_training(options) == plan
    options.optimizer.weight_decay = 0.2
    with pytest.raises(FingerprintError, match=r"weight_decay was 0\.1, is 0\.2"):
        plan_training(options)
    options.overwrite = True
    options.max_steps = 3
    assert "stage1: 3 steps" in plan_training(options)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == old_times


def test_nodes_with_other_copies_are_found(chain: Path, tmp_path: Path) -> None:
    """Each node has its own `model`, under the same path; one of them is another."""
    for node in ("0", "1"):
        shutil.copytree(chain / "tied", tmp_path / node / "model")
    file = tmp_path / "1" / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"0")
    path = recipe(chain, tmp_path / "run", ranks=2, model="model")
    training = ForkedTraining(path, 2, nodes=[tmp_path / "0", tmp_path / "1"])
    assert training.statuses(60) == [2, 2]
    assert training.output.read_text().count("error: model: not the same files on all nodes") == 2


def test_second_training_in_the_same_folder_is_refused(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    with (out / LOCK).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process is writing there" in expect_refusal(
            capsys, being_vl("train", "--recipe", recipe(chain, out))
        )
    assert not list(out.glob("stage*"))


def test_images_need_an_expanded_model_and_grids(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = expect_refusal(
        capsys, being_vl("train", "--recipe", recipe(chain, tmp_path / "a", model=str(chain / "llm")))
    )
    assert "not expanded" in line
    assert "train.json" in line
    line = expect_refusal(capsys, being_vl("train", "--recipe", recipe(chain, tmp_path / "b", grids=[])))
    assert "--grids" in line
    (tmp_path / "empty").mkdir()
    line = expect_refusal(
        capsys, being_vl("train", "--recipe", recipe(chain, tmp_path / "c", model=str(tmp_path / "empty")))
    )
    assert "no config.json" in line


def test_image_that_was_not_quantised_is_named(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = json.loads((chain / "data" / "train.json").read_text())
    records[5]["image"] = "nowhere.png"
    records_file = tmp_path / "broken.json"
    records_file.write_text(json.dumps(records))
    line = expect_refusal(
        capsys, being_vl("train", "--recipe", recipe(chain, tmp_path / "run", records=[str(records_file)]))
    )
    assert "nowhere.png" in line
    assert "record 5" in line
    assert "broken.json" in line


def test_nothing_to_train_is_refused(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = {"name": "one", "unfreeze": 0.0, "learning_rate": 1e-3, "max_steps": 1, "mixture": MIXTURES[0]}
    path = recipe(
        chain,
        tmp_path / "run",
        model=str(chain / "llm"),
        grids=[],
        records=[str(chain / "data" / "text.json")],
        stages=[stage],
    )
    assert "nothing would train" in expect_refusal(capsys, being_vl("train", "--recipe", path))
    path.write_text(path.read_text().replace("foundation:", "nothing:").replace("perception: 20", ""))
    line = expect_refusal(capsys, being_vl("train", "--recipe", path))
    assert "stage 'one': no category has both a weight and records: weights nothing" in line
    assert "there are" in line
