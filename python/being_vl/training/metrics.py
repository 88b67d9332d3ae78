"""What is measured in a step: losses by category and by kind of token, floating-point operations, memory."""

import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from being_vl.data.sequences import NO_LOSS
from being_vl.training.split import TwoPartLM

PEAK_FLOPS = {
    "B300": 2250e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A40": 150e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 5090": 210e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Floating-point operations per second of GPUs by a part of their name, dense bf16, as their makers state it."""


class BatchTotals(NamedTuple):
    """What the micro-batches of one step on all ranks hold together.

    Args:
        label_weight: Sum of the weights of the label tokens' losses.
        tokens: Number of tokens, pads left out.
        positions: Number of tokens, pads included.
    """

    label_weight: float
    tokens: float
    positions: float

    @classmethod
    def sum_over_ranks(cls, micro_batches: Sequence[Mapping[str, Tensor]], device: Any) -> "BatchTotals":
        """Add up over this rank's micro-batches, as `being_vl.data.batches` makes them, and over the ranks."""
        sizes = [
            [float(batch["weights"].sum()), int(batch["tokens"]), batch["weights"].numel()]
            for batch in micro_batches
        ]
        sums = torch.tensor(sizes, dtype=torch.float64, device=device).sum(0)
        dist.all_reduce(sums)
        return cls(*sums.tolist())


def find_peak_flops(option: float | None) -> float | None:
    """Floating-point operations per second of a rank's device at best, None if unknown.

    Args:
        option: What the options say; None looks the GPU's name up.
    """
    if option or not torch.cuda.is_available():
        return option
    name = torch.cuda.get_device_name()
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


class LossSums:
    """The losses of one step as weighted sums, by category and by kind of token.

    Args:
        text_size: Ids from here on are visual.
        categories: Names of the categories.
        device: Where the losses are.
    """

    def __init__(self, text_size: int, categories: Sequence[str], device: torch.device) -> None:
        self._text_size = text_size
        self._categories = categories
        # Rows: categories × (text, visual). Columns: sum of the losses, sum of their weights, number of labels.
        self._sums = torch.zeros(2 * len(categories), 3, dtype=torch.float64, device=device)

    def add(self, losses: Tensor, labels: Tensor, weights: Tensor, categories: Tensor) -> Tensor:
        """Add a micro-batch of this rank, and return the weighted sum of its losses, to be differentiated.

        Args:
            losses: (n,), of the labels other than -100 but the first of each row, as `TwoPartLM` returns them.
            labels: (B, T) int64.
            weights: (B, T) float, of the labels' losses.
            categories: (B, T) int64, each token's place among the categories.
        """
        # Weight and kind of each label token, in the order of the losses.
        has_loss = labels[:, 1:] != NO_LOSS
        label_weights = weights[:, 1:][has_loss]
        is_visual = labels[:, 1:][has_loss] >= self._text_size
        # Add up without the graph; what is returned keeps it.
        products = losses * label_weights
        columns = [products.detach(), label_weights, torch.ones_like(label_weights)]
        rows = 2 * categories[:, 1:][has_loss] + is_visual
        self._sums.index_add_(0, rows, torch.stack(columns, dim=1).double())
        return products.sum()

    def means_over_ranks(self) -> dict[str, Any]:
        """Add up over all ranks; `loss`, `losses` by category and kind, and `label_tokens`, for the log."""
        dist.all_reduce(self._sums)
        # By category over both kinds, by kind over all categories, and all together.
        table = self._sums.cpu().view(len(self._categories), 2, 3)
        sums_by_name = dict(zip(self._categories, table.sum(1), strict=True))
        sums_by_name |= dict(zip(("text", "visual"), table.sum(0), strict=True))
        loss, weight, count = table.sum((0, 1)).tolist()
        losses = {name: (sums[0] / sums[1]).item() for name, sums in sums_by_name.items() if sums[1]}
        return {"loss": loss / weight, "losses": losses, "label_tokens": int(count)}


@dataclass(frozen=True)
class Cost:
    """Floating-point operations of training a model, by the usual count of 6 per weight and token (PaLM, appendix B).

    A weight costs 2 in the forward pass, 2 in the gradient of what comes into it, and 2 in its own gradient if it
    trains. The output head works on the positions of label tokens alone. Attention costs 12 × layers × width × length
    per token, without taking off what a causal mask saves. What gradient checkpointing computes again does not count.

    Args:
        body: Weights of matrices, without embedding and output head.
        body_gradients: Those of them that train.
        head: Weights of the output head.
        head_gradients: Those of them that train.
        attention: layers × heads × size of a head.
    """

    body: int
    body_gradients: int
    head: int
    head_gradients: int
    attention: int

    @classmethod
    def from_model(cls, model: TwoPartLM) -> "Cost | None":
        """The cost of a model, before DeepSpeed cuts its parameters up; unknown for a mixture of experts."""
        config = model.lm.config
        if any(
            getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")
        ):
            return None
        # Embedding and output head apart; a lookup costs nothing.
        head = [rows for rows in (model.head.text_rows, model.head.new_rows) if rows is not None]
        row_ids = {id(rows) for rows in (model.embedding.text_rows, model.embedding.new_rows, *head)}
        body = [p for p in model.parameters() if p.dim() == 2 and id(p) not in row_ids]
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            sum(p.numel() for p in body),
            sum(p.numel() for p in body if p.requires_grad),
            sum(p.numel() for p in head),
            sum(p.numel() for p in head if p.requires_grad),
            config.num_hidden_layers * config.num_attention_heads * width,
        )

    def flops(self, lengths: Sequence[int], label_tokens: int) -> float:
        """Operations of one step over sequences of these lengths, with this number of label tokens."""
        body = sum(lengths) * (4 * self.body + 2 * self.body_gradients)
        head = label_tokens * (4 * self.head + 2 * self.head_gradients)
        return float(body + head + 12 * self.attention * sum(length**2 for length in lengths))


def peak_memory() -> int:
    """Bytes that this rank has used at most: of the GPU, or resident ones of the process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
