"""Starting the ranks of all nodes by DeepSpeed's launcher."""

import shutil
import sys
from pathlib import Path

from being_vl.errors import ConfigError
from being_vl.files import write_aside
from being_vl.launch.cluster import Cluster
from being_vl.launch.options import LaunchOptions
from being_vl.launch.shell import forwarded_environment


def deepspeed_command(
    options: LaunchOptions, cluster: Cluster, out: Path, flags: list[str]
) -> tuple[dict[str, str], list[str]]:
    """The variables and the command that start the ranks of all nodes over pdsh and ssh.

    Args:
        options: Of the launch, with a hostfile.
        cluster: The machines.
        out: The training's folder; a file with the ranks' variables is written there, unless this is a dry run.
        flags: Of `being-vl train`.

    Raises:
        ConfigError: if there is no pdsh.
    """
    if not shutil.which("pdsh"):
        raise ConfigError("deepspeed starts other nodes by pdsh, which is not installed (Debian: pdsh)")
    assert options.hostfile is not None
    variables = forwarded_environment(options, cluster)
    file = out.absolute() / "deepspeed_env"
    if not options.dry_run:
        with write_aside(file) as temporary_path:
            temporary_path.touch(mode=0o600)
            temporary_path.write_text("".join(f"{k}={v}\n" for k, v in variables.items()), encoding="utf-8")
    command = [sys.executable, "-m", "deepspeed.launcher.runner", f"--hostfile={options.hostfile}"]
    command += [f"--num_nodes={len(cluster.hosts)}", f"--num_gpus={cluster.gpus}", "--force_multi"]
    command += [f"--master_addr={cluster.master}", f"--master_port={cluster.port}"]
    # pdsh says itself which host it can't reach, and the check knows nothing of PDSH_SSH_ARGS_APPEND.
    command += ["--no_ssh_check", "--no_local_rank", "--module", "being_vl", "train", *flags]
    return {"DS_ENV_FILE": str(file)}, command
