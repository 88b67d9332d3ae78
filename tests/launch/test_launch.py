"""Launching: what is printed and refused anywhere; real hosts, ssh and Slurm where root may set them up."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from being_vl.recipes.recipe import Recipe
from helpers import tiny
from helpers.commands import being_vl, expect_refusal
from helpers.ranks import ENVIRONMENT, train_in_forks
from helpers.training import losses, write_recipe

CLUSTER = Path(__file__).parent / "cluster"
FEW_STEPS, MANY_STEPS = 12, 50
"""Steps of trainings that are left alone, and of those that something happens to."""


def recipe(chain: Path, out: Path, ranks: int = 2, steps: int = FEW_STEPS, **changes: object) -> Path:
    """A short training whose global batch is the same on any number of ranks; its losses do not depend on `steps`."""
    stage = {
        "name": "one",
        "unfreeze": 0.25,
        "learning_rate": 3e-3,
        "max_steps": steps,
        "schedule": "constant",
        "warmup": 0.0,
        "accumulation": 4 // ranks,
        "mixture": {"foundation": 1, "perception": 1},
    }
    options = {
        **tiny.training_inputs(chain),
        "out": str(out),
        "batches": {"micro_batch_size": 1},
        "checkpoint": {"every": 2},
        "stages": [stage],
    }
    return write_recipe(out.with_suffix(".yaml"), options, changes)


def run_launch(capsys: pytest.CaptureFixture[str], *words: object) -> list[str]:
    assert being_vl("launch", *words) == 0
    return capsys.readouterr().out.splitlines()


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    path = tmp_path / "hostfile"
    path.write_text("# two machines\n10.77.0.1 slots=8\n\n10.77.0.2 slots=8  # the other\n")
    return path


def test_print_has_a_line_for_each_node(
    chain: Path,
    tmp_path: Path,
    hostfile: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "IN FO")
    monkeypatch.setenv("HF_TOKEN", "hidden")
    path = recipe(chain, tmp_path / "out")
    lines = run_launch(
        capsys,
        path,
        "--with",
        "print",
        "--hostfile",
        hostfile,
        "--interface",
        "ib0",
        "--env",
        "ONE=1",
        "--",
        "--zero=3",
    )
    assert lines[0] == "# on 10.77.0.1, the master"
    assert lines[2] == "# on 10.77.0.2"
    assert "--rdzv-conf=is_host=1 --local-addr=10.77.0.1" in lines[1]
    assert "--rdzv-conf=is_host=0 --local-addr=10.77.0.2" in lines[3]
    for line in lines[1::2]:
        assert line.startswith(f"cd {Path.cwd()} && ")
        assert "--nnodes=2" in line
        assert "--nproc-per-node=8" in line
        assert "NCCL_DEBUG='IN FO' " in line
        assert "GLOO_SOCKET_IFNAME=ib0 ONE=1 " in line
        assert line.endswith(f"-m being_vl train --recipe {path} --zero=3")
        assert "hidden" not in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "names no host"),
        ("a slots=2\na slots=2\n", "line 2: a comes twice"),
        ("a slots=2\nb\n", "line 2: expected `HOST slots=GPUS`, found 'b'"),
        ("a slots=zero\n", "line 1: expected"),
        ("a slots=2\nb slots=1\n", "b has 1 slots, but gpus_per_node is 2"),
        ("a slots=2\n", "names 1 hosts, but nodes is 2"),
        ("127.0.0.1 slots=2\n127.0.0.2 slots=2\n", "where no other node finds it"),
    ],
)
def test_hostfile_that_does_not_fit_is_refused(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    file = tmp_path / "hostfile"
    file.write_text(content)
    words = ["--with", "print", "--hostfile", file, "--nodes", 2, "--gpus-per-node", 2]
    assert message in expect_refusal(capsys, being_vl("launch", recipe(chain, tmp_path / "out"), *words))


def test_what_is_missing_is_said_before_a_machine_is_asked_for(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path | str, *words: object) -> str:
        return expect_refusal(capsys, being_vl("launch", path, *words))

    assert "no such recipe" in refuse(tmp_path / "none.yaml")
    assert "`being-vl run qwen3-1.7b --until expand` makes it" in refuse("qwen3-1.7b", "--dry-run")
    assert "no config.json" in refuse(recipe(chain, tmp_path / "a", model=str(tmp_path)))
    assert "nothing.json: there is no such" in refuse(recipe(chain, tmp_path / "b", records=["nothing.json"]))
    assert "manifest.json" in refuse(recipe(chain, tmp_path / "c", grids=str(tmp_path)))
    recipe_path = recipe(chain, tmp_path / "d")
    assert "give its address as master" in refuse(recipe_path, "--nodes", 2)
    assert "not known here" in refuse(recipe_path, "--nodes", 2, "--master", "nowhere.invalid")
    assert "env names NEVER_SET" in refuse(recipe_path, "--env", "NEVER_SET", "--dry-run")
    assert "deepspeed needs a hostfile" in refuse(recipe_path, "--with", "deepspeed")
    assert "give gpus_per_node" in refuse(recipe_path, "--with", "slurm")
    assert "nodes: expected at least 1, found 0" in refuse(recipe_path, "--nodes", 0)
    slurm = ["--with", "slurm", "--gpus-per-node", 1, "--time"]
    assert "expected [DAYS-]HOURS:MINUTES:SECONDS" in refuse(recipe_path, *slurm, "2h")
    assert "they would not get to training" in refuse(recipe_path, *slurm, "0:06:00")


def test_print_takes_host_names_that_are_not_known_here(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "hostfile"
    file.write_text("node-0.invalid slots=8\nnode-1.invalid slots=8\n")
    path = recipe(chain, tmp_path / "out")
    lines = run_launch(capsys, path, "--with", "print", "--hostfile", file)
    assert [line for line in lines if line.startswith("#")] == [
        "# on node-0.invalid, the master",
        "# on node-1.invalid",
    ]
    assert all("--rdzv-endpoint=node-0.invalid:29500" in line for line in lines[1::2])
    lines = run_launch(
        capsys, path, "--with", "print", "--nodes", 2, "--master", "node-0.invalid", "--port", 7
    )
    assert all("--rdzv-endpoint=node-0.invalid:7" in line for line in lines[1::2])
    message = expect_refusal(capsys, being_vl("launch", path, "--hostfile", file, "--dry-run"))
    assert "the host 'node-0.invalid' is not known here" in message


def test_recipe_of_a_run_is_launched_by_a_recipe_of_its_training(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(chain / "grids", out / "grids")
    shutil.copytree(chain / "tied", out / "expanded")
    path = tmp_path / "mine.yaml"
    run = {"images": str(chain / "data" / "images"), "llm": str(chain / "llm"), "out": str(out)}
    path.write_text(yaml.safe_dump(run | {"records": [str(chain / "data" / "train.json")]}))
    options = out / "training" / "options.json"
    line = run_launch(capsys, path, "--dry-run", "--", "--zero", 3)[0]
    assert line.endswith(f"-m being_vl train --recipe {options}")
    assert not options.exists()
    run_launch(capsys, path, "--with", "print", "--", "--zero", 3, "--train.checkpoint.every", 7)
    training = Recipe.find(options).training()
    assert (training.zero, training.checkpoint.every, training.grids) == (3, 7, [out / "grids"])


def test_wrong_key_of_a_recipe_fails_at_once(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(chain, tmp_path / "out", zeroo=3)
    assert being_vl("launch", path, "--dry-run") == 2
    assert f"{path}: zeroo: there is no such option; did you mean zero?" in capsys.readouterr().err


def test_slurm_script(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(chain, tmp_path / "out")
    words = ["--with", "slurm", "--nodes", 4, "--gpus-per-node", 8, "--sbatch", "partition=gpu", "account=me"]
    lines = run_launch(capsys, path, *words, "--time", "2:00:00", "--dry-run", "--", "--zero", "2")
    directives = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    assert {"nodes=4", "gpus-per-node=8", "ntasks-per-node=1", "time=2:00:00", "signal=USR1@300"} <= {
        *directives
    }
    assert {"requeue", "partition=gpu", "account=me"} <= {*directives}
    subprocess.run(["bash", "-n"], input="\n".join(lines), text=True, check=True)


# From here on with real hosts.


def require(*tools: str) -> None:
    """Skip, with the reason, where the machine is not ours to set up hosts on."""
    if os.geteuid() != 0:
        pytest.skip("setting up hosts needs root")
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    for tool in tools:
        if not shutil.which(tool, path=path):
            pytest.skip(f"{tool} is not installed (Debian: iproute2, openssh-server, pdsh, slurm-wlm, munge)")


@pytest.fixture(scope="module")
def hosts() -> Iterator[Path]:
    """Two hosts on this machine; yields the folder with their settings."""
    require("ip")
    folder = Path(f"/tmp/being-vl-hosts-{os.getpid()}")
    start = subprocess.run([CLUSTER / "hosts.sh", "up", folder], capture_output=True, text=True, check=False)
    if start.returncode:
        pytest.skip(f"network namespaces are not allowed here: {start.stderr.strip()}")
    yield folder
    subprocess.run([CLUSTER / "hosts.sh", "down", folder], check=True)


def run_on_host(hosts: Path, number: int, words: list[str], **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(CLUSTER / "hosts.sh"), "run", str(hosts), str(number), *words],
        env=os.environ | ENVIRONMENT | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes: subprocess.Popen[str]) -> None:
    """Wait for the end of all, which must be a good one."""
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(text[-3000:] for text in outputs)


def launch(path: Path, *words: object) -> list[str]:
    return [sys.executable, "-m", "being_vl", "launch", str(path), *map(str, words)]


def wait_for(condition: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def losses_of_one_host(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of one host with one rank."""
    out = tmp_path_factory.mktemp("one-host") / "out"
    train_in_forks(recipe(chain, out, ranks=1, steps=MANY_STEPS))
    return losses(out)


