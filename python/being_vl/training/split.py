"""Text rows and new rows as parameters of their own, so that one can train while the other stays as it is.

A gradient mask on one big matrix would not do: weight decay moves the masked rows, and optimizer state is kept for
all of them. Two matrices looked up side by side leave the frozen one bit-identical under every ZeRO stage.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import MoeModelOutputWithPast

from being_vl.data.sequences import NO_LOSS
from being_vl.errors import ModelError

LORA = ".lora_"
"""Part of the names of the adapters' parameters."""


class TwoPartEmbedding(nn.Module):
    """An embedding whose rows from `text_size` on are a parameter of their own.

    Args:
        embedding: The embedding, (V, D), of any class that looks rows up one by one, scaled or not.
        text_size: Number of rows in `text_rows`; the others become `new_rows` (None if there are none).
    """

    def __init__(self, embedding: nn.Embedding, text_size: int) -> None:
        super().__init__()
        self.text_size = text_size
        self.text_rows, self.new_rows = _split(embedding.weight, text_size)
        # The family's module stays for what it does to rows; its matrix goes, so that the rows exist once.
        self.lookup = embedding
        self.lookup.weight = None  # type: ignore[assignment]
        self.lookup.padding_idx = None

    def forward(self, ids: Tensor) -> Tensor:
        """Look up ids (…) as rows (…, D)."""
        if self.new_rows is None:
            return self._look_up(ids, self.text_rows)
        # Both matrices are asked for every id, under some id that they have; then each position takes its own answer.
        is_new = ids >= self.text_size
        text = self._look_up(ids.masked_fill(is_new, 0), self.text_rows)
        visual_vectors = self._look_up((ids - self.text_size).clamp(min=0), self.new_rows)
        return torch.where(is_new.unsqueeze(-1), visual_vectors, text)

    def _look_up(self, ids: Tensor, rows: nn.Parameter) -> Tensor:
        """What the family's embedding gives with these rows as its matrix."""
        twin = copy.copy(self.lookup)
        twin._parameters = {"weight": rows}
        return twin.forward(ids)


def _split(weight: Tensor, text_size: int) -> tuple[nn.Parameter, nn.Parameter | None]:
    """The text rows and the new rows of a matrix, None if there are no new ones."""
    text_rows, new_rows = weight.detach()[:text_size], weight.detach()[text_size:]
    return nn.Parameter(text_rows), nn.Parameter(new_rows) if len(new_rows) else None


class TwoPartHead(nn.Module):
    """The output head over the same two groups of rows, and the cross-entropy, a chunk of positions at a time.

    With 144,000 rows the logits of a long sequence would take more memory than the model. Each chunk's logits are
    computed, used, thrown away, and computed again in the backward pass. All chunks are one call of this module, so
    ZeRO-3 gathers the rows once, and ranks may have different numbers of chunks.

    Args:
        text_rows: (T, D).
        new_rows: (N, D), or None.
        chunk: Positions whose logits exist at once.
        finish: Takes hidden states (n, D) and a projection, and returns logits (n, T + N) as the family's forward pass
            makes them, which may scale or cap what the projection gives.
    """

    def __init__(
        self,
        text_rows: nn.Parameter,
        new_rows: nn.Parameter | None,
        chunk: int,
        finish: Callable[[Tensor, nn.Module], Tensor],
    ) -> None:
        super().__init__()
        self.text_rows, self.new_rows, self.chunk, self._finish = text_rows, new_rows, chunk, finish

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """Cross-entropy (n,) in float32 of the targets (n,), given hidden states (n, D); without targets the logits."""
        if targets is None:
            return self._logits(hidden)
        if len(hidden) <= self.chunk:
            return self._losses(hidden, targets)
        chunks = zip(hidden.split(self.chunk), targets.split(self.chunk), strict=True)
        return torch.cat([checkpoint(self._losses, *chunk, use_reentrant=False) for chunk in chunks])

    def _losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self._logits(hidden).float(), targets, reduction="none")

    def _logits(self, hidden: Tensor) -> Tensor:
        return self._finish(hidden, _FunctionModule(self._project))

    def _project(self, hidden: Tensor) -> Tensor:
        logits = F.linear(hidden, self.text_rows)
        return (
            logits if self.new_rows is None else torch.cat([logits, F.linear(hidden, self.new_rows)], dim=-1)
        )


