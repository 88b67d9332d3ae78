"""What the tests of a quantizer's training share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from being_vl.quantizer.training.losses import VGG16_WIDTHS


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Sums of floats depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Files of random weights: torchvision's VGG16, with its classifier, and LPIPS's heads."""
    folder = tmp_path_factory.mktemp("vgg")
    torch.manual_seed(0)
    weights, number, channels = {"classifier.0.weight": torch.zeros(1)}, 0, 3
    for widths in VGG16_WIDTHS:
        for width in widths:
            weights[f"features.{number}.weight"] = (
                torch.randn(width, channels, 3, 3) * (2 / (9 * channels)) ** 0.5
            )
            weights[f"features.{number}.bias"] = torch.randn(width) * 0.1
            number, channels = number + 2, width
        number += 1
    torch.save(weights, folder / "vgg16.pth")
    torch.save(
        {f"lin{n}.model.1.weight": torch.rand(1, widths[-1], 1, 1) for n, widths in enumerate(VGG16_WIDTHS)},
        folder / "heads.pth",
    )
    return folder / "vgg16.pth", folder / "heads.pth"
