"""`being-vl plan`: what a training will take of each GPU, of the disk and of time, before a GPU is touched.

The model is built as training builds it, of tensors without memory, so parameters and activations are those of the
real one. What DeepSpeed keeps of them follows from its ZeRO stage.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from being_vl.errors import ConfigError, ModelError
from being_vl.recipes import FOLDER
from being_vl.train.kernels import set_activation_checkpointing
from being_vl.train.metrics import Cost
from being_vl.train.options import PlanOptions, StageOptions, TrainOptions
from being_vl.train.split import TwoPartLM
from being_vl.train.stages import add_adapters, freeze

SHAPES = FOLDER / "shapes"
RESERVED = 0.1
"""Share of a GPU that a plan leaves free: CUDA's context, kernels' workspaces, fragments, short-lived tensors."""
BUCKET = 500_000_000
"""Parameters of the buffer in which DeepSpeed collects gradients to send, its `reduce_bucket_size`."""
GATHERED = 1_000_000_000
"""Parameters that ZeRO-3 holds whole at most, its `stage3_max_live_parameters`."""
KEPT_WHOLE = 100_000
"""Parameters smaller than this ZeRO-3 does not partition, its `stage3_param_persistence_threshold`."""


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


class Memory(NamedTuple):
    """Bytes that one rank holds at the same time, at the busiest moment of a step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    buffers: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


@dataclass(frozen=True)
class Shape:
    """A model without its weights.

    Args:
        config: Of transformers, with as many rows as the expanded model has.
        text_size: Rows that are text; the others are new.
    """

    config: Any
    text_size: int


