"""What a quantizer is, and how one is loaded."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

BUILTIN = Path(__file__).parent / "builtin"


@runtime_checkable
class Quantizer(Protocol):
    """Images to grids of ids, and back."""

    @property
    def name(self) -> str:
        """Its name, for people."""

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of all that decides an id: encoder, codebook and preprocessing (the size included)."""

    @property
    def codebook_size(self) -> int:
        """Ids are 0 to `codebook_size` - 1."""

    @property
    def downsample(self) -> int:
        """Side, in pixels, of the part of the image that one id stands for."""

    def encode(self, images: Sequence[Image.Image]) -> list[NDArray[np.int64]]:
        """Grids (height, width), int64, one per image, whatever the images' modes and sizes.

        The ids of an image do not depend on the other images of the call.
        """

    def decode(self, grids: Sequence[NDArray[np.integer]]) -> list[Image.Image]:
        """RGB pictures, `downsample` times as large as the grids (height, width), of any size.

        Raises:
            QuantizerError: if an id is outside the codebook or a grid is not two-dimensional.
        """

    def save_pretrained(self, folder: Path) -> None:
        """Write all that `load_quantizer` needs."""


def load_quantizer(name_or_folder: str | Path, device: str = "cpu", size: int | None = None) -> Quantizer:
    """Load a quantizer.

    Args:
        name_or_folder: `builtin`, or a folder written by `save_pretrained`. In options that are text only,
            `NAME@SIZE` does what `size` does.
        device: Where it runs.
        size: Side of the square that images are fitted into, in pixels; None for the quantizer's own. Another
            size is another preprocessing, and so another fingerprint.

    Raises:
        QuantizerError: if there is no such quantizer, it is damaged, or the size does not suit it.
    """
    from being_vl.quantize.vqgan import VQGAN  # torch and diffusers take seconds to import

    name, at, suffix = str(name_or_folder).rpartition("@")
    if size is None and at and suffix.isdecimal():
        name_or_folder, size = name, int(suffix)
    folder = BUILTIN if str(name_or_folder) == "builtin" else Path(name_or_folder)
    return VQGAN.load(folder, device=device, size=size)
