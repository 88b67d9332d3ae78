"""A plan as text: a table with a column for each stage, and what makes a stage fit that does not."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from being_vl.estimate.estimate import Estimate, Gpus, compute_dtype
from being_vl.estimate.memory import Memory, estimate_memory
from being_vl.estimate.options import PlanOptions
from being_vl.training.options import TrainOptions

RESERVED_SHARE = 0.1
"""Share of a GPU that a plan leaves free: CUDA's context, kernels' workspaces, fragments, short-lived tensors."""


def describe_plan(
    title: str, options: PlanOptions, training: TrainOptions, estimates: list[Estimate], gpus: Gpus
) -> str:
    """The plan as a table with a column for each stage, and advice for each that does not fit."""
    steps_known = all(stage.steps is not None for stage in estimates)
    seconds = [stage.flops / (options.mfu * gpus.flops * gpus.number) for stage in estimates]
    rows = _memory_rows(training, estimates)
    if steps_known:
        rows += [
            ("steps", [f"{stage.steps:,}" for stage in estimates]),
            ("tokens", [f"{stage.tokens:,.0f}" for stage in estimates]),
            ("PFLOP", [f"{stage.flops / 1e15:,.1f}" for stage in estimates]),
            (f"hours at MFU {options.mfu:.0%}", [f"{value / 3600:,.2f}" for value in seconds]),
        ]
        flops = sum(stage.flops for stage in estimates)
        summary = f"{sum(seconds) / 3600:,.1f} hours and {flops / 1e15:,.0f} PFLOP in all"
    else:
        rows += [
            ("tokens per step", [f"{stage.tokens:,.0f}" for stage in estimates]),
            ("PFLOP per step", [f"{stage.flops / 1e15:,.1f}" for stage in estimates]),
            (f"seconds per step at MFU {options.mfu:.0%}", [f"{value:,.2f}" for value in seconds]),
        ]
        summary = "the number of records is not known: give records, such as '{\"foundation\": 558000}'"
    lines = [title, *(f"{name:<28}" + "".join(f"{cell:>16}" for cell in cells) for name, cells in rows)]
    lines += [summary, *filter(None, (advise(stage, training, gpus) for stage in estimates))]
    return "\n".join(line.rstrip() for line in lines)


def _memory_rows(training: TrainOptions, estimates: list[Estimate]) -> list[tuple[str, list[str]]]:
    """Name and cells of the rows about parameters, memory and disk."""
    checkpoints = training.checkpoint.keep + 1  # one more while it is written
    return [
        ("", [stage.name for stage in estimates]),
        ("parameters", [f"{stage.states.total:,}" for stage in estimates]),
        ("trained", [f"{stage.states.trained_size:,}" for stage in estimates]),
        ("GB per GPU", []),
        *(
            (f"  {part}", [f"{getattr(stage.memory, part) / 1e9:.2f}" for stage in estimates])
            for part in Memory._fields
        ),
        ("  together", [f"{stage.memory.total / 1e9:.2f}" for stage in estimates]),
        ("GB of host per GPU", [f"{stage.host / 1e9:.2f}" for stage in estimates]),
        ("GB on disk", []),
        ("  to resume", [f"{checkpoints * stage.resume / 1e9:.2f}" for stage in estimates]),
        ("  result", [f"{stage.result / 1e9:.2f}" for stage in estimates]),
    ]


def advise(estimate: Estimate, training: TrainOptions, gpus: Gpus) -> str | None:
    """Which options would make a stage fit; None if it fits already."""

    def total(changes: Mapping[str, Any], count: int = gpus.number) -> float:
        memory, _ = estimate_memory(
            estimate.states,
            estimate.activations,
            replace_options(training, changes),
            count,
            compute_dtype(training),
        )
        return memory.total

    room = (1 - RESERVED_SHARE) * gpus.memory
    if total({}) <= room:
        return None
    problem = f"{estimate.name}: {estimate.memory.total / 1e9:.1f} GB do not fit in {room / 1e9:.1f} GB"
    changes = _list_changes(training, gpus, lambda change: total(change) <= room)
    # One option alone.
    single_changes = [f"{show_options(c)} ({total(c) / 1e9:.1f} GB)" for c in changes if total(c) <= room]
    if single_changes:
        return f"{problem}. Any of these makes it fit: {'; '.join(single_changes)}"
    # As few options together as it takes.
    combination: dict[str, Any] = {}
    for change in changes:
        combination |= change
        if total(combination) <= room:
            gigabytes = total(combination) / 1e9
            return f"{problem}. Together these make it fit: {show_options(combination)} ({gigabytes:.1f} GB)"
    # All of them on more GPUs.
    combination |= {"zero": 3}
    counts = [gpus.number << doublings for doublings in range(1, 11)]
    count = next((count for count in counts if total(combination, count) <= room), None)
    if count:
        gigabytes = total(combination, count) / 1e9
        return f"{problem}. It takes {count} GPUs, with {show_options(combination)} ({gigabytes:.1f} GB)"
    return f"{problem}, nor in any number of such GPUs: lower sequences.max_length, or take a smaller model"


def _list_changes(
    training: TrainOptions, gpus: Gpus, fits: Callable[[dict[str, Any]], bool]
) -> list[dict[str, Any]]:
    """The options that save memory and are not set yet, in the order of what they cost."""
    changes: list[dict[str, Any]] = []
    if not training.gradient_checkpointing:
        changes.append({"gradient_checkpointing": True})
    changes += [{"zero": zero} for zero in (2, 3) if zero > training.zero and gpus.number > 1]
    size = training.batches.micro_batch_size
    if size > 1:
        sizes = [{"batches.micro_batch_size": size >> halvings} for halvings in range(1, size.bit_length())]
        changes.append(next(filter(fits, sizes), sizes[-1]))
    if training.offload == "none" and training.zero:
        changes.append({"offload": "optimizer"})
    return changes


def replace_options(training: TrainOptions, changes: Mapping[str, Any]) -> TrainOptions:
    """A training with other values of some options, those of nested ones under `outer.inner`."""
    for name, value in changes.items():
        section, _, option = name.partition(".")
        if option:
            value = dataclasses.replace(getattr(training, section), **{option: value})
        training = dataclasses.replace(training, **{section: value})
    return training


def show_options(options: Mapping[str, Any]) -> str:
    """Options as they stand in a recipe."""
    return ", ".join(f"{name}: {str(value).lower()}" for name, value in options.items())
