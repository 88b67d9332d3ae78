"""The machines of a training: which they are, and where their ranks meet."""

import contextlib
import ipaddress
import re
import socket
from pathlib import Path
from typing import NamedTuple

from being_vl.errors import ConfigError
from being_vl.launch.options import LaunchOptions

PORT = 29500
"""Where ranks meet if no port is given and none can be looked for."""
SINGLE_NODE_PORT = 0
"""The port of a training on one machine, where torchrun finds one itself."""


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
        match = re.fullmatch(r"slots=([1-9]\d*)", words[1]) if len(words) == 2 else None
        if match is None:
            raise ConfigError(f"{path}, line {number}: expected `HOST slots=GPUS`, found {line.strip()!r}")
        if words[0] in slots:
            raise ConfigError(f"{path}, line {number}: {words[0]} comes twice")
        slots[words[0]] = int(match[1])
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
    if options.launcher == "deepspeed" and not slots:
        raise ConfigError(
            "deepspeed needs a hostfile with the lines `HOST slots=GPUS`; on one machine use torchrun"
        )
    gpus = _count_gpus(options, slots, nodes)
    hosts: list[str | None] = [*list(slots)[:nodes]] or [None] * nodes
    if nodes == 1 and not slots:
        return Cluster(hosts, gpus, "127.0.0.1", SINGLE_NODE_PORT, options.interface)
    master = _find_master(options, hosts[0])
    if not slots:
        hosts[0] = master
    try:
        address = resolve_host(master)
    except ConfigError:
        # Lines that are only printed are for machines that may know more names than this one.
        if options.launcher != "print":
            raise
        return Cluster(hosts, gpus, master, options.port or PORT, options.interface)
    if nodes > 1 and ipaddress.ip_address(address).is_loopback:
        raise ConfigError(
            f"the master {master} is {address} here, where no other node finds it: give its network address"
        )
    is_master = is_this_machine(address)
    # Nodes that start their parts on their own must agree on the port without asking.
    port = free_port() if is_master and options.launcher != "torchrun" else PORT
    interface = find_interface(address) if is_master else None
    return Cluster(hosts, gpus, master, options.port or port, options.interface or interface)


def _count_gpus(options: LaunchOptions, slots: dict[str, int], nodes: int) -> int:
    """Processes on each node."""
    if slots and nodes > len(slots):
        raise ConfigError(f"{options.hostfile}: names {len(slots)} hosts, but nodes is {nodes}")
    slots = dict(list(slots.items())[:nodes])
    if not slots:
        return options.gpus_per_node or _count_local_gpus(options)
    gpus = options.gpus_per_node or min(slots.values())
    for host, number in slots.items():
        if gpus > number:
            raise ConfigError(f"{options.hostfile}: {host} has {number} slots, but gpus_per_node is {gpus}")
    return gpus


def _count_local_gpus(options: LaunchOptions) -> int:
    import torch

    return 1 if options.cpu else max(1, torch.cuda.device_count())


def _find_master(options: LaunchOptions, first_host: str | None) -> str:
    """Where the ranks meet; by default the hostfile's first host, or this machine."""
    master = options.master or first_host
    if master is not None:
        return master
    if options.launcher == "torchrun":
        raise ConfigError("several nodes meet at one of them: give its address as master, or a hostfile")
    return local_address(None)


def resolve_host(host: str) -> str:
    """IP address of a host.

    Raises:
        ConfigError: if it is not known.
    """
    try:
        return str(socket.getaddrinfo(host, None, proto=socket.IPPROTO_TCP)[0][4][0])
    except (socket.gaierror, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"the host {host!r} is not known here ({reason})") from None


def local_address(master: str | None) -> str:
    """This machine's IP address on the way to `master`, or to the world; no packet is sent.

    Raises:
        ConfigError: if there is no way.
    """
    address = resolve_host(master) if master else "192.0.2.1"  # an address for documentation, that nobody has
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.closing(socket.socket(family, socket.SOCK_DGRAM)) as probe:
        try:
            probe.connect((address, PORT))
        except OSError as error:
            raise ConfigError(f"no way from here to {master or 'a network'} ({error}); give master") from None
        return str(probe.getsockname()[0])


def find_interface(address: str) -> str | None:
    """Name of this machine's network interface that has an address; None for loopback or none."""
    import psutil

    ip = resolve_host(address)
    for name, addresses in psutil.net_if_addrs().items():
        if name != "lo" and any(entry.address.partition("%")[0] == ip for entry in addresses):
            return str(name)
    return None


def is_this_machine(address: str) -> bool:
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
