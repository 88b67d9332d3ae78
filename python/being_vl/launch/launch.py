"""`being-vl launch`: the command that starts a training on one or several machines, run or printed."""

import contextlib
import ipaddress
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from being_vl.errors import ConfigError
from being_vl.files import MANIFEST, write_aside
from being_vl.train.options import TrainOptions

PORT = 29500
"""Where ranks meet if no port is given and none can be looked for."""
ALONE = 0
"""The port of a training on one machine, where torchrun finds one itself."""
STARTING = 60
"""Seconds that a job needs to start; and Slurm may warn it a minute early."""
PASSED_ON = (
    "NCCL_",
    "GLOO_",
    "TORCH_",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "DS_",
    "DEEPSPEED_",
    "OMP_",
    "UCX_",
    "FI_",
    "PYTHONPATH",
)
"""What the names of variables that go to every node begin with; names of secrets go only by `env`."""
SECRET = re.compile("KEY|TOKEN|SECRET|PASSW")


@dataclass
class LaunchOptions:
    """Options of `being-vl launch`.

    Args:
        recipe: Recipe of a training or of a run: a file, or the name of a shipped one. On several nodes it must be
            where every node sees it under the same path, and so must all that it names.
        launcher: `torchrun` starts this node's ranks (run it on every node); `deepspeed` starts those of all nodes from
            here, by pdsh and ssh; `slurm` submits a job; `print` prints the line for each node.
        nodes: Number of machines; by default all of the hostfile, or one.
        gpus_per_node: Processes on each node, one per GPU; by default the hostfile's slots, or this machine's GPUs.
        cpu: Train on CPUs: no GPU is asked of Slurm or shown to the ranks.
        hostfile: File with a line `HOST slots=GPUS` per node, as DeepSpeed and MPI have it; the first is the master.
        master: Address of the node where the ranks meet; by default the hostfile's first, or this machine.
        port: Port where they meet; by default a free one if this machine chooses for all, else 29500.
        interface: Network interface that the ranks talk through, such as `eth0`; by default the one that leads to the
            master, where that can be seen from here.
        env: Further variables to pass on, `NAME` or `NAME=VALUE`.
        max_restarts: How often all ranks are started again after one has failed; they go on at the last checkpoint.
        time: Slurm: the job's time limit, `[DAYS-]HOURS:MINUTES:SECONDS`.
        warning: Slurm: seconds before the time limit at which the ranks are told to save; the job then queues again.
        sbatch: Slurm: further directives, such as `partition=gpu` `account=me` `cpus-per-task=64`.
        dry_run: Print what would be run or submitted, and run nothing.
        overrides: Flags of the training, that override its recipe; behind `--` on the command line.
    """

    recipe: Path
    launcher: Literal["torchrun", "deepspeed", "slurm", "print"] = field(
        default="torchrun", metadata={"alias": "--with"}
    )
    nodes: int | None = None
    gpus_per_node: int | None = None
    cpu: bool = False
    hostfile: Path | None = None
    master: str | None = None
    port: int | None = None
    interface: str | None = None
    env: list[str] = field(default_factory=list)
    max_restarts: int = 0
    time: str = "24:00:00"
    warning: int = 300
    sbatch: list[str] = field(default_factory=list)
    dry_run: bool = False
    overrides: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node", "port", "warning"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; expected at least 1")
        limit = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", self.time)
        if limit is None:
            raise ConfigError(f"time is {self.time!r}; expected [DAYS-]HOURS:MINUTES:SECONDS")
        days, hours, minutes, seconds = (int(part or 0) for part in limit.groups())
        if ((days * 24 + hours) * 60 + minutes) * 60 + seconds <= self.warning + STARTING:
            raise ConfigError(
                f"time is {self.time}, and {self.warning} seconds (warning) before it is over the ranks are told to "
                "save: they would not get to training; give more time, or a shorter warning"
            )
        if self.max_restarts < 0:
            raise ConfigError(f"max_restarts is {self.max_restarts}; expected at least 0")
        if self.launcher == "deepspeed" and self.max_restarts:
            raise ConfigError("deepspeed's launcher cannot restart ranks; use torchrun or slurm")