def check_losses(out: Path, losses_of_one_host: list[float], steps: int) -> None:
    assert losses(out) == pytest.approx(losses_of_one_host[:steps], abs=1e-5)


@pytest.mark.slow
def test_two_hosts_by_torchrun(
    chain: Path, tmp_path: Path, hosts: Path, losses_of_one_host: list[float]
) -> None:
    path = recipe(chain, tmp_path / "out", zero=2)
    finish(*(run_on_host(hosts, n, launch(path, "--hostfile", hosts / "hostfile")) for n in (0, 1)))
    check_losses(tmp_path / "out", losses_of_one_host, FEW_STEPS)


@pytest.mark.slow
def test_worker_killed_on_one_of_two_hosts_is_restarted(
    chain: Path, tmp_path: Path, hosts: Path, losses_of_one_host: list[float]
) -> None:
    """By the printed lines, and ZeRO-3."""
    path, flags = (
        recipe(chain, tmp_path / "out", steps=MANY_STEPS),
        ["--", "--zero", 3, "--sequences.max-length", 300],
    )
    lines = run_on_host(
        hosts, 0, launch(path, "--with=print", "--hostfile", hosts / "hostfile", "--max-restarts", 1, *flags)
    ).communicate()[0]
    commands = [line for line in lines.splitlines() if line.startswith("cd ")]
    nodes = [run_on_host(hosts, n, ["bash", "-c", command]) for n, command in enumerate(commands)]
    wait_for(lambda: len(losses(tmp_path / "out")) > 4)
    os.kill(worker(nodes[1]), 9)
    finish(*nodes)
    check_losses(tmp_path / "out", losses_of_one_host, MANY_STEPS)


