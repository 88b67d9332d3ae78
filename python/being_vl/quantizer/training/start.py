"""Where a quantizer's training starts: networks as principal components of tiles, codes as k-means of those."""

import math
from collections import Counter

import numpy as np
import torch
from diffusers import VQModel
from torch import Tensor, nn

from being_vl.quantizer.models.tiled import cut_tiles, encode_tiles
from being_vl.quantizer.training.codebook import Codebook
from being_vl.quantizer.training.crops import Crops
from being_vl.quantizer.training.options import QuantizerTrainOptions

MAX_TILES = 131072
"""Tiles of the folder that is listed most often, at most."""
TILES_PER_CODE = 32
MEAN_WEIGHT = 0.5
"""Weight of a tile's mean colour beside its other components."""


@torch.no_grad()
def start(model: VQModel, codebook: Codebook, crops: Crops, options: QuantizerTrainOptions) -> None:
    """Set weights and codes from the tiles of random crops; folders give as many as they take turns."""
    # Different tiles of each folder.
    max_tiles = min(MAX_TILES, TILES_PER_CODE * options.codebook.size)
    max_crops = max_tiles / (crops.size // options.network.tile) ** 2
    turns = Counter(options.images)
    folders = [
        _draw_tiles(
            model,
            crops,
            options.images.index(folder),
            math.ceil(max_crops * count / max(turns.values())),
            options.seed,
        )
        for folder, count in turns.items()
    ]
    # The networks become principal components of as many tiles of each folder.
    tiles_per_folder = min(map(len, folders))
    rng = torch.Generator().manual_seed(options.seed)
    samples = [tiles[torch.randperm(len(tiles), generator=rng)[:tiles_per_folder]] for tiles in folders]
    start_linear(model, torch.cat(samples))
    # The codes become k-means of all tiles' latents.
    latents = [
        torch.cat([encode_tiles(model, part[:, :, None, None]) for part in tiles.split(4096)])
        for tiles in folders
    ]
    codebook.place(latents, round(options.codebook.reserved_share * options.codebook.size), rng)


def _draw_tiles(model: VQModel, crops: Crops, folder: int, count: int, seed: int) -> Tensor:
    """The different tiles (N, channels) of `count` random crops of a folder."""
    rngs = (np.random.default_rng([seed, 2, folder, number]) for number in range(count))
    crops_of_folder = (crops.draw(folder, rng)[None].to(model.device) for rng in rngs)
    tiles: Tensor = torch.cat([cut_tiles(model, pixels).flatten(1) for pixels in crops_of_folder]).unique(
        dim=0
    )
    return tiles


@torch.no_grad()
def start_linear(model: VQModel, tiles: Tensor) -> None:
    """Make `model` the principal components of `tiles` (N, channels): encode projects, decode projects back.

    Every feature f goes through the networks as a pair of channels f and -f, because silu(f) - silu(-f) = f.
    Group norms would divide by the features' size; a pair of large constants in each group makes the divisor
    (nearly) constant. The residual blocks start as zero in the encoder and small in the decoder, and learn the
    rest.
    """
    dim = model.config.vq_embed_dim
    # Principal components, with each tile's mean colour counting less.
    mean = tiles.mean(0)
    mean_reduction = _mean_reduction(tiles.shape[1] // 3).to(tiles)
    _, sizes, axes = torch.linalg.svd((tiles - mean) @ mean_reduction, full_matrices=False)
    # Projection to latents of mean square 1, and back.
    scale = (len(tiles) * dim) ** 0.5 / sizes[:dim].norm()
    to_features, to_pixels = (
        scale * axes @ mean_reduction,
        torch.linalg.solve(mean_reduction, axes[:dim].T) / scale,
    )
    constant = float(10 * scale * sizes[0] / len(tiles) ** 0.5)
    for convolution in (model.quant_conv, model.post_quant_conv):
        nn.init.zeros_(convolution.weight)
        nn.init.zeros_(convolution.bias)
        convolution.weight[:, :, 0, 0] = torch.eye(dim)
    _start_encoder(model, to_features, mean, constant)
    _start_decoder(model, to_pixels, mean)


def _start_encoder(model: VQModel, to_features: Tensor, mean: Tensor, constant: float) -> None:
    """Make the encoder a projection of tiles, less their mean, on the first features.

    Args:
        model: Its networks.
        to_features: (features, channels of a tile).
        mean: Of tiles, (channels,).
        constant: What the channels that steady the norms hold.
    """
    encoder, dim = model.encoder, model.config.vq_embed_dim
    width = encoder.conv_in.out_channels
    # In each group of a norm the first pair of channels holds the constant, the others features.
    group_width = width // model.config.norm_num_groups
    positive_channels = torch.arange(0, width, 2)
    is_constant = positive_channels % group_width == 0
    pairs, constants = positive_channels[~is_constant], positive_channels[is_constant]
    features = min(len(pairs), len(to_features))
    # Of a 3×3 convolution on a lone tile only the middle counts.
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.weight.mul_(torch.eye(3)[1].outer(torch.eye(3)[1]))
    # The features go in with both signs, and come out as their difference.
    for convolution in (encoder.conv_in, encoder.conv_out):
        nn.init.zeros_(convolution.weight)
        nn.init.zeros_(convolution.bias)
    for sign, shift in ((1, 0), (-1, 1)):
        encoder.conv_in.weight[pairs[:features] + shift, :, 1, 1] = sign * to_features[:features]
        encoder.conv_in.bias[pairs[:features] + shift] = -sign * (to_features[:features] @ mean)
        encoder.conv_in.bias[constants + shift] = sign * constant
        encoder.conv_out.weight[torch.arange(dim), pairs[:dim] + shift, 1, 1] = float(sign)
    # Norms give back what they divide by; residual blocks add nothing.
    for name, module in encoder.named_modules():
        if isinstance(module, nn.GroupNorm) and not name.endswith("norm2"):
            module.weight.fill_(constant * (2 / group_width) ** 0.5)
            for shift in (0, 1):
                module.weight[constants + shift] = 0
        if name.endswith("conv2"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def _start_decoder(model: VQModel, to_pixels: Tensor, mean: Tensor) -> None:
    """Make the decoder a projection of codes back to tiles, beside a network that contributes little.

    Args:
        model: Its networks.
        to_pixels: (channels of a tile, dimension of a code).
        mean: Of tiles, (channels,).
    """
    decoder, dim = model.decoder, model.config.vq_embed_dim
    # Norms that the codes do not scale yet, and residual blocks that add little.
    for name, module in decoder.named_modules():
        if name.endswith("conv_y"):
            nn.init.zeros_(module.weight)
            nn.init.ones_(module.bias)
        if name.endswith("conv2"):
            module.weight.mul_(0.1)
            nn.init.zeros_(module.bias)
    # The first channels of the last layer carry the codes, with both signs; the others are the network's.
    channels = torch.arange(2 * dim)
    norm = decoder.conv_norm_out
    nn.init.zeros_(norm.conv_b.weight)
    nn.init.zeros_(norm.conv_b.bias)
    norm.conv_y.bias[channels] = 0
    decoder.conv_out.weight.mul_(0.1)
    decoder.conv_out.weight[:, channels] = 0
    for sign, shift in ((1, 0), (-1, 1)):
        norm.conv_b.weight[channels[shift::2], torch.arange(dim), 0, 0] = float(sign)
        decoder.conv_out.weight[:, channels[shift::2], 1, 1] = sign * to_pixels
    decoder.conv_out.bias.copy_(mean)


def _mean_reduction(pixels: int) -> Tensor:
    """A matrix (3 * pixels, 3 * pixels) that multiplies the mean of each colour of a tile by `MEAN_WEIGHT`.

    Codes then tell shapes apart more, and slightly different plain backgrounds less, than by the error of pixels.
    """
    mean: Tensor = torch.block_diag(*[torch.full((pixels, pixels), 1 / pixels)] * 3)
    return torch.eye(3 * pixels) - (1 - MEAN_WEIGHT) * mean