class Cluster(NamedTuple):
    """The machines of a training, as far as they are known here.

    Args:
        hosts: Address of each node; None for those that are not known.
        gpus: Processes on each node.
        master: Where the ranks meet; one of `hosts` where these are known.
        port: Port there.
        interface: Network interface for the ranks' traffic; None leaves it to NCCL and gloo.
    """

    hosts: list[str | None]
    gpus: int
    master: str
    port: int
    interface: str | None


def launch(
    options: LaunchOptions, training: TrainOptions, flags: list[str], say: Callable[[str], None]
) -> None:
    """Start a training, or print how.

    Args:
        options: Of the launch.
        training: What its recipe says, already checked.
        flags: The flags that make `being-vl train` read the same.
        say: Takes what is printed.

    Raises:
        ConfigError: if hostfile, master and numbers do not fit together, or a tool is missing.
        ModelError, RecordError: if the recipe's model or records are missing.

    Without an error it does not return where it starts a training here: this process becomes torchrun or DeepSpeed.
    """
    _check_inputs(training)
    if options.launcher == "slurm":
        # Slurm itself writes the log there, and makes no folder.
        training.out.mkdir(parents=True, exist_ok=True)
        script = slurm_script(options, training, flags)
        say(script) if options.dry_run else _submit(script, training.out, say)
        return
    cluster = find_cluster(options)
    if options.launcher == "print":
        for number, host in enumerate(cluster.hosts):
            say(f"# on {host or f'node {number}'}" + (", the master" if host == cluster.master else ""))
            environment = _environment(options, cluster)
            say(_shown(environment, torchrun(options, cluster, host, host == cluster.master, flags)))
        return
    if options.launcher == "deepspeed":
        environment, command = _deepspeed(options, cluster, training.out, flags)
    else:
        here = own_address(cluster.master)
        cluster = cluster._replace(interface=options.interface or interface_of(here))
        environment = _environment(options, cluster)
        command = torchrun(options, cluster, here, _is_here(_resolved(cluster.master)), flags)
    if options.dry_run:
        say(_shown(environment, command))
    else:
        os.execvpe(command[0], command, os.environ | environment)