@dataclass(frozen=True)
class Activations:
    """Bytes that the forward pass of one row leaves for the backward pass.

    Args:
        kept: All of them, with every layer's own.
        between: Those that are left if each layer is computed again, its input and what lies outside the layers.
        layers: Number of layers.
        chunk: What the logits of one chunk take while they exist: they, their probabilities and their gradients.
    """

    kept: int
    between: int
    layers: int
    chunk: int

    def of(self, rows: int, checkpointing: bool) -> int:
        """For several rows, with or without gradient checkpointing."""
        if not checkpointing:
            return rows * self.kept
        return rows * (self.between + (self.kept - self.between) // self.layers)


def find_shape(name: str | Path, new_rows: int | None) -> Shape:
    """The model of a folder, a config.json, a shipped shape, or a hub name.

    Args:
        name: Where it is; of a hub name, the shipped shape of its last part is taken if there is one.
        new_rows: Rows that expanding adds; None if the model is expanded, or is not to be.

    Raises:
        ModelError: if there is none.
    """
    from transformers import AutoConfig

    from being_vl.layout import LAYOUT_FILE, VocabularyLayout

    path = Path(name)
    shipped = SHAPES / f"{path.name}.json"
    try:
        if path.is_file() or (path / "config.json").is_file():
            config = AutoConfig.from_pretrained(path)
        elif shipped.is_file():
            config = AutoConfig.from_pretrained(shipped)
        else:
            config = AutoConfig.from_pretrained(str(name))
    except (OSError, ValueError) as error:
        known = ", ".join(sorted(file.stem for file in SHAPES.glob("*.json")))
        raise ModelError(
            f"{name}: no model's config.json there ({str(error).splitlines()[0]}); "
            f"give shape: a folder, a config.json, or one of {known}"
        ) from None
    text = config.get_text_config()
    if (path / LAYOUT_FILE).is_file():
        return Shape(text, VocabularyLayout.load(path).text_size)
    text_size = text.vocab_size
    text.vocab_size += new_rows or 0
    return Shape(text, text_size)


@contextmanager
def without_memory() -> Iterator[None]:
    """Tensors that are made in here have shapes and dtypes and hold nothing."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        yield


def build(shape: Shape, options: TrainOptions, dtype: torch.dtype) -> TwoPartLM:
    """The model as training has it; call within `without_memory`."""
    from transformers import AttentionInterface, AutoModelForCausalLM
    from transformers.initialization import no_init_weights
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    with no_init_weights():
        lm = AutoModelForCausalLM.from_config(shape.config, dtype=dtype)
    lm.tie_weights()
    if lm.config._attn_implementation == "sdpa":
        # The same, but without looking at ids to find out that no mask is needed: here there are none.
        AttentionInterface.register("unmasked", sdpa_attention_forward)
        lm.set_attn_implementation("unmasked")
    model = TwoPartLM(lm, shape.text_size, options.loss_chunk)
    model.train()
    return model


def saved_bytes(model: TwoPartLM, function: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """Bytes that a computation keeps for its backward pass beyond the model's own tensors, and its result."""
    own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    found: dict[int, int] = {}
    alive = []  # so that no storage gets the address of an earlier one

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    return sum(found.values()), result


def measure_activations(model: TwoPartLM, length: int, labelled: int) -> Activations:
    """Run one row through the model, as training does.

    Args:
        model: With `requires_grad` as the stage has it, in training mode.
        length: Tokens of the row.
        labelled: Those that carry a loss.
    """
    ids = torch.zeros(1, length, dtype=torch.int64)
    targets = torch.zeros(labelled, dtype=torch.int64)
    decoder = model.lm.get_decoder()

    def body() -> Tensor:
        hidden: Tensor = decoder(input_ids=ids, use_cache=False).last_hidden_state
        return hidden

    kept, hidden = saved_bytes(model, body)
    set_activation_checkpointing(model.lm, True)
    between, _ = saved_bytes(model, body)
    set_activation_checkpointing(model.lm, False)
    some = hidden[0, :labelled]
    head, _ = saved_bytes(model, lambda: model.head(some, targets))
    rows = min(labelled, model.head.chunk)
    chunk = 0
    if labelled > model.head.chunk:
        chunk, _ = saved_bytes(model, lambda: model.head(some[:rows], targets[:rows]))
    size = sum(len(part) for part in (model.head.text_rows, model.head.new_rows) if part is not None)
    # Gradients: of the float32 logits, and of those before.
    chunk += rows * size * (4 + hidden.element_size())
    return Activations(kept + head, between + head, len(model.layers()), chunk)


class States(NamedTuple):
    """What DeepSpeed keeps of a stage's parameters, in numbers of parameters.

    Args:
        total: All.
        trained: Those that train.
        small: Those that ZeRO-3 keeps whole.
        largest: Those of the largest layer, or of embedding or output head.
    """

    total: int
    trained: int
    small: int
    largest: int

    @classmethod
    def of(cls, model: TwoPartLM) -> "States":
        """Count a model's."""
        parameters = list(model.parameters())
        parts = [*model.layers(), model.embedding, model.head]
        return cls(
            sum(p.numel() for p in parameters),
            sum(p.numel() for p in parameters if p.requires_grad),
            sum(p.numel() for p in parameters if p.numel() < KEPT_WHOLE),
            max(sum(p.numel() for p in part.parameters()) for part in parts),
        )


def memory(
    states: States, activations: Activations, options: TrainOptions, ranks: int, dtype: torch.dtype
) -> tuple[Memory, int]:
    """Bytes on each GPU, and in the host's memory for each."""
    size, zero = dtype.itemsize, options.zero
    parts = ranks if zero else 1
    trained = math.ceil(states.trained / parts)
    # AdamW's two moments, and float32 weights to step on: ZeRO's own, unless the weights are float32 and whole.
    optimizer = trained * (8 if zero == 0 and size == 4 else 12)
    weights = size * states.total
    gradients = size * trained
    buffers = 0
    if zero:
        buffers = size * BUCKET
    if zero == 3:
        weights = math.ceil(weights / ranks) + size * states.small * (ranks > 1)
        buffers += size * (min(states.total, max(GATHERED, states.largest)) if ranks > 1 else 0)
    # Copies for saving: of a checkpoint's part, and on rank 0 of what trained.
    host = optimizer + 2 * size * states.trained
    if options.offload == "optimizer":
        host, optimizer = host + optimizer + 4 * trained, 0
    at_work = activations.of(options.batches.micro_batch_size, options.gradient_checkpointing)
    return Memory(weights, gradients, optimizer, at_work, activations.chunk, buffers), host


def read_gpus(options: PlanOptions) -> Gpus:
    """What `gpus` says.

    Raises:
        ConfigError: if it is not of the form `8x80GB`.
    """
    found = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)x(\d+(?:\.\d+)?)GB", options.gpus)
    if not found or not float(found[3]):
        raise ConfigError(f"gpus is {options.gpus!r}; expected such as 8x80GB, or 4x8x80GB for four nodes")
    return Gpus(int(found[1] or 1) * int(found[2]), float(found[3]) * 1e9, options.tflops * 1e12)


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
        result: Bytes of the stage's plain checkpoint.
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


class Reading(NamedTuple):
    """What a stage reads: optimizer steps, records of all steps, and their tokens."""

    steps: int | None
    records: float
    tokens: float


