"""`being-vl launch`: the command that starts a training on one or several machines, run or printed."""

import os
from collections.abc import Iterator

from being_vl.errors import ConfigError, ModelError, RecordError
from being_vl.files import MANIFEST, to_jsonable, write_shared_json
from being_vl.hub import is_hub_name
from being_vl.launch.cluster import find_cluster, find_interface, is_this_machine, local_address, resolve_host
from being_vl.launch.deepspeed import deepspeed_command
from being_vl.launch.options import LaunchOptions
from being_vl.launch.shell import forwarded_environment, shell_line
from being_vl.launch.slurm import slurm_script, submit_job
from being_vl.launch.torchrun import node_command
from being_vl.recipes.recipe import Recipe
from being_vl.training.fingerprint import check_output
from being_vl.training.options import TrainOptions


def launch(options: LaunchOptions) -> str:
    """Start a training, or print how.

    Args:
        options: Of the launch.

    Returns:
        What is to be printed: commands, a script, or what Slurm says. It does not return where it starts a training
        here: this process becomes torchrun or DeepSpeed.

    Raises:
        ConfigError: if hostfile, master and numbers do not fit together, a tool is missing, or the recipe is wrong.
        ModelError, RecordError: if the recipe's model or records are missing.
        OutputError: if the training's folder holds anything else.
    """
    recipe = Recipe.find(options.recipe)
    training = recipe.training(options.overrides)
    check_inputs(recipe, training)
    check_output(training)
    flags = _train_flags(options, recipe, training)
    if options.launcher == "slurm":
        script = slurm_script(options, training, flags)
        return script if options.dry_run else submit_job(script, training.out)
    if options.launcher == "print":
        return "\n".join(_node_lines(options, flags))
    cluster = find_cluster(options)
    if options.launcher == "deepspeed":
        environment, command = deepspeed_command(options, cluster, training.out, flags)
    else:
        address = local_address(cluster.master)
        cluster = cluster._replace(interface=options.interface or find_interface(address))
        is_master = is_this_machine(resolve_host(cluster.master))
        environment = forwarded_environment(options, cluster)
        command = node_command(cluster, address, is_master, ["train", *flags], options.max_restarts)
    if not options.dry_run:
        os.execvpe(command[0], command, os.environ | environment)
    return shell_line(environment, command)


def check_inputs(recipe: Recipe, training: TrainOptions) -> None:
    """Find what is missing before any machine is asked for.

    Raises:
        ConfigError, ModelError, RecordError: if the training's grids, model or records are missing.
    """
    if not (training.model / "config.json").is_file():
        if recipe.is_run:
            raise ConfigError(
                f"{training.model}: there is no model yet; `being-vl run {recipe.name} --until expand` makes it"
            )
        raise ModelError(f"{training.model}: no config.json; expected the folder of a causal LM")
    for file in training.records:
        if not is_hub_name(file.path) and not file.path.exists():
            raise RecordError(f"{file.path}: there is no such file of records")
    for grids in training.grids:
        if not (grids / MANIFEST).is_file():
            raise ConfigError(f"{grids}: no {MANIFEST}; expected a folder that `being-vl quantize` finished")


def _train_flags(options: LaunchOptions, recipe: Recipe, training: TrainOptions) -> list[str]:
    """The flags with which `being-vl train` has the same options: its recipe, and what overrides that.

    The training of a run has no recipe of its own: it is written into the training's folder.
    """
    if not recipe.is_run:
        return ["--recipe", str(recipe.path), *options.overrides]
    path = training.out / "options.json"
    if not options.dry_run:
        write_shared_json(path, to_jsonable(training))  # the launches of all nodes do
    return ["--recipe", str(path)]


def _node_lines(options: LaunchOptions, flags: list[str]) -> Iterator[str]:
    """A comment and a command for each node."""
    cluster = find_cluster(options)
    environment = forwarded_environment(options, cluster)
    for number, host in enumerate(cluster.hosts):
        is_master = host == cluster.master
        yield f"# on {host or f'node {number}'}" + (", the master" if is_master else "")
        yield shell_line(
            environment, node_command(cluster, host, is_master, ["train", *flags], options.max_restarts)
        )
