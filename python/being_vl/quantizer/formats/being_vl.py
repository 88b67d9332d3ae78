"""What `being-vl quantizer train` writes, the built-in quantizer for one."""

from being_vl.quantizer.base import Quantizer
from being_vl.quantizer.weights import WeightFiles


def recognizes(files: WeightFiles) -> bool:
    """Whether the manifest is one that `being-vl quantizer train` has written."""
    return "fit" in files.manifest


def load(files: WeightFiles, device: str) -> Quantizer:
    """The quantizer at the size that it was trained at."""
    from being_vl.quantizer.models.tiled import VQGAN

    return VQGAN.load(files, device)
