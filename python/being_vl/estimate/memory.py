"""Bytes of a training: activations, by running the model without memory; weights and states, as DeepSpeed has them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from being_vl.training.kernels import set_activation_checkpointing
from being_vl.training.options import TrainOptions
from being_vl.training.split import TwoPartLM

REDUCE_BUCKET_SIZE = 500_000_000
"""Parameters of the buffer in which DeepSpeed collects gradients to send, its `reduce_bucket_size`."""
MAX_LIVE_PARAMETERS = 1_000_000_000
"""Parameters that ZeRO-3 holds unpartitioned at most, its `stage3_max_live_parameters`."""
PERSISTENCE_THRESHOLD = 100_000
"""Parameters smaller than this ZeRO-3 does not partition, its `stage3_param_persistence_threshold`."""


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
        """The sum of all."""
        return sum(self)


@dataclass(frozen=True)
class Activations:
    """Bytes that the forward pass of one row leaves for the backward pass.

    Args:
        row: All of them.
        row_outside_layers: Those that remain if each layer is computed again: its input, and what lies outside the
            layers.
        layers: Number of layers.
        chunk: What the logits of one chunk take while they exist: they, their probabilities and their gradients.
    """

    row: int
    row_outside_layers: int
    layers: int
    chunk: int

    def bytes_of_rows(self, rows: int, checkpointing: bool) -> int:
        """Bytes of several rows, with or without gradient checkpointing."""
        if not checkpointing:
            return rows * self.row
        return rows * (self.row_outside_layers + (self.row - self.row_outside_layers) // self.layers)


class States(NamedTuple):
    """What DeepSpeed keeps of a stage's parameters, in numbers of parameters.

    Args:
        total: All.
        trained_size: Those that train.
        small_size: Those that ZeRO-3 does not partition.
        largest_size: Those of the largest layer, or of embedding or output head.
    """

    total: int
    trained_size: int
    small_size: int
    largest_size: int

    @classmethod
    def from_model(cls, model: TwoPartLM) -> "States":
        """Count a model's parameters."""
        parameters = list(model.parameters())
        parts = [*model.layers(), model.embedding, model.head]
        return cls(
            sum(p.numel() for p in parameters),
            sum(p.numel() for p in parameters if p.requires_grad),
            sum(p.numel() for p in parameters if p.numel() < PERSISTENCE_THRESHOLD),
            max(sum(p.numel() for p in part.parameters()) for part in parts),
        )


def saved_bytes(model: TwoPartLM, function: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """Bytes that a computation saves for its backward pass beyond the model's own tensors, and its result."""
    model_storages = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    sizes: dict[int, int] = {}
    tensors = []  # held, so that no storage gets the address of an earlier one

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in model_storages:
            sizes[storage._cdata] = storage.nbytes()
        tensors.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    return sum(sizes.values()), result


def measure_activations(model: TwoPartLM, length: int, label_tokens: int) -> Activations:
    """Run one row through the model, as training does.

    Args:
        model: With `requires_grad` as the stage has it, in training mode.
        length: Tokens of the row.
        label_tokens: Those that carry a loss.
    """
    ids = torch.zeros(1, length, dtype=torch.int64)
    targets = torch.zeros(label_tokens, dtype=torch.int64)
    decoder = model.lm.get_decoder()

    def decode() -> Tensor:
        hidden: Tensor = decoder(input_ids=ids, use_cache=False).last_hidden_state
        return hidden

    # The decoder, with and without gradient checkpointing.
    row, hidden = saved_bytes(model, decode)
    set_activation_checkpointing(model.lm, True)
    row_outside_layers, _ = saved_bytes(model, decode)
    set_activation_checkpointing(model.lm, False)
    # The output head over all label tokens, and over one chunk of them.
    label_hidden = hidden[0, :label_tokens]
    head, _ = saved_bytes(model, lambda: model.head(label_hidden, targets))
    chunk_size = min(label_tokens, model.head.chunk)
    chunk = 0
    if label_tokens > model.head.chunk:
        chunk, _ = saved_bytes(model, lambda: model.head(label_hidden[:chunk_size], targets[:chunk_size]))
    # Gradients of a chunk: of the float32 logits, and of those before.
    rows = sum(len(part) for part in (model.head.text_rows, model.head.new_rows) if part is not None)
    chunk += chunk_size * rows * (4 + hidden.element_size())
    return Activations(row + head, row_outside_layers + head, len(model.layers()), chunk)


def estimate_memory(
    states: States, activations: Activations, options: TrainOptions, ranks: int, dtype: torch.dtype
) -> tuple[Memory, int]:
    """Bytes on each GPU, and in the host's memory for each.

    Args:
        states: The stage's parameters.
        activations: Of one row.
        options: The training.
        ranks: Number of GPUs.
        dtype: What weights and activations are computed in.
    """
    size, zero = dtype.itemsize, options.zero
    trained_size = math.ceil(states.trained_size / (ranks if zero else 1))
    # AdamW's two moments, and float32 weights to step on: ZeRO's own, unless the weights are float32 and whole.
    optimizer = trained_size * (8 if zero == 0 and size == 4 else 12)
    weights = size * states.total
    gradients = size * trained_size
    buffers = size * REDUCE_BUCKET_SIZE if zero else 0
    if zero == 3:
        weights = math.ceil(weights / ranks) + size * states.small_size * (ranks > 1)
        live_size = min(states.total, max(MAX_LIVE_PARAMETERS, states.largest_size))
        buffers += size * live_size if ranks > 1 else 0
    # Copies for saving: of a checkpoint's part, and on rank 0 of what trained.
    host = optimizer + 2 * size * states.trained_size
    if options.offload == "optimizer":
        host, optimizer = host + optimizer + 4 * trained_size, 0
    rows = activations.bytes_of_rows(options.batches.micro_batch_size, options.gradient_checkpointing)
    return Memory(weights, gradients, optimizer, rows, activations.chunk, buffers), host
