"""The built-in quantizer: diffusers' `VQModel` whose encoder sees one tile at a time.

An image is cut into tiles (8×8 pixels) and each is encoded as an image of its own. So equal tiles get equal
ids whatever surrounds them, which is what a visual vocabulary and a small language model learn from most
easily. The decoder sees the whole grid and can smooth over the tiles' borders.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import torch
from diffusers import VQModel
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from being_vl.errors import QuantizerError
from being_vl.files import write_manifest
from being_vl.fingerprints import compute_fingerprint
from being_vl.quantize.base import Precision
from being_vl.quantize.weights import Checkpoint
from being_vl.quantize.models.network import checked_ids
from being_vl.quantize.preprocessing import Area, Pad, Preprocessing

FIT = "whole image, bicubic, longer side to size, centred on white; pixels / 127.5 - 1"
FIT_ASPECT = "whole image, bicubic, in its proportions to an area of size²; pixels / 127.5 - 1"

TILES_AT_A_TIME = 4096
# Squared distances in float32 are wrong by up to 2e-6 of the squares they are made of; where the second code is
# less than fifty times that behind the first, float64 decides.
SURE = 1e-4


class VQGAN:
    """A `Quantizer` on diffusers' `VQModel`.

    Args:
        model: The network; its weights are rounded to float16, as they are saved.
        name: Its name.
        size: Side of the square that images are fitted into, in pixels: a multiple of the tile's side.
        device: Where it runs.
        aspect: Keep the images' proportions, at an area of about `size`² pixels, in place of the square.

    Raises:
        QuantizerError: if `size` is no positive multiple of the tile's side.
    """

    def __init__(
        self, model: VQModel, name: str, size: int, device: str = "cpu", aspect: bool = False
    ) -> None:
        self.name = name
        self.size = size
        self.aspect = aspect
        self.downsample = tile_side(model)
        if size < 1 or (size % self.downsample and not aspect):
            raise QuantizerError(
                f"quantizer {name!r}: size is {size}; expected a positive multiple of {self.downsample}"
            )
        self.model = model.half().float().to(device).eval().requires_grad_(False)
        self._encode_tiles = encode_tiles

    @property
    def codebook_size(self) -> int:
        """Ids are 0 to `codebook_size` - 1."""
        return int(self.model.quantize.n_e)

    @property
    def fit(self) -> str:
        """How images are brought to their size, in words."""
        return FIT_ASPECT if self.aspect else FIT

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of all that decides an id: encoder, codebook and preprocessing."""
        digests = {"fit": self.fit, "size": self.size, "downsample": self.downsample}
        for name, tensor in self.model.state_dict().items():
            if not name.startswith(("decoder.", "post_quant_conv.")):
                digests[name] = hashlib.sha256(tensor.cpu().contiguous().numpy().tobytes()).hexdigest()
        return compute_fingerprint(digests)

    @cached_property
    def _exact(self) -> VQModel:
        """The same network in float64."""
        exact = VQModel.from_config(self.model.config)
        exact.load_state_dict(self.model.state_dict())
        return exact.double().to(self.model.device).eval().requires_grad_(False)

    @property
    def preprocessing(self) -> Preprocessing:
        """How images are brought to their size."""
        area = self.size**2
        return Preprocessing(Area(self.downsample, area, area) if self.aspect else Pad(self.size))

    def prepare(self, image: Image.Image) -> Image.Image:
        """What the quantizer sees of `image`: RGB, `size` by `size` pixels or, with `aspect`, about as many."""
        return self.preprocessing.prepare(image)

    def resized(self, size: int | None, aspect: bool = False) -> Self:
        """The same network for images of another size; see `load_quantizer`."""
        device = str(self.model.device)
        return type(self)(self.model, self.name, self.size if size is None else size, device, aspect)

    def in_precision(self, precision: Precision) -> Self:
        """This quantizer: its ids are exact, so there is only float32."""
        if precision != "float32":
            raise QuantizerError(
                f"quantizer {self.name!r}: computes in float32 alone, got {precision}; leave it out of the name"
            )
        return self

    def compile(self) -> None:
        """Compile the encoder, by torch.compile. The ids stay the same."""
        self._encode_tiles = torch.compile(encode_tiles, dynamic=True)

    def encode(self, images: Sequence[Image.Image]) -> list[NDArray[np.int64]]:
        """Grids (height, width), int64, one per image; (size / downsample)² unless the proportions are kept."""
        return self.encode_prepared([np.array(self.prepare(image)) for image in images])

    @torch.inference_mode()
    def encode_prepared(self, pictures: Sequence[NDArray[np.uint8] | Tensor]) -> list[NDArray[np.int64]]:
        """Grids of prepared images, uint8 (height, width, 3).

        Equal tiles get equal ids whatever the batch, the number of threads and the device: where float32
        can't tell two codes apart for sure, float64 decides.
        """
        grids = []
        per_call = max(1, TILES_AT_A_TIME * self.downsample**2 // self.size**2)
        for start in range(0, len(pictures), per_call):
            part = pictures[start : start + per_call]
            shapes = [(p.shape[0] // self.downsample, p.shape[1] // self.downsample) for p in part]
            cut = [cut_tiles(self.model, to_tensor(p[None], self.model.device)) for p in part]
            tiles, places = torch.cat(cut).unique(dim=0, return_inverse=True)  # plain areas repeat a lot
            ids = self._ids(tiles)[places].cpu().split([height * width for height, width in shapes])
            grids += [each.reshape(shape).numpy() for each, shape in zip(ids, shapes, strict=True)]
        return grids

    def _ids(self, tiles: Tensor) -> Tensor:
        """Ids (N,) of tiles (N, channels, h, w)."""
        with torch.backends.cudnn.flags(allow_tf32=False):
            latents, codes = self._encode_tiles(self.model, tiles), self.model.quantize.embedding.weight
            distances, nearest = squared_distances(latents, codes).topk(2, largest=False)
            ids = nearest[:, 0].clone()
            scale = latents.square().sum(1) + codes.square().sum(1).max()
            unsure = distances[:, 1] - distances[:, 0] < SURE * scale
            if unsure.any():
                latents = encode_tiles(self._exact, tiles[unsure].double())
                ids[unsure] = squared_distances(latents, self._exact.quantize.embedding.weight).argmin(1)
        return ids

    @torch.inference_mode()
    def decode(self, grids: Sequence[NDArray[np.integer]]) -> list[Image.Image]:
        """RGB pictures, `downsample` times as large as the grids.

        Raises:
            QuantizerError: if an id is outside the codebook or a grid is not two-dimensional.
        """
        pictures = []
        for ids in checked_ids(grids, self.codebook_size, self.name):
            codes = self.model.quantize.embedding(ids.to(self.model.device))
            pixels = decode_codes(self.model, codes[None])[0]
            array = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
            pictures.append(Image.fromarray(array))
        return pictures

    def save_pretrained(self, folder: Path) -> None:
        """Write `config.json` and weights as diffusers does, in float16, and `manifest.json`."""
        half = VQModel.from_config(self.model.config)
        half.load_state_dict(self.model.state_dict())
        half.half().save_pretrained(folder)
        fields = {"name": self.name, "size": self.size, "fingerprint": self.fingerprint, "fit": self.fit}
        write_manifest(Path(folder), "quantizer", fields)

    @classmethod
    def load(cls, checkpoint: Checkpoint, device: str = "cpu") -> Self:
        """Load what `save_pretrained` wrote."""
        model = VQModel.from_config(checkpoint.config)
        model.load_state_dict(checkpoint.tensors)
        fields = checkpoint.manifest
        return cls(model, fields["name"], fields["size"], device, aspect=fields["fit"] == FIT_ASPECT)


def new_model(codebook_size: int, code_dim: int, tile: int, width: int, layers: int = 0) -> VQModel:
    """An untrained `VQModel` for tiles of `tile` pixels on a side, all folded into channels.

    Encoder and decoder have `3 + layers` residual blocks each.

    The decoder's norms are conditioned on the codes (`norm_type="spatial"`, as in MoVQ): plain group norms over
    the whole picture lose its contrast, which costs such a small decoder 2 to 3 dB.
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
    folded = model.decode(codes.permute(0, 3, 1, 2), force_not_quantize=True).sample
    return F.pixel_shuffle(folded, tile_side(model))


def trained_parameters(model: VQModel) -> Iterable[Tensor]:
    """All parameters but the codebook."""
    return (p for name, p in model.named_parameters() if not name.startswith("quantize."))
