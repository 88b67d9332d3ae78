"""The losses and measures of a quantizer in training."""

from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from being_vl.errors import ConfigError
from being_vl.options import StrPath

VGG16_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class Discriminator(nn.Sequential):
    """A patch discriminator: a score for each patch of about 22 pixels, (n, 3, h, w) → (n, 1, h', w').

    Scores of real images are to be above 1, those of reconstructions below -1.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__(
            nn.Conv2d(3, width, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1),
            nn.GroupNorm(8, 2 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 2 * width, 3, 1, 1),
            nn.GroupNorm(8, 2 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 1, 3, 1, 1),
        )


class Perceptual(nn.Module):
    """LPIPS (Zhang et al., 2018): how far apart images are in the features of a VGG16 that was trained on ImageNet.

    Args:
        vgg: torchvision's weights of VGG16 (`features.0.weight`, …), `.pth` or `.safetensors`.
        heads: LPIPS's weights of the features (`lin0.model.1.weight`, …); without them all weigh the same.

    Raises:
        ConfigError: if a file holds something else.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, vgg: StrPath, heads: StrPath | None = None) -> None:
        super().__init__()
        # VGG16's convolutions, in blocks that end before each pooling, by their numbers in torchvision's `features`.
        self.blocks = nn.ModuleList()
        convolutions: dict[str, nn.Module] = {}
        width, number = 3, 0
        for widths in VGG16_WIDTHS:
            block = nn.Sequential()
            if number:
                block.append(nn.MaxPool2d(2))
                number += 1
            for channels_in, channels_out in pairwise((width, *widths)):
                convolution = nn.Conv2d(channels_in, channels_out, 3, padding=1)
                convolutions[str(number)] = convolution
                block.extend([convolution, nn.ReLU()])
                number += 2
            width = widths[-1]
            self.blocks.append(block)
        _load_weights(nn.ModuleDict(convolutions), Path(vgg), "features.", "torchvision's weights of VGG16")
        self.heads = nn.ParameterDict(
            {
                f"lin{n}/model/1/weight": torch.full((1, w[-1], 1, 1), 1 / w[-1])
                for n, w in enumerate(VGG16_WIDTHS)
            }
        )
        if heads is not None:
            _load_weights(self.heads, Path(heads), "", "LPIPS's weights for VGG16")
        # ImageNet's means and deviations, for pixels of -1 to 1.
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])
        self.requires_grad_(False)

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """Distances (n,) of images (n, 3, h, w) of -1 to 1, at least 16 pixels on a side."""
        a, b = ((x - self.shift) / self.scale for x in (images, references))
        total = torch.zeros(len(images), device=images.device)
        for block, head in zip(self.blocks, self.heads.values(), strict=True):
            a, b = block(a), block(b)
            difference = (_normalize(a) - _normalize(b)).square()
            total = total + (difference * head).sum(1).mean((1, 2))
        return total


def _normalize(features: Tensor) -> Tensor:
    """Features (n, channels, h, w), scaled to length 1 at each place."""
    features = features.float()
    return features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)


def _load_weights(module: nn.Module, path: Path, prefix: str, description: str) -> None:
    """Load the weights of `module` from a file that may hold others, too; `description` names them in an error."""
    try:
        content = (
            load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        )
        keys = {name: prefix + name.replace("/", ".") for name in module.state_dict()}
        module.load_state_dict({name: content[key] for name, key in keys.items()})
    except Exception as error:
        raise ConfigError(f"{path}: expected {description} ({type(error).__name__}: {error})") from error


def edge_loss(error: Tensor) -> Tensor:
    """Mean absolute difference between the errors of neighbours, of pixels and of means of 2×2 pixels."""
    loss = torch.zeros((), device=error.device)
    for _ in range(2):
        loss = loss + error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        error = F.avg_pool2d(error, 2)
    return loss / 2


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """PSNR (n,) of images (n, 3, h, w) of -1 to 1, in dB."""
    errors = ((images - references) / 2).square().mean((1, 2, 3))
    return -10 * errors.clamp(min=1e-10).log10()


def ssim(images: Tensor, references: Tensor) -> Tensor:
    """Structural similarity (n,) of images (n, 3, h, w) of -1 to 1, at least 11 pixels on a side.

    As Wang et al. (2004) have it: a Gaussian window of 11×11 pixels with σ = 1.5, K = 0.01 and 0.03, without borders;
    of each colour, then the mean.
    """
    offsets = torch.arange(11, device=images.device, dtype=torch.float64) - 5
    gauss = (-offsets.square() / (2 * 1.5**2)).exp()
    window = torch.outer(gauss, gauss) / gauss.sum() ** 2

    def mean(values: Tensor) -> Tensor:
        return F.conv2d(values.flatten(0, 1)[:, None], window[None, None].to(values))

    a, b = (images.double() + 1) / 2, (references.double() + 1) / 2
    mean_a, mean_b = mean(a), mean(b)
    variances = mean(a * a) - mean_a**2 + mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    similarity = (2 * mean_a * mean_b + 0.01**2) * (2 * covariance + 0.03**2)
    similarity = similarity / ((mean_a**2 + mean_b**2 + 0.01**2) * (variances + 0.03**2))
    return similarity.reshape(len(images), -1).mean(1).float()
