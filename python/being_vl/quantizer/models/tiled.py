"""The built-in quantizer: diffusers' `VQModel` whose encoder sees one tile at a time.

An image is cut into tiles (8×8 pixels) and each is encoded as an image of its own. So equal tiles get equal
ids whatever surrounds them, which is what a visual vocabulary and a small language model learn from most
easily. The decoder sees the whole grid and can smooth over the tiles' borders.
"""

import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from diffusers import VQModel
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from being_vl.errors import QuantizerError
from being_vl.quantizer.base import Precision
from being_vl.quantizer.models.network import NetworkQuantizer
from being_vl.quantizer.preprocessing import Area, Pad, Preprocessing
from being_vl.quantizer.weights import WeightFiles

FIT = "whole image, bicubic, longer side to size, centred on white; pixels / 127.5 - 1"
FIT_ASPECT = "whole image, bicubic, in its proportions to an area of size²; pixels / 127.5 - 1"

TILES_AT_A_TIME = 4096
FLOAT64_MARGIN = 1e-4
"""Where the second code is less than this behind the first, as a share of the squares in the distance, float64 decides.

Squared distances in float32 are wrong by up to 2e-6 of those squares, a fiftieth of this margin.
"""


class VQGAN(NetworkQuantizer):
    """A `Quantizer` on diffusers' `VQModel`, whose ids are the same on all devices.

    Args:
        model: The network; its weights are rounded to float16, as they are saved.
        name: Its name.
        size: Side of the square that images are fitted into, in pixels: a multiple of the tile's side.
        device: Where it runs.
        aspect: Keep the images' proportions, at an area of about `size`² pixels, in place of the square.

    Raises:
        QuantizerError: if `size` is no positive multiple of the tile's side.
    """

    model: VQModel

    def __init__(
        self, model: VQModel, name: str, size: int, device: str = "cpu", aspect: bool = False
    ) -> None:
        downsample = tile_side(model)
        fit = Area(downsample, size**2, size**2) if aspect else Pad(size)
        super().__init__(model.half(), name, Preprocessing(fit), downsample, device)
        self._check_size(size)
        self._encode_tiles = encode_tiles

    @cached_property
    def _float64_model(self) -> VQModel:
        """The same network in float64."""
        model = VQModel.from_config(self.model.config)
        model.load_state_dict(self.model.state_dict())
        return model.double().to(self.model.device).eval().requires_grad_(False)

    def _preprocessing_fields(self) -> dict[str, Any]:
        fit = self.preprocessing.fit
        return {"size": fit.size, "fit": FIT_ASPECT if isinstance(fit, Area) else FIT}

    def _fingerprint_fields(self) -> dict[str, Any]:
        return self._preprocessing_fields() | {"downsample": self.downsample}

    def with_size(self, size: int | None, aspect: bool = False) -> Self:
        """The same network for images of another size; see `load_quantizer`."""
        size = self.preprocessing.fit.size if size is None else size
        return type(self)(self.model, self.name, size, str(self.model.device), aspect)

    def with_precision(self, precision: Precision) -> Self:
        """This quantizer: its ids are exact, so there is only float32."""
        if precision != "float32":
            raise QuantizerError(
                f"quantizer {self.name!r}: computes in float32 alone, found {precision}; leave it out of the name"
            )
        return self

    def compile(self) -> None:
        """Compile the encoder, by torch.compile. The ids stay the same."""
        self._encode_tiles = torch.compile(encode_tiles, dynamic=True)

    @torch.inference_mode()
    def encode_prepared(self, images: Sequence[NDArray[np.uint8] | Tensor]) -> list[NDArray[np.int64]]:
        """Grids of prepared images, uint8 (height, width, 3).

        Equal tiles get equal ids whatever the batch, the number of threads and the device: where float32
        can't tell two codes apart for sure, float64 decides.
        """
        grids = []
        images_per_call = max(1, TILES_AT_A_TIME * self.downsample**2 // self.preprocessing.fit.size**2)
        for start in range(0, len(images), images_per_call):
            part = images[start : start + images_per_call]
            # All tiles of these images, equal ones once: plain areas repeat a lot.
            tiles = [cut_tiles(self.model, to_tensor(image[None], self.model.device)) for image in part]
            distinct_tiles, places = torch.cat(tiles).unique(dim=0, return_inverse=True)
            ids = self._ids(distinct_tiles)[places].cpu().split([len(image_tiles) for image_tiles in tiles])
            # Back to one grid per image.
            shapes = [tuple(side // self.downsample for side in image.shape[:2]) for image in part]
            grids += [grid.reshape(shape).numpy() for grid, shape in zip(ids, shapes, strict=True)]
        return grids

    def _ids(self, tiles: Tensor) -> Tensor:
        """Ids (N,) of tiles (N, channels, h, w)."""
        with torch.backends.cudnn.flags(allow_tf32=False):
            # The two nearest codes in float32.
            latents, codes = self._encode_tiles(self.model, tiles), self.codebook
            distances, candidates = squared_distances(latents, codes).topk(2, largest=False)
            ids = candidates[:, 0].clone()
            # Where rounding could have put them into the wrong order, all distances once more in float64.
            squares = latents.square().sum(1) + codes.square().sum(1).max()
            is_close = distances[:, 1] - distances[:, 0] < FLOAT64_MARGIN * squares
            if is_close.any():
                latents = encode_tiles(self._float64_model, tiles[is_close].double())
                codes = self._float64_model.quantize.embedding.weight
                ids[is_close] = squared_distances(latents, codes).argmin(1)
        return ids

    def _pixels(self, ids: Tensor) -> Tensor:
        return decode_codes(self.model, self.model.quantize.embedding(ids))

    def _save_model(self, folder: Path) -> None:
        float16_model = VQModel.from_config(self.model.config)
        float16_model.load_state_dict(self.model.state_dict())
        float16_model.half().save_pretrained(folder)

    @classmethod
    def load(cls, files: WeightFiles, device: str = "cpu") -> Self:
        """Load what `save_pretrained` wrote."""
        model = VQModel.from_config(files.config)
        model.load_state_dict(files.tensors)
        fields = files.manifest
        return cls(model, fields["name"], fields["size"], device, aspect=fields["fit"] == FIT_ASPECT)


def new_model(codebook_size: int, code_dim: int, tile: int, width: int, layers: int = 0) -> VQModel:
    """An untrained `VQModel` for tiles of `tile` pixels on a side, all folded into channels.

    Encoder and decoder have `3 + layers` residual blocks each.

    The decoder's norms are conditioned on the codes (`norm_type="spatial"`, as in MoVQ): plain group norms over
    the whole image lose its contrast, which costs such a small decoder 2 to 3 dB.
    """
    return VQModel(
        in_channels=3 * tile**2,
        out_channels=3 * tile**2,
        block_out_channels=(width,),
        latent_channels=code_dim,
        vq_embed_dim=code_dim,
        num_vq_embeddings=codebook_size,
        norm_num_groups=8,
        norm_type="spatial",
        mid_block_add_attention=False,
        layers_per_block=layers,
    )


def tile_side(model: VQModel) -> int:
    """Side of a tile, in pixels."""
    return math.isqrt(model.config.in_channels // 3)


def to_tensor(pixels: NDArray[np.uint8] | Tensor, device: torch.device | str | None = None) -> Tensor:
    """Pixels (n, height, width, 3) of 0 to 255 as float32 (n, 3, height, width) of -1 to 1."""
    return torch.as_tensor(pixels, device=device).permute(0, 3, 1, 2).float() / 127.5 - 1


def cut_tiles(model: VQModel, pixels: Tensor) -> Tensor:
    """Images (n, 3, height, width) as tiles (n * height/tile * width/tile, channels, 1, 1), raster order."""
    tiles = F.pixel_unshuffle(pixels, tile_side(model)).permute(0, 2, 3, 1)
    return tiles.reshape(-1, tiles.shape[-1], 1, 1)


def encode_tiles(model: VQModel, tiles: Tensor) -> Tensor:
    """Tiles (N, channels, 1, 1), each an image of its own, to latents (N, D)."""
    latents: Tensor = model.encode(tiles).latents
    return latents.flatten(1)


def squared_distances(latents: Tensor, codes: Tensor) -> Tensor:
    """(N, D) and (K, D) → (N, K)."""
    squares = latents.square().sum(1, keepdim=True) + codes.square().sum(1)
    return torch.addmm(squares, latents, codes.T, alpha=-2)


def decode_codes(model: VQModel, codes: Tensor) -> Tensor:
    """Codes (n, height, width, D) to pixels (n, 3, height * tile, width * tile), about -1 to 1."""
    channels = model.decode(codes.permute(0, 3, 1, 2), force_not_quantize=True).sample
    return F.pixel_shuffle(channels, tile_side(model))


def network_parameters(model: VQModel) -> Iterable[Tensor]:
    """All parameters but the codebook."""
    return (p for name, p in model.named_parameters() if not name.startswith("quantize."))