def estimate(
    options: PlanOptions, training: TrainOptions, shape: Shape, readings: list[Reading], gpus: Gpus
) -> list[Estimate]:
    """Estimate every stage.

    Args:
        options: Of the plan.
        training: To be planned.
        shape: Of its model.
        readings: What each stage reads.
        gpus: What it runs on.
    """
    dtype = torch.float32 if training.precision.dtype == "fp32" else torch.bfloat16
    length = row_length(training, shape)
    found = []
    with without_memory():
        plain = build(shape, training, dtype)
        for stage, reading in zip(training.stages, readings, strict=True):
            model = plain
            if stage.lora:
                model = build(shape, training, dtype)
                add_adapters(model, stage)
            freeze(model, stage)
            states, cost = States.of(model), Cost.of(model)
            activations = measure_activations(model, length, max(1, round(options.label_share * length)))
            here, host = memory(states, activations, training, gpus.number, dtype)
            whole = 0 if training.zero or dtype.itemsize < 4 else 4
            mean = max(1, round(reading.tokens / reading.records))
            flops = (
                cost.flops([mean], round(options.label_share * mean)) * reading.records if cost else math.nan
            )
            found.append(
                Estimate(
                    stage.name,
                    states,
                    activations,
                    here,
                    host,
                    states.trained * (dtype.itemsize + 12 - whole),
                    states.total * _stored(shape.config),
                    reading.steps,
                    reading.tokens,
                    flops,
                )
            )
    return found


def row_length(training: TrainOptions, shape: Shape) -> int:
    """Tokens of the longest row that training can meet."""
    longest = training.sequences.max_length
    return training.batches.packing or min(longest, getattr(shape.config, "max_position_embeddings", longest))


def _stored(config: Any) -> int:
    """Bytes of a number in the model's checkpoint."""
    dtype = getattr(config, "dtype", None)
    return dtype.itemsize if isinstance(dtype, torch.dtype) else 4


def advice(found: Estimate, training: TrainOptions, gpus: Gpus) -> str | None:
    """Which option makes a stage fit that does not; None if it fits."""
    dtype = torch.float32 if training.precision.dtype == "fp32" else torch.bfloat16

    def total(changes: Mapping[str, Any], count: int = gpus.number) -> float:
        changed = _replace(training, changes)
        return memory(found.states, found.activations, changed, count, dtype)[0].total

    room = (1 - RESERVED) * gpus.memory
    if total({}) <= room:
        return None
    options: list[dict[str, Any]] = []
    if not training.gradient_checkpointing:
        options.append({"gradient_checkpointing": True})
    options += [{"zero": zero} for zero in (2, 3) if zero > training.zero and gpus.number > 1]
    if training.batches.micro_batch_size > 1:
        sizes = [
            training.batches.micro_batch_size >> n
            for n in range(1, training.batches.micro_batch_size.bit_length())
        ]
        fitting = next((size for size in sizes if total({"batches.micro_batch_size": size}) <= room), 1)
        options.append({"batches.micro_batch_size": fitting})
    if training.offload == "none" and training.zero:
        options.append({"offload": "optimizer"})
    said = f"{found.name}: {found.memory.total / 1e9:.1f} GB do not fit in {room / 1e9:.1f} GB"
    helpful = [change for change in options if total(change) <= room]
    if helpful:
        return f"{said}. Any of these makes it fit: " + "; ".join(
            f"{_shown(change)} ({total(change) / 1e9:.1f} GB)" for change in helpful
        )
    together: dict[str, Any] = {}
    for change in options:
        together |= change
        if total(together) <= room:
            return f"{said}. Together these make it fit: {_shown(together)} ({total(together) / 1e9:.1f} GB)"
    together |= {"zero": 3}
    count = next((n for n in (gpus.number << k for k in range(1, 11)) if total(together, n) <= room), None)
    if count:
        return (
            f"{said}. It takes {count} GPUs, with {_shown(together)} ({total(together, count) / 1e9:.1f} GB)"
        )
    return f"{said}, nor in any number of such GPUs: lower sequences.max_length, or take a smaller model"


def _replace(training: TrainOptions, changes: Mapping[str, Any]) -> TrainOptions:
    """A training with other values of some options, those of nested ones under `outer.inner`."""
    for name, value in changes.items():
        outer, _, inner = name.partition(".")
        if inner:
            value = dataclasses.replace(getattr(training, outer), **{inner: value})
        training = dataclasses.replace(training, **{outer: value})
    return training


