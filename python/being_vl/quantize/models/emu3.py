"""Emu3's tokenizer, as transformers' `Emu3VQVAE`."""

from pathlib import Path

from torch import Tensor
from transformers import Emu3VQVAE

from being_vl.quantize.models.network import NetworkQuantizer
from being_vl.quantize.preprocessing import Preprocessing


class Emu3Quantizer(NetworkQuantizer):
    """A `Quantizer` on transformers' `Emu3VQVAE`; see `NetworkQuantizer`."""

    model: Emu3VQVAE

    def __init__(
        self, model: Emu3VQVAE, name: str, preprocessing: Preprocessing, device: str = "cpu"
    ) -> None:
        super().__init__(model, name, preprocessing, model.spatial_scale_factor, device)

    @property
    def codebook(self) -> Tensor:
        """(codes, dimension)."""
        codes: Tensor = self.model.quantize.embedding.weight
        return codes

    def _latents(self, pixels: Tensor) -> Tensor:
        frames = self.model.config.temporal_downsample_factor
        hidden = self.model.encoder(pixels[:, None].expand(-1, frames, -1, -1, -1))
        latents: Tensor = self.model.quant_conv(hidden.permute(0, 2, 1, 3, 4))[0, :, 0]
        return latents

    def _pixels(self, ids: Tensor) -> Tensor:
        pixels: Tensor = self.model.decode(ids)
        return pixels

    def _save_model(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