def _check_inputs(training: TrainOptions) -> None:
    """Find what is missing before any machine is asked for."""
    from being_vl.errors import ModelError, RecordError

    if not (training.model / "config.json").is_file():
        raise ModelError(f"{training.model}: no config.json; expected the folder of a causal LM")
    for path in training.records:
        if not path.exists():
            raise RecordError(f"{path}: there is no such file of records")
    if training.grids is not None and not (training.grids / MANIFEST).is_file():
        raise ConfigError(
            f"{training.grids}: no {MANIFEST}; expected a folder that `being-vl quantize` finished"
        )


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots of each host, in the file's order.

    Raises:
        ConfigError: if it is missing or empty, a line is not `HOST slots=N`, or a host comes twice.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such hostfile")
    slots: dict[str, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        found = re.fullmatch(r"slots=([1-9]\d*)", words[1]) if len(words) == 2 else None
        if found is None:
            raise ConfigError(f"{path}, line {number}: expected `HOST slots=GPUS`, found {line.strip()!r}")
        if words[0] in slots:
            raise ConfigError(f"{path}, line {number}: {words[0]} comes twice")
        slots[words[0]] = int(found[1])
    if not slots:
        raise ConfigError(f"{path}: names no host; expected lines `HOST slots=GPUS`")
    return slots


def find_cluster(options: LaunchOptions) -> Cluster:
    """The machines that the options describe.

    Raises:
        ConfigError: if what they say does not fit together, or the master can not be found.
    """
    slots = read_hostfile(options.hostfile) if options.hostfile else {}
    nodes = options.nodes or len(slots) or 1
    if slots and nodes > len(slots):
        raise ConfigError(f"{options.hostfile}: names {len(slots)} hosts, but nodes is {nodes}")
    if options.launcher == "deepspeed" and not slots:
        raise ConfigError(
            "deepspeed needs a hostfile with the lines `HOST slots=GPUS`; on one machine use torchrun"
        )
    hosts: list[str | None] = [*list(slots)[:nodes]] or [None] * nodes
    gpus = options.gpus_per_node or min(list(slots.values())[:nodes], default=0) or _own_gpus(options)
    for host, number in list(slots.items())[:nodes]:
        if gpus > number:
            raise ConfigError(f"{options.hostfile}: {host} has {number} slots, but gpus_per_node is {gpus}")
    if nodes == 1 and not slots:
        return Cluster(hosts, gpus, "127.0.0.1", ALONE, options.interface)
    master = options.master or hosts[0]
    if master is None:
        if options.launcher == "torchrun":
            raise ConfigError("several nodes meet at one of them: give its address as master, or a hostfile")
        master = own_address(None)
    if not slots:
        hosts[0] = master
    address = _resolved(master)
    if nodes > 1 and ipaddress.ip_address(address).is_loopback:
        raise ConfigError(
            f"the master {master} is {address} here, where no other node finds it: give its network address"
        )
    at_master = _is_here(address)
    # Nodes that start their parts on their own must agree on the port without asking.
    chosen = free_port() if at_master and options.launcher != "torchrun" else PORT
    found = interface_of(address) if at_master else None
    return Cluster(hosts, gpus, master, options.port or chosen, options.interface or found)


def _own_gpus(options: LaunchOptions) -> int:
    import torch

    return 1 if options.cpu else max(1, torch.cuda.device_count())


def _resolved(host: str) -> str:
    """IP address of a host.

    Raises:
        ConfigError: if it is not known.
    """
    try:
        return str(socket.getaddrinfo(host, None, proto=socket.IPPROTO_TCP)[0][4][0])
    except socket.gaierror as error:
        raise ConfigError(f"the host {host!r} is not known here ({error.strerror})") from None


def own_address(master: str | None) -> str:
    """This machine's IP address on the way to `master`, or to the world; no packet is sent.

    Raises:
        ConfigError: if there is no way.
    """
    address = _resolved(master) if master else "192.0.2.1"  # an address for documentation, that nobody has
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.closing(socket.socket(family, socket.SOCK_DGRAM)) as probe:
        try:
            probe.connect((address, PORT))
        except OSError as error:
            raise ConfigError(f"no way from here to {master or 'a network'} ({error}); give master") from None
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """Name of this machine's network interface that has an address; None for loopback or none."""
    import psutil

    wanted = _resolved(address)
    for name, addresses in psutil.net_if_addrs().items():
        if name != "lo" and any(entry.address.partition("%")[0] == wanted for entry in addresses):
            return str(name)
    return None


def _is_here(address: str) -> bool:
    """Whether an IP address is one of this machine's."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.closing(socket.socket(family)) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
        return True


def free_port() -> int:
    """A port that nothing listens on, at this moment."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _environment(options: LaunchOptions, cluster: Cluster | None) -> dict[str, str]:
    """What every rank gets; a secret only if it is asked for by name, since this is printed."""
    passed = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(PASSED_ON) and not SECRET.search(name)
    }
    if options.cpu:
        passed["CUDA_VISIBLE_DEVICES"] = ""
    if cluster and cluster.interface:
        passed |= {"NCCL_SOCKET_IFNAME": cluster.interface, "GLOO_SOCKET_IFNAME": cluster.interface}
    for entry in options.env:
        name, given, value = entry.partition("=")
        if not given and name not in os.environ:
            raise ConfigError(f"env names {name}, which is not set; set it, or give {name}=VALUE")
        passed[name] = value if given else os.environ[name]
    return passed


def torchrun(
    options: LaunchOptions, cluster: Cluster, host: str | None, at_master: bool, flags: list[str]
) -> list[str]:
    """The command that starts one node's ranks; `host` is that node's own address, if it is known."""
    command = [sys.executable, "-m", "being_vl.launch.torchrun", f"--nproc-per-node={cluster.gpus}"]
    command += [f"--max-restarts={options.max_restarts}"]
    if cluster.port == ALONE:
        command += ["--standalone"]
    else:
        command += [
            f"--nnodes={len(cluster.hosts)}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={cluster.master}:{cluster.port}",
            "--rdzv-id=being-vl",
            # torchrun's own guess fails where a host's name does not lead to the address that is used.
            f"--rdzv-conf=is_host={int(at_master)}",
        ]
        command += [f"--local-addr={host}"] if host else []
    return [*command, "-m", "being_vl", "train", *flags]