class TwoPartLM(nn.Module):
    """A Hugging Face causal LM with text rows and new rows apart, returning the cross-entropy of the label tokens.

    Args:
        lm: The model; changed in place.
        text_size: Rows of its embedding that are text; the others are new.
        chunk: Positions whose logits exist at once.

    Raises:
        ModelError: if its embedding or output head is of a kind that cannot be split.
    """

    lm: Any
    embedding: TwoPartEmbedding
    head: TwoPartHead
    is_tied: bool

    def __init__(self, lm: Any, text_size: int, chunk: int) -> None:
        super().__init__()
        embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
        if not isinstance(embedding, nn.Embedding) or type(head) is not nn.Linear or head.bias is not None:
            raise ModelError(
                f"{lm.name_or_path}: can train an embedding and an output head without bias, "
                f"found {type(embedding).__name__} and {head}"
            )
        self.is_tied = head.weight is embedding.weight
        self.embedding = TwoPartEmbedding(embedding, text_size)
        # A tied head has the embedding's two parameters, one that is not has two of its own.
        tied_rows = self.embedding.text_rows, self.embedding.new_rows
        rows = tied_rows if self.is_tied else _split(head.weight, text_size)
        self.head = TwoPartHead(*rows, chunk, _logits_function(lm))
        lm.set_input_embeddings(self.embedding)
        lm.set_output_embeddings(self.head)
        self.lm = lm

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **inputs: Tensor) -> Tensor:
        """Cross-entropy (n,) in float32 of the labels other than -100, in their order, row by row.

        Args:
            input_ids: (B, T) int64.
            labels: (B, T) int64, -100 where there is no loss; without them the logits (B · T, V) are returned.
            inputs: What else the decoder takes: `position_ids` (B, T) int64, from 0 on in each record.
        """
        hidden = self.lm.get_decoder()(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state
        if labels is None:
            return self.head(hidden.flatten(0, 1))  # type: ignore[no-any-return]
        # A position predicts the token after it; only those before a label token go through the output head.
        targets = labels[:, 1:]
        has_loss = targets != NO_LOSS
        return self.head(hidden[:, :-1][has_loss], targets[has_loss])  # type: ignore[no-any-return]

    def layers(self) -> nn.ModuleList:
        """The decoder layers, first to last."""
        count = self.lm.config.num_hidden_layers
        for module in self.lm.modules():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return module
        raise ModelError(f"{self.lm.name_or_path}: found no list of {count} decoder layers")

    def visual_parameters(self) -> list[nn.Parameter]:
        """The new rows: of the embedding, and of the output head where it is not tied."""
        rows = [self.embedding.new_rows] if self.is_tied else [self.embedding.new_rows, self.head.new_rows]
        return [row for row in rows if row is not None]

    def merge_into(self, target: Any, parameters: dict[str, Tensor]) -> None:
        """Copy trained parameters into the same model with whole matrices.

        Adapters are added to the weights that they adapt. Everything that is not among the parameters stays exactly as
        `target` has it.

        Args:
            target: The model, as transformers loads it.
            parameters: By their names in `self.lm`.
        """
        # Embedding and head, by their names here, and the matrices that hold their rows there.
        matrices = {
            id(self.embedding): target.get_input_embeddings().weight,
            id(self.head): target.get_output_embeddings().weight,
        }
        tables = {name: matrices[id(m)] for name, m in self.lm.named_modules() if id(m) in matrices}
        weights = dict(target.named_parameters())
        for name, value in parameters.items():
            module, _, row_name = name.rpartition(".")
            if module in tables:
                # Text rows or new rows: a part of a matrix.
                text_size = self.embedding.text_size
                rows = slice(0, text_size) if row_name == "text_rows" else slice(text_size, None)
                tables[module].data[rows] = value.to(tables[module].dtype)
            elif LORA not in name:
                # Any other weight, under the same name.
                weights[name].data = value.to(weights[name].dtype)
            elif f"{LORA}A." in name:
                # An adapter: the product of its two matrices is added, in float32.
                layer, factor_b = name.partition(LORA)[0], name.replace(f"{LORA}A.", f"{LORA}B.")
                scale = self.lm.get_submodule(layer).scaling["default"]
                weight = weights[f"{layer}.weight"].data
                weight.copy_(weight.float() + scale * (parameters[factor_b].float() @ value.float()))


class _FunctionModule(nn.Module):
    """A function where a module is expected."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def _logits_function(lm: Any) -> Callable[[Tensor, nn.Module], Tensor]:
    """What a causal LM does with its decoder's hidden states until they are logits, for `TwoPartHead`.

    Families scale or cap their logits in a forward method of their own. So that forward method is called, on a shallow
    copy of the model. In the copy two modules are exchanged: the decoder for one that returns the hidden states that it
    is given, the output head for the projection. All other modules are the model's.
    """
    # By name: to hold on to the head itself would keep its rows, which are about to be copied, in memory.
    names = {id(module): name for name, module in lm.named_children()}
    decoder, head = names.get(id(lm.get_decoder())), names.get(id(lm.get_output_embeddings()))
    if decoder is None or head is None:
        raise ModelError(f"{lm.name_or_path}: decoder and output head are not modules side by side")

    def return_embeddings(inputs_embeds: Tensor, **_: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)

    def finish(hidden: Tensor, projection: nn.Module) -> Tensor:
        twin = copy.copy(lm)
        twin._modules = lm._modules | {decoder: _FunctionModule(return_embeddings), head: projection}
        # Hidden states stand where embeddings would, and pass through the exchanged decoder as they are.
        logits: Tensor = twin.forward(inputs_embeds=hidden[None], use_cache=False).logits[0]
        return logits

    return finish
