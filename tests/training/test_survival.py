"""Trainings that are killed, stopped, run out of disk, and go on: real ranks, real signals, real torchrun."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from being_vl.training.log import read_log
from helpers.ranks import ENVIRONMENT, ForkedTraining, train_in_forks
from helpers.training import losses, recipe

STEPS = (4, 30, 6)
# Several groups of parameters.
OPTIONS = {"steps": STEPS, "optimizer": {"weight_decay": 0.5, "weight_decay_on": "matrices"}}
GRACE = 30  # seconds in which the other ranks must have ended after one was killed


@pytest.fixture(scope="module")
def dropout_model(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with dropout, so that losses depend on random states."""
    model = tmp_path_factory.mktemp("dropping") / "model"
    shutil.copytree(chain / "tied", model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.2}))
    return model


@pytest.fixture(scope="module")
def baseline(chain: Path, dropout_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run on two ranks with ZeRO-2."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train_in_forks(recipe(chain, out, ranks=2, zero=2, model=str(dropout_model), **OPTIONS), 2)
    return out


def wait_until(condition: Callable[[], bool], training: ForkedTraining) -> None:
    """Wait for something, closely, while the training runs."""
    deadline = time.monotonic() + 240
    while not condition():
        assert not training.has_ended(), training.output.read_text()[-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.001)


def list_checkpoints(out: Path) -> list[str]:
    """Names of the complete checkpoints."""
    return sorted(f.name for f in out.glob("checkpoints/*-????????") if (f / "complete.json").is_file())


@pytest.mark.slow
def test_ten_interruptions_do_not_change_the_losses(
    chain: Path, dropout_model: Path, baseline: Path, tmp_path: Path
) -> None:
    """At random moments, during saves too: killed, all or one; told to stop, all or one; out of disk in between."""
    out, dice = tmp_path / "run", random.Random(6)
    path = recipe(chain, out, ranks=2, zero=2, model=str(dropout_model), **OPTIONS, checkpoint={"every": 1})
    ways = [
        (signal.SIGKILL, slice(None)),
        (signal.SIGKILL, slice(1, 2)),
        (signal.SIGTERM, slice(None)),
        (signal.SIGUSR1, slice(None)),
        (signal.SIGTERM, slice(0, 1)),
    ] * 2
    dice.shuffle(ways)
    log = out / "log.jsonl"
    for count, (number, ranks) in enumerate(ways, start=1):
        target = 3 * count + dice.randrange(3)
        training = ForkedTraining(path, 2)
        wait_until(lambda target=target: len(read_log(log)) >= target, training)
        if count % 2:
            wait_until(lambda: any(out.glob("checkpoints/*.tmp")), training)
        else:
            time.sleep(dice.random() / 20)
        training.signal(number, ranks)
        statuses = training.statuses(GRACE)
        output = training.output.read_text()
        assert None not in statuses, f"still there after {GRACE} s\n{output}"
        if number == signal.SIGKILL:
            assert -signal.SIGKILL in statuses
        else:
            assert statuses == [0, 0], output[-4000:]
            stops = re.findall(r"stopped by .* after step (\d+) of (\w+), saved", output)
            last_entry = read_log(log)[-1]
            assert stops[-1] == (str(last_entry["step"]), last_entry["stage"])
            assert list_checkpoints(out)[-1] == f"{last_entry['stage']}-{last_entry['step']:08d}"
        if count == 5:
            old_checkpoints = list_checkpoints(out)
            full_disk_run = ForkedTraining(path, 2, limit=65_000)
            assert 0 not in full_disk_run.statuses(GRACE)
            assert re.search(
                r"could not save a checkpoint.*optim_states.pt: .*File too large; .*MB are free",
                full_disk_run.output.read_text(),
            )
            assert list_checkpoints(out) == old_checkpoints
    assert "resumed after step" in train_in_forks(path, 2)
    assert losses(out) == losses(baseline)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero", "ranks", "other_zero", "other_ranks"),
    [(3, 1, 3, 2), (1, 2, 2, 4), (0, 2, 0, 1), (2, 2, 1, 2)],
)
def test_resumes_on_another_number_of_ranks(
    zero: int,
    ranks: int,
    other_zero: int,
    other_ranks: int,
    chain: Path,
    dropout_model: Path,
    baseline: Path,
    tmp_path: Path,
) -> None:
    """With the same records, the same dropout, and losses that differ by rounding alone; so too from ZeRO 1 to 2."""
    out = tmp_path / "run"
    path = recipe(chain, out, ranks=ranks, zero=zero, model=str(dropout_model), **OPTIONS)
    training = ForkedTraining(path, ranks)
    wait_until(lambda: len(read_log(out / "log.jsonl")) >= STEPS[0] + 5, training)
    training.signal(signal.SIGUSR1)
    assert training.statuses(GRACE) == [0] * ranks, training.output.read_text()
    output = train_in_forks(
        recipe(chain, out, ranks=ranks, zero=other_zero, model=str(dropout_model), **OPTIONS), other_ranks
    )
    assert "stage2: resumed after step" in output
    assert (f"converting it from {ranks} to {other_ranks} ranks" in output) == (
        zero > 0 and ranks != other_ranks
    )
    assert losses(out) == pytest.approx(losses(baseline), abs=1e-5)
    entries, expected = read_log(out / "log.jsonl"), read_log(baseline / "log.jsonl")
    for key in ("stage", "step", "tokens", "label_tokens", "mixture"):
        assert [entry[key] for entry in entries] == [entry[key] for entry in expected]
    assert not list(out.glob("checkpoints/*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_resumes_with_adapters_and_offload(
    zero: int, chain: Path, dropout_model: Path, tmp_path: Path
) -> None:
    """On as many ranks bit for bit, on one of two up to rounding, under another ZeRO stage not at all."""
    baseline, out = tmp_path / "whole", tmp_path / "run"
    stage = {"name": "adapters", "unfreeze": 0.5, "lora": {"rank": 2}, "batch_size": 4, "max_steps": 10}
    stage |= {"learning_rate": 3e-3, "mixture": {"foundation": 1, "perception": 1}}
    changes = {
        "model": str(dropout_model),
        "offload": "optimizer",
        "batches": {"micro_batch_size": 2},
        "stages": [stage],
    }
    train_in_forks(recipe(chain, baseline, **changes, zero=zero), 2)
    path = recipe(chain, out, **changes, zero=zero)
    training = ForkedTraining(path, 2)
    wait_until(lambda: len(read_log(out / "log.jsonl")) >= 5, training)
    training.signal(signal.SIGUSR1)
    assert training.statuses(GRACE) == [0, 0], training.output.read_text()
    other_folder = shutil.copytree(out, tmp_path / "other")
    assert "adapters: resumed after step" in train_in_forks(path, 2)
    assert losses(out) == losses(baseline)
    path = recipe(
        chain,
        other_folder,
        **changes | {"offload": "none", "batches": {"micro_batch_size": 4}},
        zero=5 - zero,
    )
    training = ForkedTraining(path, 1)
    assert training.statuses(GRACE) == [2]
    assert f"was written with zero {zero}, and zero {5 - zero} cannot read it" in training.output.read_text()
    train_in_forks(recipe(chain, other_folder, **changes, zero=zero))
    assert losses(other_folder) == pytest.approx(losses(baseline), abs=1e-5)


def test_damaged_checkpoint_is_passed_over(
    chain: Path, dropout_model: Path, baseline: Path, tmp_path: Path
) -> None:
    """One flipped bit in a file of the right length is found by its checksum, and the checkpoint before is loaded.

    As many are kept as asked for, one more while old ones are removed, and none when the stage is done.
    """
    out = tmp_path / "run"
    path = recipe(
        chain, out, ranks=2, zero=2, model=str(dropout_model), **OPTIONS, checkpoint={"every": 2, "keep": 3}
    )
    training = ForkedTraining(path, 2)
    wait_until(lambda: "stage2-00000010" in list_checkpoints(out), training)
    training.kill()
    *oldest_checkpoints, old_checkpoint, new_checkpoint = list_checkpoints(out)
    assert 1 <= len(oldest_checkpoints) <= 2
    file = max((out / "checkpoints" / new_checkpoint).glob("*.pt"), key=lambda file: file.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    output = train_in_forks(path, 2)
    assert f"{new_checkpoint} is damaged ({file.name} does not have the checksum" in output
    assert f"resumed after step {int(old_checkpoint[-8:])} from" in output
    assert losses(out) == losses(baseline)
    assert not list_checkpoints(out)


@pytest.mark.slow
def test_rank_that_waits_for_a_lost_one_ends(chain: Path, tmp_path: Path) -> None:
    """Rank 1 hangs. Rank 0 ends at the second signal at once, after one SIGTERM before torchrun would kill it."""
    patient_run, urged_run = tmp_path / "patient", tmp_path / "urged"
    trainings = {}
    for out in (patient_run, urged_run):
        training = trainings[out] = ForkedTraining(recipe(chain, out, ranks=2, **OPTIONS), 2)
        wait_until(lambda out=out: len(read_log(out / "log.jsonl")) >= 5, training)
        training.signal(signal.SIGSTOP, slice(1, 2))
        training.signal(signal.SIGTERM, slice(0, 1))
    time.sleep(2.5)
    trainings[urged_run].signal(signal.SIGUSR1, slice(0, 1))
    for out, number, cause in (
        (urged_run, signal.SIGUSR1, "second signal"),
        (patient_run, signal.SIGTERM, "another rank is lost"),
    ):
        training = trainings[out]
        training.ranks[0].join(GRACE)
        training.kill()
        assert training.ranks[0].exitcode == 128 + number
        assert cause in training.output.read_text()


@pytest.mark.slow
def test_under_torchrun(chain: Path, dropout_model: Path, baseline: Path, tmp_path: Path) -> None:
    """A killed rank: all end with the cause. SIGTERM to the launcher: saved, its status is 0."""
    out = tmp_path / "run"
    path = recipe(chain, out, ranks=2, zero=2, model=str(dropout_model), **OPTIONS, checkpoint={"every": 1})
    words = ["--standalone", "--nproc-per-node", "2", "-m", "being_vl", "train"]
    command = [sys.executable, "-m", "being_vl.launch.torchrun", *words, "--recipe", str(path)]

    def launch() -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=os.environ | ENVIRONMENT, stderr=pipe, text=True)

    def wait_for(step: int) -> None:
        deadline = time.monotonic() + 240
        while not any(name >= f"stage2-{step:08d}" for name in list_checkpoints(out)):
            assert launcher.poll() is None, launcher.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.005)

    launcher = launch()
    wait_for(2)
    psutil.Process(launcher.pid).children()[1].kill()
    output = launcher.communicate(timeout=GRACE)[1]
    assert launcher.returncode == 1
    assert "SIGKILL" in output
    launcher = launch()
    wait_for(8)
    launcher.terminate()
    output = launcher.communicate(timeout=GRACE)[1]
    assert launcher.returncode == 0, output
    assert "resumed after step" in output
    assert re.search(r"stopped by SIGTERM after step \d+ of stage2, saved", output)
    train_in_forks(path, 2)
    assert losses(out) == losses(baseline)
