"""diffusers' [`VQModel`](https://huggingface.co/docs/diffusers/api/models/vq), and what `save_pretrained` wrote of the
families that become one here."""

from being_vl.quantize.base import Quantizer
from being_vl.quantize.weights import Checkpoint
from being_vl.quantize.preprocessing import Crop, Preprocessing


def recognizes(checkpoint: Checkpoint) -> bool:
    """Whether the config is of a `VQModel` that is not one of our own training."""
    return checkpoint.config.get("_class_name") == "VQModel" and "fit" not in checkpoint.manifest


def load(checkpoint: Checkpoint, device: str) -> Quantizer:
    """The preprocessing is the saved one; for others' checkpoints taming's, at the config's `sample_size`."""
    from being_vl.quantize.models.vqmodel import load_vqmodel

    own = Preprocessing(Crop(checkpoint.config.get("sample_size", 256)))
    return load_vqmodel(checkpoint, checkpoint.config, checkpoint.tensors, own, device)
