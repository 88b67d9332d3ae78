"""Which parameters a stage trains, and the table that says so."""

import math
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from being_vl.errors import ConfigError
from being_vl.training.options import StageOptions
from being_vl.training.split import LORA, TwoPartLM

NEW_ROWS, TEXT_ROWS = "new visual rows", "text rows"
"""Names of the groups of rows; all other groups are of layers or what stands beside them."""


class ParameterGroup(NamedTuple):
    """Parameters that are frozen or trained together."""

    name: str
    parameters: list[nn.Parameter]
    trains: bool

    @property
    def size(self) -> int:
        """Number of scalars."""
        return sum(parameter.numel() for parameter in self.parameters)


def group_parameters(model: TwoPartLM, stage: StageOptions) -> list[ParameterGroup]:
    """Every parameter of the model once, from input to output, group_ids by whether the stage trains it.

    Raises:
        ConfigError: if `unfreeze` asks for layers or names that the model has not.
    """
    layers, unfreeze = model.layers(), stage.unfreeze
    train_all = unfreeze == "all"
    # Rows first: the new ones always train, those of text as the stage says.
    text_rows = (
        [model.embedding.text_rows] if model.is_tied else [model.embedding.text_rows, model.head.text_rows]
    )
    groups = [
        ParameterGroup(NEW_ROWS, model.visual_parameters(), True),
        ParameterGroup(TEXT_ROWS, text_rows, train_all if stage.text_rows is None else stage.text_rows),
    ]
    # Then the parameters that are named, or the first layers and the others.
    if isinstance(unfreeze, list):
        groups.append(ParameterGroup("named", _find_parameters(model, stage.name, unfreeze), True))
    else:
        count = _count_layers(stage, len(layers))
        groups += [
            ParameterGroup(f"layers 0 to {count - 1}", list(layers[:count].parameters()), True),
            ParameterGroup(f"layers {count} to {len(layers) - 1}", list(layers[count:].parameters()), False),
        ]
    # Last, what is in none of these.
    group_ids = {id(parameter) for group in groups for parameter in group.parameters}
    other_parameters = [parameter for parameter in model.parameters() if id(parameter) not in group_ids]
    name = "others" if isinstance(unfreeze, list) else "final norm, others"
    groups.append(ParameterGroup(name, other_parameters, train_all))
    return [group for group in groups if group.parameters]


def _count_layers(stage: StageOptions, layers: int) -> int:
    """How many of the first layers train."""
    assert not isinstance(stage.unfreeze, list)
    if stage.unfreeze == "all":
        return layers
    if isinstance(stage.unfreeze, int):
        if stage.unfreeze > layers:
            raise ConfigError(
                f"stage {stage.name!r}: unfreeze is {stage.unfreeze}, but the model has {layers} layers"
            )
        return stage.unfreeze
    return math.ceil(stage.unfreeze * layers)


def _find_parameters(model: TwoPartLM, stage: str, patterns: list[str]) -> list[nn.Parameter]:
    """Parameters, rows not among them, whose names hold one of the patterns as whole parts between dots."""
    rows = {id(parameter) for part in (model.embedding, model.head) for parameter in part.parameters()}
    names = {f".{name}.": p for name, p in model.lm.named_parameters() if id(p) not in rows}
    matches = {pattern: [n for n in names if fnmatchcase(n, f"*.{pattern}.*")] for pattern in patterns}
    for pattern, matching_names in matches.items():
        if not matching_names:
            first_names = ", ".join(name.strip(".") for name in list(names)[:3])
            raise ConfigError(
                f"stage {stage!r}: unfreeze names {pattern!r}, but parameters are called {first_names} ..."
            )
    return [
        names[name]
        for name in dict.fromkeys(n for matching_names in matches.values() for n in matching_names)
    ]


def add_adapters(model: TwoPartLM, stage: StageOptions) -> None:
    """Put LoRA adapters (arXiv 2106.09685) on the linear layers that the stage would train without them.

    Raises:
        ConfigError: if there are none.
    """
    assert stage.lora is not None
    from peft import LoraConfig, inject_adapter_in_model

    # The linear layers whose weights would train, the output head not among them.
    rows = {id(model.embedding.text_rows), id(model.head.text_rows)}
    groups = group_parameters(model, stage)
    weights = {id(p) for group in groups if group.trains for p in group.parameters} - rows
    targets = [
        name
        for name, module in model.lm.named_modules()
        if isinstance(module, nn.Linear)
        and id(module.weight) in weights
        and any(fnmatchcase(f".{name}.", f"*.{pattern}.*") for pattern in stage.lora.targets)
    ]
    if not targets:
        raise ConfigError(
            f"stage {stage.name!r}: no linear layer of unfreeze {stage.unfreeze} is called {stage.lora.targets}"
        )
    options = stage.lora
    config = LoraConfig(
        r=options.rank, lora_alpha=options.alpha, lora_dropout=options.dropout, target_modules=targets
    )
    inject_adapter_in_model(config, model.lm)


def freeze(model: TwoPartLM, stage: StageOptions) -> str:
    """Set `requires_grad` as the stage says and return a table of what trains.

    Raises:
        ConfigError: if nothing is left to train.
    """
    # What is frozen and what trains.
    groups = group_parameters(model, stage)
    if stage.lora:
        groups = _group_adapters(model, groups)
    for group in groups:
        for parameter in group.parameters:
            parameter.requires_grad_(group.trains)
    # The table, a line for each group.
    total_size = sum(group.size for group in groups)
    trained_size = sum(group.size for group in groups if group.trains)
    if not trained_size:
        raise ConfigError(
            f"stage {stage.name!r}: nothing would train; the model has no new visual rows (is it expanded?) "
            f"and unfreeze is {stage.unfreeze}"
        )
    lines = [f"{stage.name}: what trains (unfreeze {stage.unfreeze}, learning rate {stage.learning_rate:g})"]
    lines += [f"  {g.name:<22}{g.size:>16,}  {'trains' if g.trains else 'frozen'}" for g in groups]
    lines += [f"  {'trained':<22}{trained_size:>16,}  of {total_size:,} ({trained_size / total_size:.2%})"]
    return "\n".join(lines)


def _group_adapters(model: TwoPartLM, groups: list[ParameterGroup]) -> list[ParameterGroup]:
    """The groups of a stage whose adapters train in place of the weights that they are on; rows stay as they are."""
    adapters = {id(p) for name, p in model.lm.named_parameters() if LORA in name}
    rows = [group for group in groups if group.name in (NEW_ROWS, TEXT_ROWS)]
    layers = [group for group in groups if group.name not in (NEW_ROWS, TEXT_ROWS)]
    layer_groups = [
        ParameterGroup(group.name, [p for p in group.parameters if id(p) not in adapters], False)
        for group in layers
    ]
    parameters = [p for group in layers for p in group.parameters if id(p) in adapters]
    return [*rows, *layer_groups, ParameterGroup("adapters", parameters, True)]
