"""What the quantizers of all families have in common."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from being_vl.errors import QuantizerError
from being_vl.files import write_manifest
from being_vl.fingerprints import compute_fingerprint
from being_vl.options import StrPath
from being_vl.quantizer.base import Precision
from being_vl.quantizer.preprocessing import Preprocessing

DECODER_PREFIXES = ("decoder.", "post_quant_conv.")
"""Tensors that decide no id, and so are not part of the fingerprint."""


class NetworkQuantizer(ABC):
    """The part of a `Quantizer` on a network that does not depend on how the network sees images.

    That is its size, fingerprint, decoding and saving.

    Args:
        model: The network, in any floating dtype.
        name: Its name.
        preprocessing: How images become its input.
        downsample: Side, in pixels, of the part of the image that one id stands for.
        device: Where it runs.

    Raises:
        QuantizerError: if the images' sides would not be multiples of `downsample`.
    """

    model: Any

    def __init__(
        self, model: nn.Module, name: str, preprocessing: Preprocessing, downsample: int, device: str = "cpu"
    ) -> None:
        self.model = model.float().to(device).eval().requires_grad_(False)
        self.name = name
        self.downsample = downsample
        self.preprocessing = preprocessing
        self._check_size(preprocessing.fit.size)

    def _check_size(self, size: int) -> None:
        if size < 1 or not self.preprocessing.suits(self.downsample):
            raise QuantizerError(
                f"quantizer {self.name!r}: size is {size}; expected a positive multiple of {self.downsample}"
            )

    def with_size(self, size: int | None, aspect: bool = False) -> Self:
        """The same network for images of another size; see `load_quantizer`."""
        quantizer = self._copy()
        quantizer.preprocessing = self.preprocessing.with_size(size, aspect, self.downsample)
        quantizer._check_size(quantizer.preprocessing.fit.size if size is None else size)
        return quantizer

    def _copy(self) -> Self:
        quantizer = copy(self)
        quantizer.__dict__.pop("fingerprint", None)
        return quantizer

    @property
    def codebook(self) -> Tensor:
        """(codes, dimension)."""
        codes: Tensor = self.model.quantize.embedding.weight
        return codes

    @property
    def codebook_size(self) -> int:
        """Ids are 0 to `codebook_size` - 1."""
        return len(self.codebook)

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of all that decides an id: encoder, codebook and preprocessing, but not the decoder."""
        hashes = {
            name: hashlib.sha256(tensor.cpu().contiguous().numpy().tobytes()).hexdigest()
            for name, tensor in self.model.state_dict().items()
            if not name.startswith(DECODER_PREFIXES)
        }
        return compute_fingerprint(self._fingerprint_fields() | hashes)

    def _preprocessing_fields(self) -> dict[str, Any]:
        """What the manifest says of the preprocessing."""
        return {"preprocessing": self.preprocessing.to_json()}

    def _fingerprint_fields(self) -> dict[str, Any]:
        """What decides ids beside the weights."""
        return self._preprocessing_fields()

    def encode(self, images: Sequence[Image.Image]) -> list[NDArray[np.int64]]:
        """Grids (height, width), int64, one per image, whatever the images' modes and sizes."""
        return self.encode_prepared([np.array(self.preprocessing.prepare(image)) for image in images])

    @torch.inference_mode()
    def decode(self, grids: Sequence[NDArray[np.integer]]) -> list[Image.Image]:
        """RGB images, `downsample` times as large as the grids (height, width), of any size.

        Raises:
            QuantizerError: if an id is outside the codebook, a grid is not two-dimensional, or the weights have no
                decoder.
        """
        images = []
        for ids in check_ids(grids, self.codebook_size, self.name):
            pixels = self._pixels(ids.to(self.codebook.device)[None])[0]
            array = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
            images.append(Image.fromarray(array))
        return images

    def save_pretrained(self, folder: StrPath) -> None:
        """Write the weights in their library's format, and `manifest.json`; the precision is not kept."""
        folder = Path(folder)
        self._save_model(folder)
        fields = {"name": self.name, "fingerprint": self.with_precision("float32").fingerprint}
        write_manifest(folder, "quantizer", fields | self._preprocessing_fields())

    @abstractmethod
    def with_precision(self, precision: Precision) -> Self:
        """The same network computing in another precision; see `load_quantizer`."""

    @abstractmethod
    def encode_prepared(self, images: Sequence[NDArray[np.uint8] | Tensor]) -> list[NDArray[np.int64]]:
        """Grids of prepared images, uint8 (height, width, 3)."""

    @abstractmethod
    def _pixels(self, ids: Tensor) -> Tensor:
        """(1, height, width) → (1, 3, height * downsample, width * downsample), about -1 to 1."""

    def _save_model(self, folder: Path) -> None:
        """Write config and weights, as the library of the model does."""
        self.model.save_pretrained(folder)


def load_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load all weights; 1×1 convolutions of attention become the matrices that diffusers and transformers have there.

    Raises:
        RuntimeError: if a tensor is missing, is of another shape, or has no place.
    """
    matrices = {name for name, tensor in model.state_dict().items() if tensor.ndim == 2}
    model.load_state_dict(
        {name: t.flatten(1) if t.ndim == 4 and name in matrices else t for name, t in tensors.items()}
    )


def check_ids(grids: Sequence[NDArray[np.integer]], codebook_size: int, name: str) -> list[Tensor]:
    """Grids as int64 tensors.

    Raises:
        QuantizerError: if a grid is not two-dimensional, is empty, or holds an id outside 0 to `codebook_size` - 1.
    """
    tensors = []
    for n, grid in enumerate(grids):
        ids = torch.from_numpy(np.asarray(grid).astype(np.int64))
        if ids.ndim != 2 or ids.numel() == 0:
            raise QuantizerError(f"grid {n}: expected shape (height, width), found {tuple(ids.shape)}")
        if ids.min() < 0 or ids.max() >= codebook_size:
            raise QuantizerError(
                f"grid {n}: ids from {ids.min()} to {ids.max()}; quantizer {name!r} has ids 0 to "
                f"{codebook_size - 1}"
            )
        tensors.append(ids)
    return tensors
