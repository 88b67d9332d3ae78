"""What the new rows of an embedding or output head hold before training."""

import math
from typing import Any

import torch
from torch import Tensor

from being_vl.errors import QuantizerError
from being_vl.model.options import Initialisation
from being_vl.tokenizer.visual_bpe import VisualBPE

ROW_JITTER = 0.1
"""Spread of the noise on each row of init `codebook`, as a share of the text rows' spread.

Codes may nearly agree, and merges may have the same parts; without noise such rows would stay the same for long.
"""

_CHUNK_ROWS = 8192


def make_rows(
    init: Initialisation,
    text_rows: Tensor,
    bpe: VisualBPE,
    codebook: Tensor | None,
    generator: torch.Generator,
) -> Tensor:
    """Rows for BOI, EOI, the codebook's ids and the merges.

    - `he`: normal with standard deviation sqrt(2 / hidden), He's for fan-in, as the paper (section 3.4); a row has a
      length of about sqrt(2).
    - `text`: normal with the mean and the covariance of the text rows.
    - `codebook`: the codebook's vectors, less their mean, go through a random linear map into the directions of the
      text rows, scaled to the text rows' spread around their mean. So ids that look alike have rows that are alike. A
      merge has the mean of its two parts' rows. Each row has a little noise of its own (`ROW_JITTER`). BOI and EOI are
      as with `text`.

    Args:
        init: Which of them.
        text_rows: Rows of the matrix that have a text token, (T, hidden), of any float dtype.
        bpe: The visual BPE.
        codebook: Its quantizer's vectors, (codebook size, D); for `codebook` alone.
        generator: Draws the random numbers, on the CPU.

    Returns:
        float32, (2 + bpe.vocab_size, hidden).
    """
    count, hidden = 2 + bpe.vocab_size, text_rows.shape[1]
    if init == "he":
        return torch.randn((count, hidden), generator=generator) * math.sqrt(2 / hidden)
    mean, factor = _fit_normal(text_rows)

    def draw(number: int) -> Tensor:
        return torch.randn((number, hidden), generator=generator) @ factor.T

    if init == "text":
        return draw(count) + mean

    # The codes, in the directions of the text rows and with their spread.
    assert codebook is not None
    codes = codebook.detach().float().cpu()
    codes = (codes - codes.mean(0)) @ draw(codes.shape[1])
    codes *= factor.norm() / codes.square().sum(1).mean().sqrt().clamp(min=1e-12)

    # Noise for every row, the codes on top of it, and each merge from its two parts.
    visual_rows = draw(bpe.vocab_size) * ROW_JITTER
    visual_rows[: len(codes)] += codes
    for index, (a, b, *_) in enumerate(bpe.merges, len(codes)):
        visual_rows[index] += (visual_rows[a] + visual_rows[b]) / 2
    return torch.cat([draw(2), visual_rows]) + mean


def find_codebook(quantizer: Any) -> Tensor:
    """The vectors of a quantizer, (codebook size, D).

    Raises:
        QuantizerError: if it does not show them.
    """
    if hasattr(quantizer, "codebook"):
        codebook = quantizer.codebook
    else:  # diffusers' `VQModel`
        network = getattr(quantizer, "model", None)
        codebook = getattr(getattr(getattr(network, "quantize", None), "embedding", None), "weight", None)
    if not isinstance(codebook, Tensor):
        raise QuantizerError(f"quantizer {quantizer.name!r} shows no codebook; choose init `he` or `text`")
    return codebook


def describe_rows(rows: Tensor) -> dict[str, float]:
    """Mean length of rows (n, hidden), and their spread: the root mean square distance from their mean.

    Rows that are nearly the same, such as `resize_token_embeddings` makes by default, have a spread of nearly 0.
    """
    norm, total, squares = 0.0, torch.zeros(rows.shape[1], dtype=torch.float64), 0.0
    for part in rows.split(_CHUNK_ROWS):
        part = part.double()
        norm += part.norm(dim=1).sum().item()
        total += part.sum(0)
        squares += part.square().sum().item()
    mean = total / len(rows)
    spread = math.sqrt(max(0.0, squares / len(rows) - mean.square().sum().item()))
    return {"norm": norm / len(rows), "spread": spread}


def _fit_normal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (hidden,) and a lower triangular factor (hidden, hidden) of the covariance of rows (n, hidden)."""
    mean = sum(part.double().sum(0) for part in rows.split(_CHUNK_ROWS)) / len(rows)
    assert isinstance(mean, Tensor)
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for part in rows.split(_CHUNK_ROWS):
        deviations = part.double() - mean
        covariance.addmm_(deviations.T, deviations)
    covariance /= len(rows)
    # A little on the diagonal, so that it has a factor even where there are fewer rows than dimensions.
    covariance.diagonal().add_(1e-6 * covariance.diagonal().mean() + 1e-20)
    return mean.float(), torch.linalg.cholesky(covariance).float()
