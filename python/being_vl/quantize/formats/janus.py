"""LlamaGen's VQ-16 and VQ-8, and Janus, which uses VQ-16: [LlamaGen](https://github.com/FoundationVision/LlamaGen)
(`vq_ds16_c2i.pt`, …), `deepseek-ai/Janus-Pro-1B` and its like, and transformers' `deepseek-community/Janus-Pro-1B`.

They compare and decode codes of length 1. transformers' class compares them as they are stored, and so gives other ids
than the models were trained with; here the ids are the original ones, whichever format the weights are in.
"""

from being_vl.quantize.base import Quantizer
from being_vl.quantize.weights import CODEBOOK, Checkpoint, renamed
from being_vl.quantize.preprocessing import Crop, Pad, Preprocessing

LLAMAGEN = "encoder.conv_blocks.0.res.0.conv1.weight"
TO_TAMING = (
    (r"^encoder\.conv_blocks\.(\d+)\.", r"encoder.down.\1."),
    (r"^decoder\.conv_blocks\.(\d+)\.", r"decoder.up.\1."),
    (r"\.res\.", ".block."),
    (r"\.mid\.0\.", ".mid.block_1."),
    (r"\.mid\.1\.", ".mid.attn_1."),
    (r"\.mid\.2\.", ".mid.block_2."),
)


def recognizes(checkpoint: Checkpoint) -> bool:
    """Whether the config is transformers' of Janus, or the encoder has LlamaGen's names."""
    return checkpoint.model_type in ("janus", "janus_vqgan") or LLAMAGEN in checkpoint.tensors


def load(checkpoint: Checkpoint, device: str) -> Quantizer:
    """The VQ model: Janus' own padding to 384 pixels where a config says so, LlamaGen's crop of 256 for its files."""
    from torch.nn.functional import normalize

    from being_vl.quantize.models.vqmodel import from_taming, load_vqmodel

    tensors = renamed(checkpoint.tensors, TO_TAMING)
    # For codes of length 1 the latents' length no longer matters to which is nearest.
    tensors[CODEBOOK] = normalize(tensors[CODEBOOK].float(), dim=-1)
    is_janus = checkpoint.model_type or checkpoint.image_processor
    own = _janus(checkpoint) if is_janus else Preprocessing(Crop(256, "bicubic", halve=True))
    return load_vqmodel(checkpoint, *from_taming(tensors), own, device)


def _janus(checkpoint: Checkpoint) -> Preprocessing:
    """That of transformers' `JanusImageProcessor`; the same options are named otherwise in the original format."""
    options = checkpoint.image_processor
    mean = tuple(options.get("image_mean", (0.5, 0.5, 0.5)))
    background = options.get("background_color", [int(channel * 255) for channel in mean])
    size = options.get("image_size") or options.get("size", {"height": 384})["height"]
    fit = Pad(size, (background[0], background[1], background[2]), options.get("min_size", 14))
    std = tuple(options.get("image_std", (0.5, 0.5, 0.5)))
    return Preprocessing(fit, options.get("rescale_factor", 1 / 255), mean, std)
