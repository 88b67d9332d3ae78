"""Weights under taming's names: [VQ-GAN f16](https://github.com/CompVis/taming-transformers) and the others of its
authors, and Meta's [Chameleon](https://github.com/facebookresearch/chameleon) as first published.

The preprocessing is that of their notebooks and of Meta's `image_tokenizer.py`: the shorter side to the training size
(Lanczos), the middle cut out, pixels from -1 to 1.
"""

from being_vl.quantizer.base import Quantizer
from being_vl.quantizer.preprocessing import Crop, Preprocessing
from being_vl.quantizer.weights import WeightFiles

SIZE = 256


def recognizes(files: WeightFiles) -> bool:
    """Whether the encoder has taming's names and no family of transformers claims it."""
    return "encoder.down.0.block.0.conv1.weight" in files.tensors and not files.model_type


def load(files: WeightFiles, device: str) -> Quantizer:
    """A `.ckpt` at the resolution of the YAML beside it, 256 if there is none."""
    from being_vl.quantizer.models.vqmodel import convert_taming, load_vqmodel

    default = Preprocessing(Crop(files.resolution or SIZE))
    return load_vqmodel(files, *convert_taming(files.tensors), default, device)
