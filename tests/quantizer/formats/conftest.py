"""Images, and small random VQ models of the published architectures."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import Emu3VQVAE, Emu3VQVAEConfig, JanusVQVAE, JanusVQVAEConfig

from helpers.vq_models import CODES, SIZE, spread_codes


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    """Smooth and noisy ones of several modes, sizes and proportions."""
    rng = np.random.default_rng(0)
    images = []
    for n, (width, height) in enumerate([(32, 32), (64, 40), (33, 50), (20, 17), (150, 70), (31, 97)]):
        noise = Image.fromarray(rng.integers(0, 256, (3 + n, 4 + n, 3), np.uint8))
        images.append(noise.resize((width, height), Image.Resampling.BICUBIC))
    images[1] = images[1].convert("L")
    images[2].putalpha(Image.linear_gradient("L").resize(images[2].size))
    return images


@pytest.fixture(scope="module")
def taming() -> JanusVQVAE:
    """transformers' Janus is taming's architecture, with attention at the coarsest level."""
    torch.manual_seed(0)
    config = JanusVQVAEConfig(
        base_channels=32,
        channel_multiplier=[1, 2, 2],
        num_res_blocks=1,
        latent_channels=16,
        embed_dim=8,
        num_embeddings=CODES,
        num_patches=SIZE // 4,
    )
    model = JanusVQVAE(config).eval()
    with torch.no_grad():
        latents = model.quant_conv(model.encoder(torch.rand(4, 3, SIZE, SIZE) * 2 - 1))
    spread_codes(model.quantize.embedding, latents.permute(0, 2, 3, 1).flatten(0, 2))
    return model


@pytest.fixture(scope="module")
def chameleon(taming: JanusVQVAE) -> JanusVQVAE:
    """Chameleon's architecture, decoder included: taming's without attention outside the middle."""
    model = JanusVQVAE(taming.config).eval()
    model.load_state_dict(taming.state_dict())
    model.encoder.down[-1].attn = nn.ModuleList()
    model.decoder.up[0].attn = nn.ModuleList()
    return model


@pytest.fixture(scope="module")
def emu3() -> Emu3VQVAE:
    torch.manual_seed(0)
    config = Emu3VQVAEConfig(
        codebook_size=CODES,
        base_channels=32,
        channel_multiplier=[1, 2],
        num_res_blocks=1,
        attn_resolutions=[1],
        hidden_size=64,
    )
    model = Emu3VQVAE(config).eval()
    with torch.no_grad():
        hidden = model.encoder(torch.rand(4, 4, 3, SIZE, SIZE) * 2 - 1)
        latents = model.quant_conv(hidden.permute(0, 2, 1, 3, 4)).permute(0, 2, 3, 4, 1).flatten(0, 3)
    spread_codes(model.quantize.embedding, latents)
    return model
