"""Which parameters a stage trains, and the table that says so."""

import math
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from being_vl.errors import ConfigError
from being_vl.train.options import StageOptions
from being_vl.train.split import LORA, TrainedLM


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
    """Every parameter of the model once, from input to output, grouped by whether the stage trains it.

    Raises:
        ConfigError: if `unfreeze` asks for layers or names that the model has not.
    """
    layers, unfreeze = model.layers(), stage.unfreeze
    everything = unfreeze == "all"
    text = [model.embedding.text] if model.tied else [model.embedding.text, model.head.text]
    found = [
        Group("new visual rows", model.visual_parameters(), True),
        Group("text rows", text, everything if stage.text_rows is None else stage.text_rows),
    ]
    if isinstance(unfreeze, list):
        found.append(Group("named", _named(model, stage.name, unfreeze), True))
    else:
        first = _first(stage, len(layers))
        found += [
            Group(f"layers 0 to {first - 1}", list(layers[:first].parameters()), True),
            Group(f"layers {first} to {len(layers) - 1}", list(layers[first:].parameters()), False),
        ]
    known = {id(parameter) for group in found for parameter in group.parameters}
    others = [parameter for parameter in model.parameters() if id(parameter) not in known]
    found.append(Group("others" if isinstance(unfreeze, list) else "final norm, others", others, everything))
    return [group for group in found if group.parameters]


def _first(stage: StageOptions, layers: int) -> int:
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


def _named(model: TrainedLM, stage: str, patterns: list[str]) -> list[nn.Parameter]:
    """Parameters, rows not among them, whose names hold one of the patterns as whole parts between dots."""
    rows = {id(parameter) for part in (model.embedding, model.head) for parameter in part.parameters()}
    names = {f".{name}.": p for name, p in model.lm.named_parameters() if id(p) not in rows}
    matches = {pattern: [n for n in names if fnmatchcase(n, f"*.{pattern}.*")] for pattern in patterns}
    for pattern, matching in matches.items():
        if not matching:
            some = ", ".join(name.strip(".") for name in list(names)[:3])
            raise ConfigError(
                f"stage {stage!r}: unfreeze names {pattern!r}, but parameters are called {some} ..."
            )
    return [names[name] for name in dict.fromkeys(n for matching in matches.values() for n in matching)]


def add_adapters(model: TrainedLM, stage: StageOptions) -> None:
    """Put LoRA adapters (arXiv 2106.09685) on the linear layers that the stage would train without them.

    Raises:
        ConfigError: if there are none.
    """
    assert stage.lora is not None
    from peft import LoraConfig, inject_adapter_in_model

    rows = {id(model.embedding.text), id(model.head.text)}
    trained = {id(p) for g in groups(model, stage) if g.trains for p in g.parameters} - rows
    targets = [
        name
        for name, module in model.lm.named_modules()
        if isinstance(module, nn.Linear)
        and id(module.weight) in trained
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


def freeze(model: TrainedLM, stage: StageOptions) -> str:
    """Set `requires_grad` as the stage says and return a table of what trains.

    Raises:
        ConfigError: if nothing is left to train.
    """
    found = groups(model, stage)
    if stage.lora:
        adapters = {id(p) for name, p in model.lm.named_parameters() if LORA in name}
        rows, rest = found[:2], found[2:]
        found = [
            *rows,
            *(Group(g.name, [p for p in g.parameters if id(p) not in adapters], False) for g in rest),
        ]
        found.append(Group("adapters", [p for g in rest for p in g.parameters if id(p) in adapters], True))
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
