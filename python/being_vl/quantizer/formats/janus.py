"""LlamaGen's VQ-16 and VQ-8, and Janus, which uses VQ-16: [LlamaGen](https://github.com/FoundationVision/LlamaGen)
(`vq_ds16_c2i.pt`, …), `deepseek-ai/Janus-Pro-1B` and its like, and transformers' `deepseek-community/Janus-Pro-1B`.

They compare and decode codes of length 1. transformers' class compares them as they are stored, and so gives other ids
than the models were trained with; here the ids are the original ones, whichever format the weights are in.
"""

from being_vl.quantizer.base import Quantizer
from being_vl.quantizer.preprocessing import Crop, Pad, Preprocessing
from being_vl.quantizer.weights import CODEBOOK, WeightFiles, rename_tensors

LLAMAGEN_TENSOR = "encoder.conv_blocks.0.res.0.conv1.weight"
TO_TAMING = (
    (r"^encoder\.conv_blocks\.(\d+)\.", r"encoder.down.\1."),
    (r"^decoder\.conv_blocks\.(\d+)\.", r"decoder.up.\1."),
    (r"\.res\.", ".block."),
    (r"\.mid\.0\.", ".mid.block_1."),
    (r"\.mid\.1\.", ".mid.attn_1."),
    (r"\.mid\.2\.", ".mid.block_2."),
)


def recognizes(files: WeightFiles) -> bool:
    """Whether the config is transformers' of Janus, or the encoder has LlamaGen's names."""
    return files.model_type in ("janus", "janus_vqgan") or LLAMAGEN_TENSOR in files.tensors


def load(files: WeightFiles, device: str) -> Quantizer:
    """The VQ model, with Janus' padding to 384 pixels where a config says so, else with LlamaGen's crop of 256."""
    from torch.nn.functional import normalize

    from being_vl.quantizer.models.vqmodel import convert_taming, load_vqmodel

    tensors = rename_tensors(files.tensors, TO_TAMING)
    # For codes of length 1 the latents' length no longer matters to which is nearest.
    tensors[CODEBOOK] = normalize(tensors[CODEBOOK].float(), dim=-1)
    is_janus = files.model_type or files.image_processor
    default = _janus_preprocessing(files) if is_janus else Preprocessing(Crop(256, "bicubic", halve=True))
    return load_vqmodel(files, *convert_taming(tensors), default, device)


def _janus_preprocessing(files: WeightFiles) -> Preprocessing:
    """As transformers' `JanusImageProcessor`, whose options have other names in the original format."""
    options = files.image_processor
    mean = tuple(options.get("image_mean", (0.5, 0.5, 0.5)))
    background = options.get("background_color", [int(channel * 255) for channel in mean])
    size = options.get("image_size") or options.get("size", {"height": 384})["height"]
    fit = Pad(size, (background[0], background[1], background[2]), options.get("min_size", 14))
    std = tuple(options.get("image_std", (0.5, 0.5, 0.5)))
    return Preprocessing(fit, options.get("rescale_factor", 1 / 255), mean, std)
