"""What a quantizer is, and how one is loaded."""

import importlib
import os
import pkgutil
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from being_vl.devices import find_device
from being_vl.errors import BeingVLError, QuantizerError
from being_vl.options import StrPath
from being_vl.quantizer import formats
from being_vl.quantizer_names import describe_quantizer

if TYPE_CHECKING:
    from torch import Tensor

    from being_vl.quantizer.preprocessing import Preprocessing
    from being_vl.quantizer.weights import WeightFiles

MAX_SIZE = 8192
"""Most pixels of the side of the square that images are brought to."""
BUILTIN = Path(__file__).parent / "builtin"

Precision = Literal["float32", "bfloat16"]


@runtime_checkable
class Quantizer(Protocol):
    """Images to grids of ids, and back."""

    @property
    def name(self) -> str:
        """What manifests and messages call it; two quantizers may share a name, but no fingerprint."""

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of all that decides an id: encoder, codebook and preprocessing (the size included)."""

    @property
    def codebook_size(self) -> int:
        """Ids are 0 to `codebook_size` - 1."""

    @property
    def downsample(self) -> int:
        """Side, in pixels, of the part of the image that one id stands for."""

    @property
    def preprocessing(self) -> "Preprocessing":
        """How images are brought to their size; picklable, so that other processes can do it."""

    def encode(self, images: Sequence[Image.Image]) -> list[NDArray[np.int64]]:
        """Grids (height, width), int64, one per image, whatever the images' modes and sizes.

        The ids of an image do not depend on the other images of the call.
        """

    def encode_prepared(self, images: "Sequence[NDArray[np.uint8] | Tensor]") -> list[NDArray[np.int64]]:
        """As `encode`, for the output of `preprocessing.prepare`: uint8 (height, width, 3), on any device."""

    def decode(self, grids: Sequence[NDArray[np.integer]]) -> list[Image.Image]:
        """RGB images, `downsample` times as large as the grids (height, width), of any size.

        Raises:
            QuantizerError: if an id is outside the codebook, a grid is not two-dimensional, or there is no decoder.
        """

    def with_size(self, size: int | None, aspect: bool = False) -> Self:
        """The same network for images of another size; see `load_quantizer`.

        Raises:
            QuantizerError: if the size does not suit it.
        """

    def with_precision(self, precision: Precision) -> Self:
        """The same network computing in another precision, and so with another fingerprint; see `load_quantizer`.

        Raises:
            QuantizerError: if there is no such thing.
        """

    def compile(self) -> None:
        """Compile the encoder, by torch.compile. The ids stay the same to within rounding."""

    def save_pretrained(self, folder: StrPath) -> None:
        """Write all that `load_quantizer` needs; the precision is not kept."""


def load_quantizer(
    name_or_path: StrPath,
    device: str = "auto",
    size: int | None = None,
    aspect: bool = False,
    precision: Precision = "float32",
) -> Quantizer:
    """Load a quantizer, whatever the format of its weights; `docs/guide/quantize.md` lists the formats.

    Args:
        name_or_path: `builtin`, a folder or a file of weights, or a name on the Hugging Face hub: `owner/repository` or
            `owner/repository/file`. In options that are text only, `NAME@SIZE` and `NAME@SIZE:aspect` do what `size`
            and `aspect` do, and `:bfloat16` at the end what `precision` does.
        device: Where it runs: `cpu`, `cuda`, `cuda:1`, …; `auto` is a GPU where there is one, else the CPU.
        size: Side of the square that images are brought to, in pixels; None for the quantizer's own. Another size is
            another preprocessing, and so another fingerprint.
        aspect: Keep the proportions of each image: its area becomes about `size`² pixels, and its sides multiples of
            `downsample`, so that grids need not be square.
        precision: What the encoder computes in; bfloat16 is faster on a GPU and gives some other ids, and so another
            fingerprint.

    Raises:
        QuantizerError: if there is no such quantizer, it is damaged, or the size does not suit it.
    """
    # torch takes a second to import
    from being_vl.quantizer.weights import WeightFiles

    name = os.fspath(name_or_path)
    if match := re.fullmatch(r"(.+):bfloat16", name):
        name, precision = match[1], "bfloat16"
    if match := re.fullmatch(r"(.+)@([0-9]{1,9})(:aspect)?", name):
        name, size, aspect = match[1], int(match[2]), bool(match[3])
    elif "@" in name and not os.path.exists(name):  # noqa: PTH110 - no error if it is too long
        raise QuantizerError(f"quantizer: expected NAME@SIZE or NAME@SIZE:aspect, found {name[:100]!r}")
    if size is not None and not 1 <= size <= MAX_SIZE:
        raise QuantizerError(f"quantizer {name!r}: expected a size of 1 to {MAX_SIZE} pixels, found {size}")
    files = WeightFiles(BUILTIN if name == "builtin" else name)
    try:
        quantizer: Quantizer = _find_format(files).load(files, find_device(device))
    except BeingVLError:
        raise
    except Exception as error:  # damaged files make the libraries raise all kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise QuantizerError(f"{files.path}: the quantizer cannot be loaded ({reason})") from error
    _check_manifest(files, quantizer)
    if size is not None or aspect:
        quantizer = quantizer.with_size(size, aspect)
    return quantizer.with_precision(precision)


def _find_format(files: "WeightFiles") -> Any:
    """The module that reads these files; see `being_vl.quantizer.formats`."""
    names = sorted(module.name for module in pkgutil.iter_modules(formats.__path__))
    for name in names:
        module = importlib.import_module(f"{formats.__name__}.{name}")
        if module.recognizes(files):
            return module
    first_tensors = ", ".join(sorted(files.tensors)[:3])
    raise QuantizerError(
        f"{files.path}: none of the formats {', '.join(names)}; model_type is {files.model_type!r}, its "
        f"first tensors are {first_tensors}"
    )


def _check_manifest(files: "WeightFiles", quantizer: Quantizer) -> None:
    """Raise unless the weights are those that the manifest beside them was written for."""
    fingerprint = files.manifest.get("fingerprint", quantizer.fingerprint)
    if fingerprint != quantizer.fingerprint:
        raise QuantizerError(
            f"{files.path}: its weights and preprocessing are those of "
            f"{describe_quantizer(quantizer.name, quantizer.fingerprint)}, its manifest says "
            f"{describe_quantizer(quantizer.name, fingerprint)}; copy or make the quantizer again"
        )
