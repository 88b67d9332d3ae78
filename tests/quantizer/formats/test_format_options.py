"""Published VQ models in every format: saved again, and with sizes, precision and preprocessing of one's choice."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Emu3ImageProcessor
from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from being_vl.errors import QuantizerError
from being_vl.quantizer.base import load_quantizer
from being_vl.quantizer.models.network import NetworkQuantizer
from being_vl.quantizer.preprocessing import Area, Crop, Pad, Preprocessing
from helpers.vq_models import every_format, pixel_values, put_on_white


def test_saved_and_loaded_again_it_is_the_same(
    images: list[Image.Image], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    for folder in every_format(tmp_path, request):
        for size in (None, 24):
            quantizer = load_quantizer(folder, size=size, aspect=size is not None)
            quantizer.save_pretrained(tmp_path / "saved" / f"{folder.name}{size}")
            quantizer_copy = load_quantizer(tmp_path / "saved" / f"{folder.name}{size}")
            assert (quantizer_copy.name, quantizer_copy.fingerprint) == (folder.name, quantizer.fingerprint)
            grids = quantizer.encode(images)
            for a, b in zip(grids, quantizer_copy.encode(images), strict=True):
                np.testing.assert_array_equal(a, b)
            if folder.name != "chameleon":
                for a, b in zip(quantizer.decode(grids), quantizer_copy.decode(grids), strict=True):
                    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_sizes_of_ones_own_and_in_the_images_proportions(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    wide_image, tall_image, thread_image = (
        Image.new("RGB", size) for size in ((200, 100), (30, 60), (1, 5000))
    )
    for folder in every_format(tmp_path, request):
        quantizer = load_quantizer(folder)
        side = quantizer.downsample
        if folder.name != "emu3":
            assert load_quantizer(f"{folder}@64").encode([wide_image])[0].shape == (64 // side, 64 // side)
            with pytest.raises(QuantizerError, match=rf"size is 30; expected a positive multiple of {side}"):
                load_quantizer(folder, size=30)
        aspect_quantizer = load_quantizer(f"{folder}@64:aspect")
        assert (
            aspect_quantizer.fingerprint
            == load_quantizer(folder, size=64, aspect=True).fingerprint
            != quantizer.fingerprint
        )
        for image, ratio in ((wide_image, 0.5), (tall_image, 2.0)):
            (grid,) = aspect_quantizer.encode([image])
            assert grid.shape[0] / grid.shape[1] == pytest.approx(ratio, rel=0.15)
            assert grid.size == pytest.approx((64 / side) ** 2, rel=0.15)
        height, width = aspect_quantizer.encode([thread_image])[0].shape
        assert height > 50 * width


def test_bfloat16_has_a_fingerprint_of_its_own(
    images: list[Image.Image], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    for folder in every_format(tmp_path, request):
        published_quantizer = load_quantizer(folder)
        bfloat16_quantizer = load_quantizer(f"{folder}@64:aspect:bfloat16")
        bfloat16_copy = load_quantizer(folder, size=64, aspect=True, precision="bfloat16")
        float32_quantizer = load_quantizer(folder, size=64, aspect=True)
        assert (
            len(
                {
                    any_quantizer.fingerprint
                    for any_quantizer in (published_quantizer, bfloat16_quantizer, float32_quantizer)
                }
            )
            == 3
        )
        assert bfloat16_quantizer.fingerprint == bfloat16_copy.fingerprint
        float32_ids, bfloat16_ids, copy_ids = (
            np.concatenate([grid.ravel() for grid in each.encode(images)])
            for each in (float32_quantizer, bfloat16_quantizer, bfloat16_copy)
        )
        np.testing.assert_array_equal(bfloat16_ids, copy_ids)
        assert 0 < (float32_ids != bfloat16_ids).mean() < 0.5
        bfloat16_quantizer.save_pretrained(tmp_path / "saved" / folder.name)
        assert load_quantizer(tmp_path / "saved" / folder.name).fingerprint == float32_quantizer.fingerprint


def test_a_compiled_encoder_gives_the_same_ids(
    images: list[Image.Image],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    folder = next(every_format(tmp_path, request))
    quantizer, compiled_quantizer = load_quantizer(f"{folder}@32"), load_quantizer(f"{folder}@32")
    compiled_quantizer.compile()
    for a, b in zip(quantizer.encode(images), compiled_quantizer.encode(images), strict=True):
        assert (a != b).mean() < 0.01


def test_pixels_are_those_of_the_image_processors(images: list[Image.Image]) -> None:
    """At the models' own options, on images larger and smaller than the size."""
    ones, halves = (1.0, 1.0, 1.0), (0.5, 0.5, 0.5)
    cases = [
        (ChameleonImageProcessorPil(), Preprocessing(Crop(512, truncate=True), 0.0078, ones, ones)),
        (
            JanusImageProcessorPil(image_mean=list(halves), image_std=list(halves)),
            Preprocessing(Pad(384, (127, 127, 127), 14)),
        ),
        (
            Emu3ImageProcessor(image_mean=halves, image_std=halves),
            Preprocessing(Area(8, 512**2, 1024**2)),
        ),
    ]
    large_image = images[4].resize((1301, 873), Image.Resampling.BICUBIC)
    for processor, preprocessing in cases:
        for image in [*images, large_image]:
            opaque_image = put_on_white(image.convert("RGBA"))
            expected = np.asarray(processor(opaque_image, return_tensors="np").pixel_values[0])
            np.testing.assert_array_equal(pixel_values(preprocessing, image), expected)


def test_without_a_file_of_options_the_preprocessing_is_the_published_one(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    ones = (1.0, 1.0, 1.0)
    expected = {
        "chameleon": Preprocessing(Crop(512, truncate=True), 0.0078, ones, ones),
        "taming": Preprocessing(Crop(256)),
        "janus": Preprocessing(Pad(384, (127, 127, 127), 14)),
        "emu3": Preprocessing(Area(2, 512**2, 1024**2)),
    }
    for folder in every_format(tmp_path, request):
        for options in (folder / "preprocessor_config.json", folder / "vqgan.yaml"):
            options.unlink(missing_ok=True)
        quantizer = load_quantizer(folder)
        assert isinstance(quantizer, NetworkQuantizer)
        assert quantizer.preprocessing == expected[folder.name]