def _deepspeed(
    options: LaunchOptions, cluster: Cluster, out: Path, flags: list[str]
) -> tuple[dict[str, str], list[str]]:
    """The variables and the command that start the ranks of all nodes over pdsh and ssh."""
    if not shutil.which("pdsh"):
        raise ConfigError("deepspeed starts other nodes by pdsh, which is not installed (Debian: pdsh)")
    assert options.hostfile is not None
    passed = _environment(options, cluster)
    file = out.absolute() / "deepspeed_env"
    with write_aside(file) as aside:
        aside.touch(mode=0o600)
        aside.write_text("".join(f"{name}={value}\n" for name, value in passed.items()), encoding="utf-8")
    command = [sys.executable, "-m", "deepspeed.launcher.runner", f"--hostfile={options.hostfile}"]
    command += [f"--num_nodes={len(cluster.hosts)}", f"--num_gpus={cluster.gpus}", "--force_multi"]
    command += [f"--master_addr={cluster.master}", f"--master_port={cluster.port}"]
    # pdsh says itself which host it can't reach, and the check knows nothing of PDSH_SSH_ARGS_APPEND.
    command += ["--no_ssh_check", "--no_local_rank", "--module", "being_vl", "train", *flags]
    return {"DS_ENV_FILE": str(file)}, command


def slurm_script(options: LaunchOptions, training: TrainOptions, flags: list[str]) -> str:
    """The sbatch script: one `being-vl launch` per node, told to save before the time is over, queued again after."""
    if options.gpus_per_node is None:
        raise ConfigError(
            "slurm must be asked for GPUs: give gpus_per_node; with cpu it is the ranks per node"
        )
    nodes, gpus = options.nodes or 1, options.gpus_per_node
    directives = [
        f"job-name=being-vl-{training.out.name}",
        f"nodes={nodes}",
        "ntasks-per-node=1",
        *([] if options.cpu else [f"gpus-per-node={gpus}"]),
        f"time={options.time}",
        f"signal=USR1@{options.warning}",
        "requeue",
        "open-mode=append",
        f"output={training.out.absolute()}/slurm-%j.log",
        *options.sbatch,
    ]
    exports = [f"export {name}={shlex.quote(value)}" for name, value in _environment(options, None).items()]
    start = [
        sys.executable,
        "-m",
        "being_vl",
        "launch",
        flags[1],
        f"--nodes={nodes}",
        f"--gpus-per-node={gpus}",
    ]
    start += [f"--max-restarts={options.max_restarts}", *(["--cpu"] if options.cpu else [])]
    start += [f"--interface={options.interface}"] if options.interface else []
    port = options.port or "$((20000 + SLURM_JOB_ID % 10000))"
    finished = shlex.quote(str(training.out.absolute() / training.stages[-1].name / MANIFEST))
    more = " ".join(["--", *map(shlex.quote, flags[2:])]) if flags[2:] else ""
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH --{directive}" for directive in directives),
            "set -euo pipefail",
            f"cd {shlex.quote(str(Path.cwd()))}",
            *exports,
            'master=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            "srun --kill-on-bad-exit=1 --cpu-bind=none ${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK} \\",
            f'    {shlex.join(start)} --with=torchrun --master="$master" --port="{port}" {more}'.rstrip(),
            "# Told to save by Slurm, training ends well before its last stage is finished: queue again to go on.",
            f'[ -f {finished} ] || scontrol requeue "$SLURM_JOB_ID"',
            "",
        ]
    )


def _submit(script: str, out: Path, say: Callable[[str], None]) -> None:
    if not shutil.which("sbatch"):
        raise ConfigError(
            "slurm: there is no sbatch here; run this on a login node, or use dry_run to see the script"
        )
    path = out / "job.sbatch"
    with write_aside(path) as aside:
        aside.write_text(script, encoding="utf-8")
    done = subprocess.run(["sbatch", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"sbatch {path}: {done.stderr.strip()}")
    say(done.stdout.strip())


def _shown(environment: Mapping[str, str], command: list[str]) -> str:
    """As a line for a shell."""
    variables = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    return " ".join([f"cd {shlex.quote(str(Path.cwd()))} &&", *variables, shlex.join(command)])
