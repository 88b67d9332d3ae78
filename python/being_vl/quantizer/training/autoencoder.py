"""Images through encoder, codebook and decoder, while these learn."""

from typing import NamedTuple

import torch
from diffusers import VQModel
from torch import Tensor
from torch.nn import functional as F

from being_vl.quantizer.models.tiled import cut_tiles, decode_codes, encode_tiles, tile_side
from being_vl.quantizer.training.codebook import Codebook


class ForwardPass(NamedTuple):
    """What the networks make of images (n, 3, side, side), and the tensors on the way.

    Args:
        reconstructions: The images, decoded.
        error: `reconstructions` minus the images, by how much each tile counts.
        latents: (N, D) of the tiles, equal ones of an image once.
        codes: (N, D), the codes nearest to them.
        ids: (N,), of the codes.
        weights: (N,), how much each counts; their sum is n.
        places: Which of the N each tile of the images is, (n * tiles).
    """

    reconstructions: Tensor
    error: Tensor
    latents: Tensor
    codes: Tensor
    ids: Tensor
    weights: Tensor
    places: Tensor


class Autoencoder:
    """A `VQModel` of tiles and its codebook, in training.

    Args:
        model: The networks.
        codebook: The codes.
        bfloat16: Compute in bfloat16, by autocast.
        learn_codes: Let codes have gradients.
        compile: Compile encoder and decoder, by torch.compile.
    """

    def __init__(
        self, model: VQModel, codebook: Codebook, bfloat16: bool, learn_codes: bool, compile: bool
    ) -> None:
        self.model, self.codebook = model, codebook
        self.bfloat16, self.learn_codes = bfloat16, learn_codes
        self._encode = torch.compile(encode_tiles, dynamic=True) if compile else encode_tiles
        self._decode = torch.compile(decode_codes) if compile else decode_codes

    def precision(self) -> torch.autocast:
        """The precision of the networks, for a `with` statement."""
        return torch.autocast(self.codebook.weight.device.type, torch.bfloat16, enabled=self.bfloat16)

    def __call__(self, images: Tensor, freeze_encoder: bool) -> ForwardPass:
        """Encode, quantize and decode images (n, 3, side, side).

        Args:
            images: Pixels of -1 to 1.
            freeze_encoder: Give gradients to nothing but the decoder.
        """
        # Tiles, those that are equal within an image once.
        all_tiles = cut_tiles(self.model, images)
        tiles_per_image = len(all_tiles) // len(images)
        image_of_tile = torch.arange(len(images), device=images.device).repeat_interleave(tiles_per_image)
        labelled_tiles = torch.cat([all_tiles.flatten(1), image_of_tile[:, None].to(all_tiles)], 1)
        tiles, places, counts = labelled_tiles.unique(dim=0, return_inverse=True, return_counts=True)
        # Each image counts 1, whichever number of different tiles it has.
        image_of_tile = tiles[:, -1].long()
        weights = 1 / torch.bincount(image_of_tile, minlength=len(images))[image_of_tile].float()
        # Encode, and take the nearest codes; gradients pass through them straight to the latents.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not freeze_encoder), self.precision():
            latents = self._encode(self.model, tiles[:, :-1, None, None]).float()
        ids = self.codebook.find_nearest_codes(latents.detach())
        has_code_gradients = self.learn_codes and not freeze_encoder
        codes = self.model.quantize.embedding(ids) if has_code_gradients else self.codebook.weight[ids]
        quantized_latents = latents + (codes - latents).detach()
        # Decode whole images.
        tile = tile_side(self.model)
        side = images.shape[-1] // tile
        with self.precision():
            grids = quantized_latents[places].reshape(len(images), side, side, -1)
            reconstructions = self._decode(self.model, grids).float()
        # The error of equal tiles counts once, too.
        tile_weights = (tiles_per_image * weights / counts)[places].reshape(len(images), 1, side, side)
        error = (reconstructions - images) * F.interpolate(tile_weights, scale_factor=float(tile))
        return ForwardPass(reconstructions, error, latents, codes, ids, weights, places)
