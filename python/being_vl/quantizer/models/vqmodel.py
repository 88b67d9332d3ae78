"""The VQ-GAN of taming-transformers, which Chameleon, LlamaGen and Janus use as well, as diffusers' `VQModel`.

All of them are one architecture under different names of tensors, so all become the same class: names are translated,
and the architecture is read from the tensors' names and shapes.
"""

import re
from typing import Any

from diffusers import VQModel
from torch import Tensor

from being_vl.errors import QuantizerError
from being_vl.quantizer.models.network import load_tensors
from being_vl.quantizer.models.whole_image import WholeImageQuantizer
from being_vl.quantizer.preprocessing import Preprocessing
from being_vl.quantizer.weights import CODEBOOK, WeightFiles, rename_tensors

FROM_TAMING = (
    (r"\.(down|up)\.(\d+)\.block\.", r".\1_blocks.\2.resnets."),
    (r"\.(down|up)\.(\d+)\.attn\.", r".\1_blocks.\2.attentions."),
    (r"\.(down|up)\.(\d+)\.(down|up)sample\.", r".\1_blocks.\2.\3samplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
)


class VQModelQuantizer(WholeImageQuantizer):
    """A `Quantizer` on diffusers' `VQModel`; see `WholeImageQuantizer`."""

    model: VQModel

    def __init__(self, model: VQModel, name: str, preprocessing: Preprocessing, device: str = "cpu") -> None:
        super().__init__(model, name, preprocessing, 2 ** (len(model.config.block_out_channels) - 1), device)

    def _latents(self, pixels: Tensor) -> Tensor:
        latents: Tensor = self.model.quant_conv(self.model.encoder(pixels))[0]
        return latents

    def _pixels(self, ids: Tensor) -> Tensor:
        if self.model.decoder is None:
            raise QuantizerError(
                f"quantizer {self.name!r}: its weights hold no decoder, as transformers' Chameleon; put the "
                "vqgan.ckpt of the original publication into its folder"
            )
        codes = self.model.quantize.embedding(ids).permute(0, 3, 1, 2)
        condition = codes if self.model.config.norm_type == "spatial" else None
        pixels: Tensor = self.model.decoder(self.model.post_quant_conv(codes), condition)
        return pixels


def load_vqmodel(
    files: WeightFiles,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    default: Preprocessing,
    device: str,
) -> VQModelQuantizer:
    """A quantizer of diffusers' config and tensors.

    Args:
        files: What the tensors were read from.
        config: diffusers' configuration of a `VQModel`.
        tensors: Its weights, under diffusers' names; those of the decoder may be absent.
        default: The preprocessing, where the manifest does not say with which one it was saved.
        device: Where it runs.
    """
    model = VQModel.from_config(config)
    if not any(name.startswith("decoder.") for name in tensors):
        model.decoder = model.post_quant_conv = None
        tensors = {name: t for name, t in tensors.items() if not name.startswith("post_quant_conv.")}
    load_tensors(model, tensors)
    preprocessing = Preprocessing.from_manifest(files.manifest, default)
    return VQModelQuantizer(model, files.name, preprocessing, device)


def convert_taming(tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """diffusers' config and tensors of those under taming's names, or under transformers' for Chameleon and Janus."""
    # The architecture, from names and shapes of tensors.
    levels = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder.down."))
    blocks = {name.split(".")[4] for name in tensors if name.startswith("encoder.down.0.block.")}
    attention = [f"encoder.down.{level}.attn.0.q.weight" in tensors for level in range(levels)]
    codes, dimension = tensors[CODEBOOK].shape
    config = {
        "block_out_channels": [
            tensors[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)
        ],
        "down_block_types": [f"{'Attn' * has_attention}DownEncoderBlock2D" for has_attention in attention],
        "up_block_types": [
            f"{'Attn' * has_attention}UpDecoderBlock2D" for has_attention in reversed(attention)
        ],
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in tensors,
        "layers_per_block": len(blocks),
        "latent_channels": tensors["encoder.conv_out.weight"].shape[0],
        "num_vq_embeddings": codes,
        "vq_embed_dim": dimension,
    }
    # taming counts the decoder's levels from the pixels, Janus and LlamaGen, as diffusers, from the codes: the level at
    # the pixels is the one that enlarges nothing.
    if "decoder.up.0.upsample.conv.weight" not in tensors:
        tensors = {_reverse_level(name, levels): tensor for name, tensor in tensors.items()}
    return config, rename_tensors(tensors, FROM_TAMING)


def _reverse_level(name: str, levels: int) -> str:
    return re.sub(r"^decoder\.up\.(\d+)", lambda match: f"decoder.up.{levels - 1 - int(match[1])}", name)
