"""Which parameters a stage trains, and the table that says so."""

import math
from typing import NamedTuple

from torch import nn

from being_vl.errors import ConfigError
from being_vl.train.options import StageOptions
from being_vl.train.split import TrainedLM


class Group(NamedTuple):
    """Parameters that are frozen or trained together."""

    name: str
    parameters: list[nn.Parameter]
    trains: bool

    @property
    def size(self) -> int:
        """Number of scalars."""
        return sum(parameter.numel() for parameter in self.parameters)


def groups(model: TrainedLM, stage: StageOptions) -> list[Group]:
    """Every parameter of the model once, from input to output, grouped by whether the stage trains it."""
    layers, everything = model.layers(), stage.unfreeze == "all"
    first = len(layers) if stage.unfreeze == "all" else math.ceil(stage.unfreeze * len(layers))
    text = [model.embedding.text] if model.tied else [model.embedding.text, model.head.text]
    found = [
        Group("new visual rows", model.visual_parameters(), True),
        Group("text rows", text, everything),
        Group(f"layers 0 to {first - 1}", list(layers[:first].parameters()), True),
        Group(f"layers {first} to {len(layers) - 1}", list(layers[first:].parameters()), False),
    ]
    named = {id(parameter) for group in found for parameter in group.parameters}
    others = [parameter for parameter in model.parameters() if id(parameter) not in named]
    found.append(Group("final norm, others", others, everything))
    return [group for group in found if group.parameters]


def freeze(model: TrainedLM, stage: StageOptions) -> str:
    """Set `requires_grad` as the stage says and return a table of what trains.

    Raises:
        ConfigError: if nothing is left to train.
    """
    found = groups(model, stage)
    for group in found:
        for parameter in group.parameters:
            parameter.requires_grad_(group.trains)
    total = sum(group.size for group in found)
    trained = sum(group.size for group in found if group.trains)
    if not trained:
        raise ConfigError(
            f"stage {stage.name!r}: nothing would train; the model has no new visual rows (is it expanded?) "
            f"and unfreeze is {stage.unfreeze}"
        )
    lines = [f"{stage.name}: what trains (unfreeze {stage.unfreeze}, learning rate {stage.learning_rate:g})"]
    lines += [f"  {g.name:<22}{g.size:>16,}  {'trains' if g.trains else 'frozen'}" for g in found]
    lines += [f"  {'trained':<22}{trained:>16,}  of {total:,} ({trained / total:.2%})"]
    return "\n".join(lines)
