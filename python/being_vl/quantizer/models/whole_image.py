"""Quantizers whose network sees the whole image."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from being_vl.quantizer.base import Precision
from being_vl.quantizer.models.network import NetworkQuantizer

DISTANCES_AT_A_TIME = 1 << 26


class WholeImageQuantizer(NetworkQuantizer):
    """A `Quantizer` that encodes whole images, one at a time.

    So the ids of an image don't depend on the others, and images may differ in size. It computes in float32 or, on
    demand, bfloat16 (autocast; distances stay float32). Where the two nearest codes are equally near to within
    rounding, another device may choose the other one.
    """

    precision: Precision = "float32"

    def _fingerprint_fields(self) -> dict[str, Any]:
        precision = {} if self.precision == "float32" else {"precision": self.precision}
        return super()._fingerprint_fields() | precision

    def with_precision(self, precision: Precision) -> Self:
        """The same network computing in another precision; see `load_quantizer`."""
        quantizer = self._copy()
        quantizer.precision = precision
        return quantizer

    def compile(self) -> None:
        """Compile the encoder, by torch.compile. The ids stay the same to within rounding."""
        self._latents = torch.compile(self._latents)  # type: ignore[method-assign]

    @torch.inference_mode()
    def encode_prepared(self, images: Sequence[NDArray[np.uint8] | Tensor]) -> list[NDArray[np.int64]]:
        """Grids of prepared images, uint8 (height, width, 3)."""
        grids = [self._encode(torch.as_tensor(image)) for image in images]
        return [grid.cpu().numpy() for grid in grids]  # a GPU is waited for only now

    def _encode(self, image: Tensor) -> Tensor:
        pixels = self.preprocessing.normalise(image.to(self.codebook.device))
        bfloat16 = torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")
        with torch.backends.cudnn.flags(allow_tf32=False), bfloat16:
            latents = self._latents(pixels[None]).float()
        _, height, width = latents.shape
        return nearest_codes(latents.flatten(1).T, self.codebook).reshape(height, width)

    @abstractmethod
    def _latents(self, pixels: Tensor) -> Tensor:
        """(1, 3, height, width) → (dimension, height / downsample, width / downsample)."""


def nearest_codes(latents: Tensor, codebook: Tensor) -> Tensor:
    """Ids (N,) of the codes (K, D) that are nearest to latents (N, D); the lowest id of equally near ones."""
    squares = codebook.square().sum(1)
    rows = max(1, DISTANCES_AT_A_TIME // len(codebook))
    # The latents' own squares are left out: they are the same for all codes, and would only cost digits.
    return torch.cat(
        [torch.addmm(squares, part, codebook.T, alpha=-2).argmin(1) for part in latents.split(rows)]
    )
