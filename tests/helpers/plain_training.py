"""Staged training in plain torch, the oracle of the real one: slow, on one process, as short as can be."""

import math
from collections.abc import Iterator, Mapping
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from being_vl import VisualBPE
from being_vl.data.batches import collate
from being_vl.data.curriculum import Curriculum, Entry
from being_vl.data.options import CATEGORIES, LossOptions
from being_vl.data.packing import pack
from being_vl.data.records import Records
from being_vl.data.sequences import SequenceBuilder
from being_vl.layout import VocabularyLayout
from being_vl.shards.grids import GridStore
from helpers import tiny
from helpers.training import BATCH, MIXTURES


def oracle(
    chain: Path, model: str, stages: int, steps: int, packing: int | None = None, **loss: float
) -> list[dict[str, float]]:
    """Losses by plain torch: whole matrices, full logits, one batch at a time, rows held by putting them back.

    Records that training packs are rows of their own here. Of each step the mean of all losses, and those by category
    and kind of token.
    """
    lm = AutoModelForCausalLM.from_pretrained(chain / model)
    layout = VocabularyLayout.load(chain / model)
    sequences = build_sequences(chain, model, layout, loss)
    embeddings = (lm.get_input_embeddings(), lm.get_output_embeddings())
    matrices = list({id(module.weight): module.weight for module in embeddings}.values())
    losses_of_steps = []
    for stage in range(stages):
        optimizer = torch.optim.AdamW(stage_parameters(lm, matrices, stage), lr=3e-3, weight_decay=0.1)
        rows = draw_rows(sequences, stage, packing)
        for step in range(steps):
            entries = [entry for row in islice(rows, BATCH) for entry in row]
            means = mean_losses(lm, sequences, entries, layout.text_size)
            losses_of_steps.append({kind: mean.item() for kind, mean in means.items()})
            lm.zero_grad()
            means["loss"].backward()
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps)
            update(optimizer, matrices, num_frozen_rows=layout.text_size if stage < 2 else 0)
    return losses_of_steps


def build_sequences(
    chain: Path, model: str, layout: VocabularyLayout, loss: Mapping[str, float]
) -> tiny.SequenceList:
    """The chain's records as sequences for one of its models."""
    builder = SequenceBuilder(
        AutoTokenizer.from_pretrained(chain / model),
        layout=layout,
        bpe=VisualBPE.load(chain / model / "visual_vocabulary.json"),
        grids=GridStore.open(chain / "grids"),
        max_length=2048,
        loss=LossOptions(**loss),
    )
    return tiny.SequenceList(builder.build(list(Records([chain / "data" / "train.json"]))))


def stage_parameters(lm: Any, matrices: list[Tensor], stage: int) -> list[Tensor]:
    """What a stage trains: the matrices of embeddings, from the second on one layer too, in the third everything."""
    if stage == 2:
        return list(lm.parameters())
    return [*matrices, *(lm.model.layers[0].parameters() if stage == 1 else [])]


def draw_rows(sequences: tiny.SequenceList, stage: int, packing: int | None) -> Iterator[list[Entry]]:
    """Rows of a stage in the order in which it trains on them."""
    draw = Curriculum(sequences.lengths, MIXTURES[stage], seed=stage).draw
    if not packing:
        return ([draw()] for _ in count())
    records = sum(
        len(sequences.lengths[group]) for group in sequences.lengths if MIXTURES[stage].get(group.category)
    )
    return pack(draw, packing, records // 4)


def mean_losses(
    lm: Any, sequences: tiny.SequenceList, entries: list[Entry], text_size: int
) -> dict[str, Tensor]:
    """A batch's mean loss, and those by kind of token and by category; kinds without a label are absent."""
    batch = collate([[sequences.get(e.group, e.number, e.position)] for e in entries], 0, CATEGORIES)
    logits = lm(input_ids=batch["input_ids"]).logits
    labels, weights = batch["labels"][:, 1:].flatten(), batch["weights"][:, 1:].flatten()
    losses_of_tokens = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels, ignore_index=-100, reduction="none"
    )
    # For each kind, which tokens are of it.
    kinds = {"loss": torch.ones_like(labels) > 0, "text": labels < text_size}
    kinds["visual"] = ~kinds["text"]
    category_of_record = torch.tensor([CATEGORIES.index(e.group.category) for e in entries])
    category_of_token = category_of_record.repeat_interleave(len(labels) // len(entries))
    kinds |= {name: category_of_token == number for number, name in enumerate(CATEGORIES)}
    return {
        kind: (losses_of_tokens * weights)[is_of_kind].sum() / weights[is_of_kind].sum()
        for kind, is_of_kind in kinds.items()
        if weights[is_of_kind].any()
    }


def learning_rate(step: int, steps: int) -> float:
    """3e-3 in the warm-up, then along a cosine towards 0."""
    warmup = math.ceil(steps * 0.03)
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
    return 3e-3 * (1.0 if step < warmup else cosine)


def update(optimizer: torch.optim.Optimizer, matrices: list[Tensor], num_frozen_rows: int) -> None:
    """One step of the optimizer, after which the first rows of the matrices are what they were."""
    frozen_rows = [matrix.detach()[:num_frozen_rows].clone() for matrix in matrices]
    for matrix in matrices:
        matrix.grad[:num_frozen_rows] = 0
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    with torch.no_grad():
        for matrix, rows in zip(matrices, frozen_rows, strict=True):
            matrix[:num_frozen_rows] = rows
