"""Small random VQ models, saved in the formats in which the real ones are published."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from transformers import ChameleonVQVAE, ChameleonVQVAEConfig, Emu3ImageProcessor, JanusVQVAE
from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from being_vl.quantizer.preprocessing import Preprocessing

torch.set_num_threads(1)  # at these sizes more threads only wait for each other

SIZE, CODES = 32, 64
State = dict[str, Tensor]


def spread_codes(codebook: nn.Embedding, latents: Tensor) -> None:
    """Codes like latents (N, D), so that many of them are used."""
    rows = torch.randperm(len(latents))[: len(codebook.weight)]
    with torch.no_grad():
        codebook.weight.normal_(latents.mean(), latents.std())
        codebook.weight[: len(rows)] = latents[rows]


def reverse_levels(state: State) -> State:
    """taming counts the decoder's levels from the other end than transformers' Janus."""
    last_level = max(int(name.split(".")[2]) for name in state if name.startswith("decoder.up."))
    return {
        re.sub(r"(decoder\.up\.)(\d+)", lambda match: f"{match[1]}{last_level - int(match[2])}", name): tensor
        for name, tensor in state.items()
    }


class Callback:
    """Stands for Lightning's objects in a file of weights, whose code must not run."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return print, ("this must not run",)


def save_taming(folder: Path, state: State, resolution: int = SIZE, name: str = "vqgan.ckpt") -> Path:
    """As CompVis and Meta did: Lightning's file of weights and a YAML."""
    folder.mkdir(parents=True, exist_ok=True)
    state = reverse_levels(state) | {"loss.discriminator.main.0.weight": torch.zeros(3)}
    torch.save({"epoch": 3, "callbacks": {Callback: Callback()}, "state_dict": state}, folder / name)
    config = {"model": {"params": {"embed_dim": 8, "ddconfig": {"resolution": resolution}}}}
    (folder / "vqgan.yaml").write_text(yaml.safe_dump(config))
    return folder


def save_chameleon(folder: Path, model: JanusVQVAE) -> ChameleonVQVAE:
    """As `zawnpn/being-vq-8k`: transformers' class, which has no decoder, and its image processor."""
    fields = model.config.to_dict()
    names = ["base_channels", "channel_multiplier", "num_res_blocks", "latent_channels", "embed_dim"]
    model_without_decoder = ChameleonVQVAE(
        ChameleonVQVAEConfig(resolution=SIZE, num_embeddings=CODES, **{name: fields[name] for name in names})
    )
    missing_names, _ = model_without_decoder.load_state_dict(model.state_dict(), strict=False)
    assert not missing_names
    model_without_decoder.save_pretrained(folder)
    chameleon_processor().save_pretrained(folder)
    return model_without_decoder


def chameleon_processor() -> ChameleonImageProcessorPil:
    return ChameleonImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})


def janus_processor() -> JanusImageProcessorPil:
    half = [0.5, 0.5, 0.5]
    return JanusImageProcessorPil(size={"height": SIZE, "width": SIZE}, image_mean=half, image_std=half)


def emu3_processor() -> Emu3ImageProcessor:
    return Emu3ImageProcessor(
        min_pixels=30**2, max_pixels=48**2, spatial_factor=2, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )


def llamagen_names(state: State) -> State:
    """The names in LlamaGen's vq_model.py, whose levels are counted as transformers' Janus does."""
    new_state = {}
    for name, tensor in state.items():
        name = re.sub(r"^(encoder\.down|decoder\.up)\.", lambda f: f"{f[1].split('.')[0]}.conv_blocks.", name)
        name = re.sub(r"(conv_blocks\.\d+)\.block\.", r"\1.res.", name)
        for n, part in enumerate(("block_1", "attn_1", "block_2")):
            name = name.replace(f".mid.{part}.", f".mid.{n}.")
        new_state[name] = tensor
    return new_state


def every_format(folder: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A saved one of each class."""
    taming, emu3 = request.getfixturevalue("taming"), request.getfixturevalue("emu3")
    save_chameleon(folder / "chameleon", request.getfixturevalue("chameleon"))
    yield folder / "chameleon"
    yield save_taming(folder / "taming", taming.state_dict())
    taming.save_pretrained(folder / "janus")
    janus_processor().save_pretrained(folder / "janus")
    yield folder / "janus"
    emu3.save_pretrained(folder / "emu3")
    emu3_processor().save_pretrained(folder / "emu3")
    yield folder / "emu3"


def put_on_white(image: Image.Image) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def pixel_values(preprocessing: Preprocessing, image: Image.Image) -> Tensor:
    return preprocessing.normalise(torch.from_numpy(np.array(preprocessing.prepare(image))))


def to_uint8(pixels: Tensor) -> NDArray[np.uint8]:
    """(3, h, w) of -1 to 1."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
