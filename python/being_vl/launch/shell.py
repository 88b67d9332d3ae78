"""Commands with their variables: what goes to every rank, and how a command is printed."""

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from being_vl.errors import ConfigError
from being_vl.launch.cluster import Cluster
from being_vl.launch.options import LaunchOptions

FORWARDED_ENV = (
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


def forwarded_environment(options: LaunchOptions, cluster: Cluster | None) -> dict[str, str]:
    """The variables that every rank gets; a secret only if it is asked for by name, since this is printed.

    Args:
        options: Of the launch.
        cluster: The machines, where they are known.

    Raises:
        ConfigError: if `env` names a variable that is not set.
    """
    variables = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(FORWARDED_ENV) and not SECRET.search(name)
    }
    if options.cpu:
        variables["CUDA_VISIBLE_DEVICES"] = ""
    if cluster and cluster.interface:
        variables |= {"NCCL_SOCKET_IFNAME": cluster.interface, "GLOO_SOCKET_IFNAME": cluster.interface}
    for entry in options.env:
        name, separator, value = entry.partition("=")
        if not separator and name not in os.environ:
            raise ConfigError(f"env names {name}, which is not set; set it, or give {name}=VALUE")
        variables[name] = value if separator else os.environ[name]
    return variables


def shell_line(environment: Mapping[str, str], command: list[str]) -> str:
    """A command with its variables as a line for a shell, from this folder."""
    variables = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    return " ".join([f"cd {shlex.quote(str(Path.cwd()))} &&", *variables, shlex.join(command)])
