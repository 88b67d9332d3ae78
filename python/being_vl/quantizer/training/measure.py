"""How well a quantizer in training gives back images that it is not trained on."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from being_vl.quantizer.training.autoencoder import Autoencoder
from being_vl.quantizer.training.crops import Crops
from being_vl.quantizer.training.losses import psnr, ssim

SHEET_IMAGES = 8
"""Held-out images of each folder that are drawn."""
GAP = 4


@dataclass(frozen=True)
class Measurement:
    """Quality of held-out images.

    Args:
        psnr: Mean PSNR of each folder, in dB.
        ssim: Mean SSIM of each folder.
        codes_used: Share of the codes that all of them use.
        sheets: Of each folder, some images above their reconstructions, (3, height, width) of -1 to 1.
    """

    psnr: dict[str, float]
    ssim: dict[str, float]
    codes_used: float
    sheets: dict[str, Tensor]


@torch.no_grad()
def measure(autoencoder: Autoencoder, crops: Crops) -> Measurement:
    """Encode and decode the middle squares of all held-out images."""
    weight = autoencoder.codebook.weight
    is_used = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
    psnr_of_folders: dict[str, float] = {}
    ssim_of_folders: dict[str, float] = {}
    sheets = {}
    for folder, images in crops.held_out_images.items():
        scores: list[tuple[Tensor, Tensor]] = []
        pairs: list[tuple[Tensor, Tensor]] = []
        for pixels in crops.middle_squares(images):
            forward = autoencoder(pixels.to(weight.device), freeze_encoder=True)
            is_used[forward.ids] = True
            reconstruction = forward.reconstructions.clamp(-1, 1)
            image = pixels.to(reconstruction)
            scores.append((psnr(reconstruction, image), ssim(reconstruction, image)))
            if len(pairs) < SHEET_IMAGES:
                pairs.append((pixels[0], reconstruction[0].cpu()))
        for means, values in zip((psnr_of_folders, ssim_of_folders), zip(*scores, strict=True), strict=True):
            means[folder] = round(float(torch.cat(values).mean()), 4)
        sheets[folder] = _draw_pairs(pairs)
    return Measurement(psnr_of_folders, ssim_of_folders, round(float(is_used.float().mean()), 4), sheets)


def _draw_pairs(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Images above their reconstructions, side by side on white."""
    max_width = max(image.shape[-1] for image, _ in pairs) + GAP
    cells = [
        torch.cat(
            [F.pad(x, (0, max_width - x.shape[-1], 0, max_width - x.shape[-2]), value=1) for x in pair], 1
        )
        for pair in pairs
    ]
    return torch.cat(cells, 2)


def stack_sheets(sheets: dict[str, Tensor]) -> NDArray[np.uint8]:
    """The sheets of all folders, one below the other: (height, width, 3)."""
    max_width = max(sheet.shape[-1] for sheet in sheets.values())
    rows = [F.pad(sheet, (0, max_width - sheet.shape[-1]), value=1) for sheet in sheets.values()]
    pixels: NDArray[np.uint8] = ((torch.cat(rows, 1).permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
    return pixels
