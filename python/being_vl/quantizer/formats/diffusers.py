"""diffusers' [`VQModel`](https://huggingface.co/docs/diffusers/api/models/vq), and what `save_pretrained` wrote of the
families that become one here."""

from being_vl.quantizer.base import Quantizer
from being_vl.quantizer.preprocessing import Crop, Preprocessing
from being_vl.quantizer.weights import WeightFiles


def recognizes(files: WeightFiles) -> bool:
    """Whether the config is of a `VQModel` that `being-vl quantizer train` has not written."""
    return files.config.get("_class_name") == "VQModel" and "fit" not in files.manifest


def load(files: WeightFiles, device: str) -> Quantizer:
    """The preprocessing is that of the manifest, or without one taming's, at the config's `sample_size`."""
    from being_vl.quantizer.models.vqmodel import load_vqmodel

    default = Preprocessing(Crop(files.config.get("sample_size", 256)))
    return load_vqmodel(files, files.config, files.tensors, default, device)
