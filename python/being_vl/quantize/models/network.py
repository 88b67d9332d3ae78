"""What all quantizers of published networks have in common."""

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
from being_vl.quantize.base import Precision
from being_vl.quantize.preprocessing import Preprocessing

DISTANCES_AT_A_TIME = 1 << 26


class NetworkQuantizer(ABC):
    """A `Quantizer` whose network sees the whole image.

    It computes in float32 or, on demand, bfloat16 (autocast; distances stay float32), one image at a time: so the ids
    of an image don't depend on the others, and images may differ in size. Where the two nearest codes are equally near
    to within rounding, another device may choose the other one.

    Args:
        model: The network, in any floating dtype.
        name: Its name.
        preprocessing: How images become its input.
        downsample: Side, in pixels, of the part of the image that one id stands for.
        device: Where it runs.

    Raises:
        QuantizerError: if the images' sides would not be multiples of `downsample`.
    """

    precision: Precision = "float32"

    def __init__(
        self, model: nn.Module, name: str, preprocessing: Preprocessing, downsample: int, device: str = "cpu"
    ) -> None:
        self.model = model.float().to(device).eval().requires_grad_(False)
        self.name = name
        self.downsample = downsample
        self.preprocessing = preprocessing
        self._check()

    def _check(self) -> None:
        if not self.preprocessing.suits(self.downsample):
            raise QuantizerError(
                f"quantizer {self.name!r}: size is {self.preprocessing.fit.size}; expected a positive multiple of "
                f"{self.downsample}"
            )

    def resized(self, size: int | None, aspect: bool = False) -> Self:
        """The same network for images of another size; see `load_quantizer`."""
        other = self._copy()
        other.preprocessing = self.preprocessing.resized(size, aspect, self.downsample)
        other._check()
        return other

    def in_precision(self, precision: Precision) -> Self:
        """The same network computing in another precision; see `load_quantizer`."""
        other = self._copy()
        other.precision = precision
        return other

    def _copy(self) -> Self:
        other = copy(self)
        other.__dict__.pop("fingerprint", None)
        return other

    def compile(self) -> None:
        """Compile the encoder, by torch.compile. The ids stay the same to within rounding."""
        self._latents = torch.compile(self._latents)  # type: ignore[method-assign]

    @property
    @abstractmethod
    def codebook(self) -> Tensor:
        """(codes, dimension)."""

    @property
    def codebook_size(self) -> int:
        """Ids are 0 to `codebook_size` - 1."""
        return len(self.codebook)

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of encoder, codebook, preprocessing and precision; not of the decoder, which decides no id."""
        digests: dict[str, Any] = {"preprocessing": self.preprocessing.to_json()}
        if self.precision != "float32":
            digests["precision"] = self.precision
        for name, tensor in self.model.state_dict().items():
            if not name.startswith(("decoder.", "post_quant_conv.")):
                digests[name] = hashlib.sha256(tensor.cpu().contiguous().numpy().tobytes()).hexdigest()
        return compute_fingerprint(digests)

    def encode(self, images: Sequence[Image.Image]) -> list[NDArray[np.int64]]:
        """Grids (height, width), int64, one per image, whatever the images' modes and sizes."""
        return self.encode_prepared([np.array(self.preprocessing.prepare(image)) for image in images])

    @torch.inference_mode()
    def encode_prepared(self, pictures: Sequence[NDArray[np.uint8] | Tensor]) -> list[NDArray[np.int64]]:
        """Grids of prepared images, uint8 (height, width, 3)."""
        ids = [self._encode(torch.as_tensor(picture)) for picture in pictures]
        return [grid.cpu().numpy() for grid in ids]  # a GPU is waited for only now

    def _encode(self, picture: Tensor) -> Tensor:
        pixels = self.preprocessing.normalise(picture.to(self.codebook.device))
        bfloat16 = torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")
        with torch.backends.cudnn.flags(allow_tf32=False), bfloat16:
            latents = self._latents(pixels[None]).float()
        _, height, width = latents.shape
        return nearest(latents.flatten(1).T, self.codebook).reshape(height, width)

    @torch.inference_mode()
    def decode(self, grids: Sequence[NDArray[np.integer]]) -> list[Image.Image]:
        """RGB pictures, `downsample` times as large as the grids (height, width), of any size.

        Raises:
            QuantizerError: if an id is outside the codebook, a grid is not two-dimensional, or the checkpoint has no
                decoder.
        """
        pictures = []
        for ids in checked_ids(grids, self.codebook_size, self.name):
            pixels = self._pixels(ids.to(self.codebook.device)[None])[0]
            array = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
            pictures.append(Image.fromarray(array))
        return pictures

    def save_pretrained(self, folder: Path) -> None:
        """Write the weights in their library's format, in float32, and `manifest.json`."""
        self._save_model(Path(folder))
        fields = {"name": self.name, "fingerprint": self.in_precision("float32").fingerprint}
        write_manifest(Path(folder), "quantizer", fields | {"preprocessing": self.preprocessing.to_json()})

    @abstractmethod
    def _latents(self, pixels: Tensor) -> Tensor:
        """(1, 3, height, width) → (dimension, height / downsample, width / downsample)."""

    @abstractmethod
    def _pixels(self, ids: Tensor) -> Tensor:
        """(1, height, width) → (1, 3, height * downsample, width * downsample), about -1 to 1."""

    @abstractmethod
    def _save_model(self, folder: Path) -> None:
        """Write config and weights."""


def nearest(latents: Tensor, codebook: Tensor) -> Tensor:
    """Ids (N,) of the codes (K, D) that are nearest to latents (N, D); the lowest id of equally near ones."""
    squares = codebook.square().sum(1)
    rows = max(1, DISTANCES_AT_A_TIME // len(codebook))
    # The latents' own squares are left out: they are the same for all codes, and would only cost digits.
    return torch.cat(
        [torch.addmm(squares, part, codebook.T, alpha=-2).argmin(1) for part in latents.split(rows)]
    )


def load_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load all weights; 1×1 convolutions of attention become the matrices that diffusers and transformers have there.

    Raises:
        RuntimeError: if a tensor is missing, is of another shape, or has no place.
    """
    expected = model.state_dict()
    matrices = {name for name, tensor in expected.items() if tensor.ndim == 2}
    model.load_state_dict(
        {name: t.flatten(1) if t.ndim == 4 and name in matrices else t for name, t in tensors.items()}
    )


def checked_ids(grids: Sequence[NDArray[np.integer]], codebook_size: int, name: str) -> list[Tensor]:
    """Grids as int64 tensors.

    Raises:
        QuantizerError: if a grid is not two-dimensional, is empty, or holds an id outside 0 to `codebook_size` - 1.
    """
    checked = []
    for n, grid in enumerate(grids):
        ids = torch.from_numpy(np.asarray(grid).astype(np.int64))
        if ids.ndim != 2 or ids.numel() == 0:
            raise QuantizerError(f"grid {n}: expected shape (height, width), got {tuple(ids.shape)}")
        if ids.min() < 0 or ids.max() >= codebook_size:
            raise QuantizerError(
                f"grid {n}: ids from {ids.min()} to {ids.max()}; quantizer {name!r} has ids 0 to "
                f"{codebook_size - 1}"
            )
        checked.append(ids)
    return checked