def _shown(change: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {str(value).lower()}" for name, value in change.items())


def describe(
    title: str, options: PlanOptions, training: TrainOptions, found: list[Estimate], gpus: Gpus
) -> str:
    """The plan as a table with a column for each stage, and what does not fit."""
    of_all = all(stage.steps is not None for stage in found)
    seconds = [stage.flops / (options.mfu * gpus.flops * gpus.number) for stage in found]
    rows: list[tuple[str, list[str]]] = [
        ("", [stage.name for stage in found]),
        ("parameters", [f"{stage.states.total:,}" for stage in found]),
        ("trained", [f"{stage.states.trained:,}" for stage in found]),
        ("GB per GPU", []),
        *(
            (f"  {part}", [f"{getattr(stage.memory, part) / 1e9:.2f}" for stage in found])
            for part in Memory._fields
        ),
        ("  together", [f"{stage.memory.total / 1e9:.2f}" for stage in found]),
        ("GB of host per GPU", [f"{stage.host / 1e9:.2f}" for stage in found]),
        ("GB on disk", []),
        ("  to resume", [f"{(training.checkpoint.keep + 1) * stage.resume / 1e9:.2f}" for stage in found]),
        ("  result", [f"{stage.result / 1e9:.2f}" for stage in found]),
        *([("steps", [f"{stage.steps:,}" for stage in found])] if of_all else []),
        ("tokens" if of_all else "tokens per step", [f"{stage.tokens:,.0f}" for stage in found]),
        ("PFLOP" if of_all else "PFLOP per step", [f"{stage.flops / 1e15:,.1f}" for stage in found]),
        (
            f"{'hours' if of_all else 'seconds per step'} at MFU {options.mfu:.0%}",
            [f"{value / (3600 if of_all else 1):,.2f}" for value in seconds],
        ),
    ]
    lines = [title, *(f"{name:<28}" + "".join(f"{cell:>16}" for cell in cells) for name, cells in rows)]
    if of_all:
        lines.append(
            f"{sum(seconds) / 3600:,.1f} hours and {sum(s.flops for s in found) / 1e15:,.0f} PFLOP in all"
        )
    else:
        lines.append("the number of records is not known: give records, such as '{\"foundation\": 558000}'")
    lines += filter(None, (advice(stage, training, gpus) for stage in found))
    return "\n".join(line.rstrip() for line in lines)


def per_step(training: TrainOptions, stage: StageOptions, mean_length: int, ranks: int) -> Reading:
    """One step of a stage, where the number of records is not known."""
    rows = stage.batch_size or training.batches.micro_batch_size * stage.accumulation * ranks
    records = rows * max(1, (training.batches.packing or 0) // mean_length)
    return Reading(None, records, records * mean_length)


def plan_recipe(options: PlanOptions, training: TrainOptions, model: str, new_rows: int | None) -> str:
    """Plan a training.

    Args:
        options: Of the plan.
        training: What the recipe says.
        model: Its model, or the LLM that is to be expanded.
        new_rows: Rows that expanding it adds.

    Returns:
        The plan as text.

    Raises:
        ConfigError: if the options are wrong.
        ModelError: if nothing says what the model is like.
        RecordError, ModelError, QuantizerError: if the records are at hand and wrong.
    """
    gpus = read_gpus(options)
    shape = find_shape(options.shape or model, options.new_rows if options.new_rows is not None else new_rows)
    readings = read_ahead(options, training, gpus.number)
    rows = shape.config.vocab_size - shape.text_size
    title = (
        f"{options.shape or model}, {shape.text_size:,} text rows and {rows:,} new ones, on {gpus.number} GPUs of "
        f"{gpus.memory / 1e9:g} GB: ZeRO-{training.zero}, {'fp32' if training.precision.dtype == 'fp32' else 'bf16'}, "
        f"{training.batches.micro_batch_size} rows of {row_length(training, shape):,} tokens"
    )
    return describe(title, options, training, estimate(options, training, shape, readings, gpus), gpus)


def read_ahead(options: PlanOptions, training: TrainOptions, ranks: int) -> list[Reading]:
    """What each stage will read: of the records themselves if they are at hand, else as the options describe them."""
    from being_vl.data.sequences import Group
    from being_vl.train.engine import load_sequences
    from being_vl.train.schedule import make_schedules

    if not options.records and all(path.exists() for path in training.records) and training.model.is_dir():
        lengths = load_sequences(training).lengths
    elif options.records:
        lengths = {
            Group(category, "planned", False): np.full(count, options.mean_length, np.int32)
            for category, count in options.records.items()
        }
    else:
        return [per_step(training, stage, options.mean_length, ranks) for stage in training.stages]
    return [
        Reading(stage.steps, stage.records, stage.tokens)
        for stage in make_schedules(training, lengths, ranks)
    ]
