"""What each stage of a training takes, before a GPU is touched.

The model is built as training builds it, of tensors without memory, so parameters and activations are those of the
real one. What DeepSpeed keeps of them follows from its ZeRO stage.
"""

import math
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from being_vl.errors import ConfigError
from being_vl.estimate.memory import Activations, Memory, States, estimate_memory, measure_activations
from being_vl.estimate.options import PlanOptions
from being_vl.estimate.shapes import Shape, build_model, without_memory
from being_vl.training.metrics import Cost
from being_vl.training.options import StageOptions, TrainOptions
from being_vl.training.stages import add_adapters, freeze


class Gpus(NamedTuple):
    """The GPUs of a plan.

    Args:
        number: How many, on all nodes together.
        memory: Bytes of each.
        flops: Floating-point operations per second of each at best, dense bf16.
    """

    number: int
    memory: float
    flops: float


class StageReading(NamedTuple):
    """What a stage reads.

    Args:
        steps: Optimizer steps; None if they are not known.
        records: Of all steps, or of one if their number is not known.
        tokens: Of these records.
    """

    steps: int | None
    records: float
    tokens: float


@dataclass(frozen=True)
class Estimate:
    """What one stage takes.

    Args:
        name: Of the stage.
        states: Its parameters.
        activations: Of one row.
        memory: Of each GPU.
        host: Bytes of the host's memory for each GPU.
        resume: Bytes of a checkpoint to resume from.
        result: Bytes of the stage's plain model.
        steps: Optimizer steps; None if the number of records is not known.
        tokens: Tokens of all steps, or of one if the number of steps is not known.
        flops: Floating-point operations of those tokens.
    """

    name: str
    states: States
    activations: Activations
    memory: Memory
    host: int
    resume: int
    result: int
    steps: int | None
    tokens: float
    flops: float


def read_gpus(options: PlanOptions) -> Gpus:
    """What `gpus` says.

    Raises:
        ConfigError: if it is not of the form `8x80GB`.
    """
    match = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)x(\d+(?:\.\d+)?)GB", options.gpus)
    if not match or not float(match[3]):
        raise ConfigError(f"gpus is {options.gpus!r}; expected such as 8x80GB, or 4x8x80GB for four nodes")
    return Gpus(int(match[1] or 1) * int(match[2]), float(match[3]) * 1e9, options.tflops * 1e12)


def read_stages(options: PlanOptions, training: TrainOptions, ranks: int) -> list[StageReading]:
    """What each stage will read: of the records themselves if they exist, else as the options describe them.

    Args:
        options: Of the plan.
        training: To be planned.
        ranks: Number of GPUs.
    """
    from being_vl.data.sequences import RecordGroup
    from being_vl.training.engine import load_sequences
    from being_vl.training.schedule import make_schedules

    has_inputs = all(file.path.exists() for file in training.records) and training.model.is_dir()
    if not options.records and has_inputs:
        lengths = load_sequences(training).lengths
    elif options.records:
        lengths = {
            RecordGroup(category, "planned", False): np.full(count, options.mean_length, np.int32)
            for category, count in options.records.items()
        }
    else:
        return [_read_step(training, stage, options.mean_length, ranks) for stage in training.stages]
    return [
        StageReading(stage.steps, stage.records, stage.tokens)
        for stage in make_schedules(training, lengths, ranks)
    ]


def _read_step(training: TrainOptions, stage: StageOptions, mean_length: int, ranks: int) -> StageReading:
    """What one step of a stage reads, where the number of records is not known."""
    rows = stage.batch_size or training.batches.micro_batch_size * stage.accumulation * ranks
    records = rows * max(1, (training.batches.packing or 0) // mean_length)
    return StageReading(None, records, records * mean_length)


def estimate_stages(
    options: PlanOptions, training: TrainOptions, shape: Shape, readings: list[StageReading], gpus: Gpus
) -> list[Estimate]:
    """Estimate every stage.

    Args:
        options: Of the plan.
        training: To be planned.
        shape: Of its model.
        readings: What each stage reads.
        gpus: What it runs on.
    """
    dtype = compute_dtype(training)
    label_tokens = max(1, round(options.label_share * row_length(training, shape)))
    estimates = []
    with without_memory():
        full_model = build_model(shape, training, dtype)
        for stage, reading in zip(training.stages, readings, strict=True):
            # The stage's model, with what it trains.
            model = full_model
            if stage.lora:
                model = build_model(shape, training, dtype)
                add_adapters(model, stage)
            freeze(model, stage)
            # Bytes.
            states = States.from_model(model)
            activations = measure_activations(model, row_length(training, shape), label_tokens)
            memory, host = estimate_memory(states, activations, training, gpus.number, dtype)
            float32_copy = 4 if training.zero or dtype.itemsize < 4 else 0
            resume = states.trained_size * (dtype.itemsize + 8 + float32_copy)
            result = states.total * _stored_itemsize(shape.config)
            # Operations.
            cost = Cost.from_model(model)
            mean = max(1, round(reading.tokens / reading.records))
            flops = (
                cost.flops([mean], round(options.label_share * mean)) * reading.records if cost else math.nan
            )
            estimates.append(
                Estimate(
                    *(stage.name, states, activations, memory, host, resume, result),
                    *(reading.steps, reading.tokens, flops),
                )
            )
    return estimates


def compute_dtype(training: TrainOptions) -> torch.dtype:
    """What the GPUs of a plan compute in; `auto` is bf16 there."""
    return torch.float32 if training.precision.dtype == "fp32" else torch.bfloat16


def row_length(training: TrainOptions, shape: Shape) -> int:
    """Tokens of the longest row that training can meet."""
    max_length = training.sequences.max_length
    return training.batches.packing or min(
        max_length, getattr(shape.config, "max_position_embeddings", max_length)
    )


def _stored_itemsize(config: Any) -> int:
    """Bytes of a number in the model's files."""
    dtype = getattr(config, "dtype", None)
    return dtype.itemsize if isinstance(dtype, torch.dtype) else 4
