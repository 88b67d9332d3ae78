"""Text rows and new rows as parameters of their own, so that one can train while the other stays as it is.

A gradient mask on one big matrix would not do: weight decay moves the masked rows, and optimizer state is kept for
all of them. Two matrices looked up side by side leave the frozen one bit-identical under every ZeRO stage.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from being_vl.errors import ModelError


class SplitEmbedding(nn.Module):
    """An embedding whose rows from `text_size` on are a parameter of their own.

    Args:
        weight: (V, D) rows of the embedding.
        text_size: Number of rows in `text`; the others become `new` (None if there are none).
    """

    def __init__(self, weight: Tensor, text_size: int) -> None:
        super().__init__()
        self.text_size = text_size
        self.text = nn.Parameter(weight[:text_size].detach().clone())
        new = weight[text_size:].detach().clone()
        self.new = nn.Parameter(new) if len(new) else None

    def forward(self, ids: Tensor) -> Tensor:
        """Look up ids (…) as rows (…, D)."""
        if self.new is None:
            return F.embedding(ids, self.text)
        is_new = ids >= self.text_size
        text = F.embedding(ids.masked_fill(is_new, 0), self.text)
        new = F.embedding((ids - self.text_size).clamp(min=0), self.new)
        return torch.where(is_new.unsqueeze(-1), new, text)


class SplitHead(nn.Module):
    """The output projection over the same two groups of rows.

    `selected`, a boolean mask (B, T - 1) over the positions before the last, restricts the logits to the positions
    that carry a loss, (n, V) instead of (B, T, V): with labels on the answers only, most logits are never needed.
    """

    def __init__(self, text: nn.Parameter, new: nn.Parameter | None) -> None:
        super().__init__()
        self.text, self.new = text, new
        self.selected: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """Project hidden states (B, T, D) to logits."""
        if self.selected is not None:
            hidden = hidden[:, :-1][self.selected]
        logits = F.linear(hidden, self.text)
        return logits if self.new is None else torch.cat([logits, F.linear(hidden, self.new)], dim=-1)


class TrainedLM(nn.Module):
    """A Hugging Face causal LM with split rows, returning the weighted cross-entropy of the labelled positions, summed.

    Args:
        lm: The model; changed in place.
        text_size: Rows of its embedding that are text; the others are new.

    Raises:
        ModelError: if its embedding or output head is of a kind that cannot be split.
    """

    lm: Any
    embedding: SplitEmbedding
    head: SplitHead
    tied: bool

    def __init__(self, lm: Any, text_size: int) -> None:
        super().__init__()
        embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
        if type(embedding) is not nn.Embedding or type(head) is not nn.Linear or head.bias is not None:
            raise ModelError(
                f"{lm.name_or_path}: can train a plain embedding and an output head without bias, "
                f"found {type(embedding).__name__} and {head}"
            )
        tied = head.weight is embedding.weight
        split = SplitEmbedding(embedding.weight, text_size)
        source = split if tied else SplitEmbedding(head.weight, text_size)
        self.embedding = split
        self.head = SplitHead(source.text, source.new)
        lm.set_input_embeddings(split)
        lm.set_output_embeddings(self.head)
        self.lm = lm
        self.tied = tied

    def forward(self, input_ids: Tensor, position_ids: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of the cross-entropy over labels other than -100.

        Args:
            input_ids: (B, T) int64.
            position_ids: (B, T) int64, from 0 on in each record.
            labels: (B, T) int64, -100 where there is no loss.
            weights: (B, T) float, the weight of each label's loss.
        """
        targets = labels[:, 1:]
        selected = self.head.selected = targets != -100
        logits = self.lm(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
        losses = F.cross_entropy(logits.float(), targets[selected], reduction="none")
        return (losses * weights[:, 1:][selected]).sum()

    def layers(self) -> nn.ModuleList:
        """The decoder layers, first to last."""
        count = self.lm.config.num_hidden_layers
        for module in self.lm.modules():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return module
        raise ModelError(f"{self.lm.name_or_path}: found no list of {count} decoder layers")

    def visual_parameters(self) -> list[nn.Parameter]:
        """The new rows: of the embedding, and of the output head where it is not tied."""
        rows = [self.embedding.new] if self.tied else [self.embedding.new, self.head.new]
        return [row for row in rows if row is not None]

    def merge_into(self, plain: Any, trained: dict[str, Tensor]) -> None:
        """Copy trained parameters, named as in `self.lm`, into the same model with unsplit matrices.

        Everything that is not in `trained` stays exactly as `plain` has it.
        """
        matrices = {
            id(self.embedding): plain.get_input_embeddings().weight,
            id(self.head): plain.get_output_embeddings().weight,
        }
        split = {name: matrices[id(m)] for name, m in self.lm.named_modules() if id(m) in matrices}
        parameters = dict(plain.named_parameters())
        for name, value in trained.items():
            module, _, last = name.rpartition(".")
            if module in split:
                text_size = self.embedding.text_size
                rows = slice(0, text_size) if last == "text" else slice(text_size, None)
                split[module].data[rows] = value.to(split[module].dtype)
            else:
                parameters[name].data.copy_(value)
