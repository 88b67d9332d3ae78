"""Emu3's image and video tokenizer: [`BAAI/Emu3-VisionTokenizer`](https://github.com/baaivision/Emu3) under its
original names, and transformers' `Emu3-community/Emu3-Chat-hf`. Images only; the network sees each as four equal
frames.
"""

from typing import Any

from being_vl.quantizer.base import Quantizer
from being_vl.quantizer.preprocessing import Area, Preprocessing
from being_vl.quantizer.weights import WeightFiles, rename_tensors

TO_TRANSFORMERS = (
    (r"^encoder\.down\.", "encoder.down_block.down."),
    (r"^decoder\.up\.", "decoder.up_block.up."),
    (r"\.mid\.attn_1\.norm\.", ".middle_block.attn_norm."),
    (r"\.mid\.", ".middle_block."),
    (r"\.attn\.(\d+)\.norm\.", r".attn_norms.\1."),
    (r"(\.attn\.\d+|\.attn_1)\.([qkv])\.", r"\1.\2_proj."),
    (r"(\.attn\.\d+|\.attn_1)\.proj_out\.", r"\1.out_proj."),
)
CONFIG_NAMES = {
    "ch": "base_channels",
    "ch_mult": "channel_multiplier",
    "z_channels": "latent_channels",
    "double_z": "double_latent",
}


def recognizes(files: WeightFiles) -> bool:
    """Whether the config is transformers' of Emu3 or of its tokenizer, or the original one."""
    return files.model_type in ("emu3", "emu3_vqgan", "Emu3VisionVQ")


def load(files: WeightFiles, device: str) -> Quantizer:
    """The tokenizer at its own sizes: 512² to 1024² pixels, in the image's proportions."""
    from transformers import Emu3VQVAE, Emu3VQVAEConfig

    from being_vl.quantizer.models.emu3 import Emu3Quantizer
    from being_vl.quantizer.models.network import load_tensors

    fields = files.config.get("vq_config", files.config)
    model = Emu3VQVAE(Emu3VQVAEConfig(**_convert_config(fields)))
    tensors = files.tensors
    if "encoder.down.0.block.0.conv1.weight" in tensors:
        tensors = rename_tensors(tensors, TO_TRANSFORMERS)
    load_tensors(model, tensors)
    default = _published_preprocessing(files, model.spatial_scale_factor)
    return Emu3Quantizer(model, files.name, Preprocessing.from_manifest(files.manifest, default), device)


def _convert_config(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that transformers' config has, from its own names or the original ones."""
    fields = {CONFIG_NAMES.get(name, name): value for name, value in fields.items()}
    names = (
        "codebook_size embed_dim latent_channels double_latent in_channels out_channels temporal_downsample_factor "
        "base_channels channel_multiplier num_res_blocks attn_resolutions"
    )
    config = {name: fields[name] for name in names.split() if name in fields}
    width = config.get("base_channels", 256) * config.get("channel_multiplier", [4])[-1]
    return config | {"hidden_size": width}


def _published_preprocessing(files: WeightFiles, factor: int) -> Preprocessing:
    options = files.image_processor
    fit = Area(factor, options.get("min_pixels", 512**2), options.get("max_pixels", 1024**2))
    half = (0.5, 0.5, 0.5)
    return Preprocessing(
        fit,
        options.get("rescale_factor", 1 / 255),
        tuple(options.get("image_mean", half)),
        tuple(options.get("image_std", half)),
    )
