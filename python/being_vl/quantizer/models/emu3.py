"""Emu3's tokenizer, as transformers' `Emu3VQVAE`."""

from torch import Tensor
from transformers import Emu3VQVAE

from being_vl.quantizer.models.whole_image import WholeImageQuantizer
from being_vl.quantizer.preprocessing import Preprocessing


class Emu3Quantizer(WholeImageQuantizer):
    """A `Quantizer` on transformers' `Emu3VQVAE`; see `WholeImageQuantizer`."""

    model: Emu3VQVAE

    def __init__(
        self, model: Emu3VQVAE, name: str, preprocessing: Preprocessing, device: str = "cpu"
    ) -> None:
        super().__init__(model, name, preprocessing, model.spatial_scale_factor, device)

    def _latents(self, pixels: Tensor) -> Tensor:
        frames = self.model.config.temporal_downsample_factor
        hidden = self.model.encoder(pixels[:, None].expand(-1, frames, -1, -1, -1))
        latents: Tensor = self.model.quant_conv(hidden.permute(0, 2, 1, 3, 4))[0, :, 0]
        return latents

    def _pixels(self, ids: Tensor) -> Tensor:
        pixels: Tensor = self.model.decode(ids)
        return pixels
