"""What the new rows of an embedding or output head hold before training."""

import math
from typing import Any

import torch
from torch import Tensor

from being_vl.errors import QuantizerError
from being_vl.model.options import Initialisation
from being_vl.tokenizer import VisualBPE

APART = 0.1
"""Spread of what each row of init `codebook` has of its own, in spreads of the text rows.

Codes may nearly agree and merges may have the same parts; rows that are the same would stay the same for long.
"""

_AT_A_TIME = 8192


def new_rows(
    init: Initialisation, text: Tensor, bpe: VisualBPE, codebook: Tensor | None, generator: torch.Generator
) -> Tensor:
    """Rows for BOI, EOI, the codebook's ids and the merges.

    - `he`: normal with standard deviation sqrt(2 / hidden), He's for fan-in, as the paper; a row is about sqrt(2) long.
    - `text`: normal with the mean and the covariance of the text rows.
    - `codebook`: the codebook's vectors, less their mean, through a random linear map into the directions of the text
      rows, scaled to the text rows' spread around their mean. So ids that look alike have rows that are alike. A merge
      has the mean of its two parts' rows. Each has a little of its own besides (`APART`). BOI and EOI are as with
      `text`.

    Args:
        init: Which of them.
        text: Rows of the matrix that have a text token, (T, hidden), of any float dtype.
        bpe: The visual BPE.
        codebook: Its quantizer's vectors, (codebook size, D); for `codebook` alone.
        generator: Where draws come from, on the CPU.

    Returns:
        float32, (2 + bpe.vocab_size, hidden).
    """
    count, hidden = 2 + bpe.vocab_size, text.shape[1]
    if init == "he":
        return torch.randn((count, hidden), generator=generator) * math.sqrt(2 / hidden)
    mean, factor = _statistics(text)

    def draw(number: int) -> Tensor:
        return torch.randn((number, hidden), generator=generator) @ factor.T

    if init == "text":
        return draw(count) + mean
    assert codebook is not None
    codes = codebook.detach().float().cpu()
    codes = (codes - codes.mean(0)) @ draw(codes.shape[1])
    codes *= factor.norm() / codes.square().sum(1).mean().sqrt().clamp(min=1e-12)
    visual = draw(bpe.vocab_size) * APART
    visual[: len(codes)] += codes
    for index, (a, b, *_) in enumerate(bpe.merges, len(codes)):
        visual[index] += (visual[a] + visual[b]) / 2
    return torch.cat([draw(2), visual]) + mean


def codebook_of(quantizer: Any) -> Tensor:
    """The vectors of a quantizer, (codebook size, D).

    Raises:
        QuantizerError: if it does not have them.
    """
    if hasattr(quantizer, "codebook"):
        codebook = quantizer.codebook
    else:  # diffusers' `VQModel`
        network = getattr(quantizer, "model", None)
        codebook = getattr(getattr(getattr(network, "quantize", None), "embedding", None), "weight", None)
    if not isinstance(codebook, Tensor):
        raise QuantizerError(f"quantizer {quantizer.name!r} shows no codebook; choose init `he` or `text`")
    return codebook


def describe(rows: Tensor) -> dict[str, float]:
    """Mean length of rows (n, hidden), and their spread: the root mean square distance from their mean.

    Rows that are nearly the same, such as `resize_token_embeddings` makes by default, have a spread of nearly 0.
    """
    norm, total, squares = 0.0, torch.zeros(rows.shape[1], dtype=torch.float64), 0.0
    for part in rows.split(_AT_A_TIME):
        part = part.double()
        norm += part.norm(dim=1).sum().item()
        total += part.sum(0)
        squares += part.square().sum().item()
    mean = total / len(rows)
    spread = math.sqrt(max(0.0, squares / len(rows) - mean.square().sum().item()))
    return {"norm": norm / len(rows), "spread": spread}


def _statistics(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (hidden,) and a lower triangular factor (hidden, hidden) of the covariance of rows (n, hidden)."""
    mean = sum(part.double().sum(0) for part in rows.split(_AT_A_TIME)) / len(rows)
    assert isinstance(mean, Tensor)
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for part in rows.split(_AT_A_TIME):
        centred = part.double() - mean
        covariance.addmm_(centred.T, centred)
    covariance /= len(rows)
    # So that it has a factor also where there are fewer rows than dimensions.
    covariance.diagonal().add_(1e-6 * covariance.diagonal().mean() + 1e-20)
    return mean.float(), torch.linalg.cholesky(covariance).float()