def worker(node: subprocess.Popen[str]) -> int:
    """The rank that a node's torchrun has started."""
    import psutil

    children = psutil.Process(node.pid).children(recursive=True)
    return next(
        process.pid for process in children if "train" in process.cmdline() and not process.children()
    )


@pytest.mark.slow
def test_two_hosts_by_deepspeed_over_ssh(
    chain: Path, tmp_path: Path, hosts: Path, losses_of_one_host: list[float]
) -> None:
    require("sshd", "pdsh")
    path = recipe(chain, tmp_path / "out", zero=3)
    words = launch(path, "--with", "deepspeed", "--hostfile", hosts / "hostfile", "--env", *ENVIRONMENT)
    finish(run_on_host(hosts, 0, words, PDSH_SSH_ARGS_APPEND=f"-F {hosts}/ssh_config"))
    check_losses(tmp_path / "out", losses_of_one_host, FEW_STEPS)


@pytest.fixture
def slurm() -> Iterator[list[str]]:
    """A Slurm of one node; yields what stands before a command to run it there."""
    require("slurmctld", "slurmd", "munged")
    folder = f"/tmp/being-vl-slurm-{os.getpid()}"
    script = str(CLUSTER / "slurm.sh")
    subprocess.run([script, "up", folder], check=True)
    yield [script, "run", folder]
    subprocess.run([script, "down", folder], check=True)


@pytest.mark.slow
def test_slurm_job_saves_when_warned_and_queues_again(
    chain: Path, tmp_path: Path, slurm: list[str], losses_of_one_host: list[float]
) -> None:
    """And is started again by Slurm, goes on, and ends."""
    path = recipe(chain, tmp_path / "out", steps=MANY_STEPS, zero=1)
    words = launch(path, "--with", "slurm", "--cpu", "--gpus-per-node", 2, "--time", "0:10:00")

    def run_slurm(*words: str) -> str:
        environment = os.environ | ENVIRONMENT
        result = subprocess.run([*slurm, *words], env=environment, capture_output=True, text=True, check=True)
        return result.stdout

    job = run_slurm(*words).split()[-1]

    def has_fact(*facts: str) -> bool:
        return any(fact in run_slurm("scontrol", "show", "job", job) for fact in facts)

    wait_for(lambda: len(losses(tmp_path / "out")) > 4 or has_fact("JobState=FAILED"))
    run_slurm("scancel", "--signal=USR1", job)  # as Slurm does before the time limit
    wait_for(lambda: has_fact("JobState=COMPLETED", "JobState=FAILED"))
    log = (tmp_path / "out" / f"slurm-{job}.log").read_text()
    assert has_fact("JobState=COMPLETED"), log[-4000:]
    assert has_fact("Restarts=1")
    first_log, _, second_log = log.partition("stopped by SIGUSR1")
    assert "one: resumed after step" in second_log
    assert first_log
    check_losses(tmp_path / "out", losses_of_one_host, MANY_STEPS)
