"""The losses of a quantizer's training, against their definitions."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from being_vl.errors import ConfigError
from being_vl.quantizer.training.losses import Perceptual, edge_loss, psnr, ssim

pytestmark = pytest.mark.usefixtures("one_thread")


def test_edge_loss_sees_edges_and_no_constant_shift() -> None:
    flat_error, edge_error = torch.full((1, 3, 16, 16), 0.3), torch.zeros(1, 3, 16, 16)
    edge_error[..., 8:] = 1
    assert edge_loss(flat_error) == 0
    assert edge_loss(edge_error) > 0.05


def test_ssim_is_that_of_its_definition() -> None:
    rng = np.random.default_rng(0)
    a = np.clip(rng.normal(0, 0.4, (3, 17, 14)), -1, 1)
    b = np.clip(a + rng.normal(0, 0.2, a.shape), -1, 1)
    bell = np.exp(-(np.arange(-5, 6) ** 2) / 4.5)
    window = np.outer(bell, bell) / bell.sum() ** 2
    values = []
    for x, y in zip((a + 1) / 2, (b + 1) / 2, strict=True):
        for row in range(17 - 10):
            for column in range(14 - 10):
                p, q = (z[row : row + 11, column : column + 11] for z in (x, y))
                mean_p, mean_q = (window * p).sum(), (window * q).sum()
                var_p, var_q = (window * (p - mean_p) ** 2).sum(), (window * (q - mean_q) ** 2).sum()
                covariance = (window * (p - mean_p) * (q - mean_q)).sum()
                values.append(
                    (2 * mean_p * mean_q + 1e-4)
                    * (2 * covariance + 9e-4)
                    / ((mean_p**2 + mean_q**2 + 1e-4) * (var_p + var_q + 9e-4))
                )
    images, references = (torch.from_numpy(x)[None].float() for x in (a, b))
    assert float(ssim(images, references)) == pytest.approx(np.mean(values), abs=1e-5)
    assert float(ssim(images, images)) == pytest.approx(1)
    assert float(psnr(images, references)) == pytest.approx(
        -10 * np.log10(((a - b) ** 2 / 4).mean()), abs=1e-3
    )


def test_the_perceptual_loss_is_lpips(vgg: tuple[Path, Path]) -> None:
    """As the paper has it, layer by layer, under the numbers of torchvision's `features`."""
    weights, heads = (torch.load(path) for path in vgg)
    images, references = torch.rand(2, 2, 3, 32, 24) * 2 - 1

    def features(x: torch.Tensor) -> list[torch.Tensor]:
        x = x - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
        x = x / torch.tensor([0.458, 0.448, 0.450])[:, None, None]
        blocks = []
        for number in range(30):
            if number in (4, 9, 16, 23):
                x = F.max_pool2d(x, 2)
            elif f"features.{number}.weight" in weights:
                kernel, bias = weights[f"features.{number}.weight"], weights[f"features.{number}.bias"]
                x = F.conv2d(x, kernel, bias, padding=1).relu()
            if number in (3, 8, 15, 22, 29):
                blocks.append(F.normalize(x, dim=1))
        return blocks

    definition = sum(
        ((a - b) ** 2 * heads[f"lin{n}.model.1.weight"]).sum(1).mean((1, 2))
        for n, (a, b) in enumerate(zip(features(images), features(references), strict=True))
    )
    perceptual = Perceptual(*vgg)
    torch.testing.assert_close(perceptual(images, references), definition)
    assert perceptual(images, images).abs().max() == 0
    even_distances = Perceptual(vgg[0])(images, references)
    assert (even_distances > 0).all()
    with pytest.raises(ConfigError, match=r"heads\.pth: expected torchvision's weights of VGG16 \(KeyError"):
        Perceptual(vgg[1])
    with pytest.raises(ConfigError, match=r"nothing\.pth: expected torchvision's weights"):
        Perceptual(Path("nothing.pth"))
