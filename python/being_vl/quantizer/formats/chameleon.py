"""Chameleon's VQ-GAN in transformers' format: `zawnpn/being-vq-8k`, which Being-VL uses, and `facebook/chameleon-7b`.

transformers' class has no decoder. It is built here, and gets its weights from the folder's safetensors, where someone
has converted them, or from Meta's `tokenizer/vqgan.ckpt` put beside them.
"""

from being_vl.quantizer.base import Quantizer
from being_vl.quantizer.preprocessing import Crop, Preprocessing
from being_vl.quantizer.weights import WeightFiles


def recognizes(files: WeightFiles) -> bool:
    """Whether the config is transformers' of Chameleon or of its VQ-GAN."""
    return files.model_type in ("chameleon", "chameleon_vqgan")


def load(files: WeightFiles, device: str) -> Quantizer:
    """The VQ-GAN, with the preprocessing of `ChameleonImageProcessor`."""
    from being_vl.quantizer.models.vqmodel import convert_taming, load_vqmodel

    options = files.image_processor
    size = options.get("crop_size", {"height": 512})["height"]
    default = Preprocessing(
        Crop(size, truncate=True),
        rescale_factor=options.get("rescale_factor", 0.0078),
        image_mean=tuple(options.get("image_mean", (1.0, 1.0, 1.0))),
        image_std=tuple(options.get("image_std", (1.0, 1.0, 1.0))),
    )
    return load_vqmodel(files, *convert_taming(files.tensors), default, device)
