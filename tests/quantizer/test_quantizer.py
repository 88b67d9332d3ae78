"""The quantizer on diffusers' `VQModel`: what a user may rely on."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import VQModel
from PIL import Image

from being_vl.demo import shapesworld
from being_vl.errors import QuantizerError
from being_vl.files import MANIFEST
from being_vl.images.decode import read_image
from being_vl.quantizer.base import BUILTIN, Quantizer, load_quantizer
from being_vl.quantizer.models.tiled import (
    FLOAT64_MARGIN,
    VQGAN,
    cut_tiles,
    encode_tiles,
    squared_distances,
    to_tensor,
)
from helpers import tiny

PHOTOGRAPHS = sorted((Path(shapesworld.__file__).parent / "photographs").glob("*.jpg"))


@pytest.fixture(scope="module")
def builtin_quantizer() -> VQGAN:
    quantizer = load_quantizer("builtin")
    assert isinstance(quantizer, VQGAN)
    return quantizer


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    """ShapesWorld and photographs."""
    images = []
    for n in range(20):
        rng = np.random.default_rng([5, n])
        images.append(shapesworld.draw(shapesworld.sample_scene(rng, "held-out"), rng))
    return images + [read_image(path) for path in PHOTOGRAPHS]


def psnr(a: Image.Image, b: Image.Image) -> float:
    error = np.square(np.asarray(a, float) - np.asarray(b, float)).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def test_it_is_a_quantizer(builtin_quantizer: VQGAN, images: list[Image.Image]) -> None:
    assert isinstance(builtin_quantizer, Quantizer)
    assert (builtin_quantizer.name, builtin_quantizer.downsample, len(builtin_quantizer.fingerprint)) == (
        "builtin",
        8,
        64,
    )
    for grid in builtin_quantizer.encode(images):
        assert grid.shape == (8, 8)
        assert grid.dtype == np.int64
        assert grid.min() >= 0
        assert grid.max() < builtin_quantizer.codebook_size
    assert builtin_quantizer.encode([]) == []
    assert builtin_quantizer.decode([]) == []


def test_builtin_files_are_small() -> None:
    assert sum(file.stat().st_size for file in BUILTIN.iterdir()) <= 6_000_000


def test_builtin_reconstructs_shapes_and_photographs(
    builtin_quantizer: VQGAN, images: list[Image.Image]
) -> None:
    prepared_images = [builtin_quantizer.preprocessing.prepare(image) for image in images]
    reconstructions = builtin_quantizer.decode(builtin_quantizer.encode(images))
    quality = [psnr(a, b) for a, b in zip(prepared_images, reconstructions, strict=True)]
    assert np.mean(quality[:20]) > 27
    assert np.mean(quality[20:]) > 19
    large_quantizer = load_quantizer("builtin", size=256)
    reconstructions = large_quantizer.decode(large_quantizer.encode(images[20:]))
    assert np.mean([psnr(a, b) for a, b in zip(images[20:], reconstructions, strict=True)]) > 22
    grey_images = [
        Image.fromarray(np.full((64, 64, 3), np.asarray(a).mean(), np.uint8)) for a in prepared_images
    ]
    assert np.mean(quality) > 9 + np.mean(
        [psnr(a, b) for a, b in zip(prepared_images, grey_images, strict=True)]
    )


def test_ids_depend_neither_on_the_batch_nor_on_threads(
    builtin_quantizer: VQGAN, images: list[Image.Image]
) -> None:
    all_grids = builtin_quantizer.encode(images)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for size in (1, 7):
                parts = [builtin_quantizer.encode(images[n : n + size]) for n in range(0, len(images), size)]
                np.testing.assert_array_equal(np.concatenate(parts), all_grids)
    finally:
        torch.set_num_threads(threads)


def test_ids_are_those_of_float64(builtin_quantizer: VQGAN, images: list[Image.Image]) -> None:
    pixels = to_tensor(
        np.stack([np.asarray(builtin_quantizer.preprocessing.prepare(image)) for image in images])
    )
    tiles = cut_tiles(builtin_quantizer.model, pixels)
    float64_model = VQModel.from_config(builtin_quantizer.model.config)
    float64_model.load_state_dict(builtin_quantizer.model.state_dict())
    float64_model.double()
    with torch.no_grad():
        latents, codes = encode_tiles(float64_model, tiles.double()), float64_model.quantize.embedding.weight
        distances = squared_distances(latents, codes)
        float32_distances = squared_distances(
            encode_tiles(builtin_quantizer.model, tiles), builtin_quantizer.model.quantize.embedding.weight
        )
    np.testing.assert_array_equal(np.stack(builtin_quantizer.encode(images)).ravel(), distances.argmin(1))
    scale = latents.square().sum(1) + codes.square().sum(1).max()
    assert ((float32_distances - distances).abs() / scale[:, None]).max() < FLOAT64_MARGIN / 10


def test_a_compiled_encoder_gives_the_same_ids(
    builtin_quantizer: VQGAN, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    quantizer = load_quantizer("builtin")
    quantizer.compile()
    np.testing.assert_array_equal(quantizer.encode(images), builtin_quantizer.encode(images))


def test_it_computes_in_float32_alone(builtin_quantizer: VQGAN) -> None:
    assert builtin_quantizer.with_precision("float32") is builtin_quantizer
    with pytest.raises(QuantizerError, match="'builtin': computes in float32 alone, found bfloat16"):
        load_quantizer("builtin@128:bfloat16")


def test_equal_tiles_get_equal_ids_wherever_they_are(builtin_quantizer: VQGAN) -> None:
    rng = np.random.default_rng(0)
    thing = rng.integers(0, 256, (16, 16, 3), np.uint8)
    pixels_a, pixels_b = (np.full((64, 64, 3), level, np.uint8) for level in (40, 220))
    pixels_a[8:24, 16:32] = thing
    pixels_b[40:56, 0:16] = thing
    a, b = builtin_quantizer.encode([Image.fromarray(pixels_a), Image.fromarray(pixels_b)])
    np.testing.assert_array_equal(a[1:3, 2:4], b[5:7, 0:2])


def test_an_object_is_read_from_its_ids_alone(builtin_quantizer: VQGAN) -> None:
    """On a plain background, the ids of a lone object's cells tell its shape, colour, size and texture apart."""
    names_of_ids: dict[tuple[object, ...], set[tuple[str, ...]]] = {}
    for shape in shapesworld.SHAPES:
        for colour in shapesworld.COLOURS:
            for size in shapesworld.SIZES:
                for texture in shapesworld.TEXTURES:
                    thing = shapesworld.Thing(shape, colour, size, texture, 2, 3)
                    scene = shapesworld.Scene("dark", (thing,))
                    (grid,) = builtin_quantizer.encode([shapesworld.draw(scene, np.random.default_rng(0))])
                    ids = tuple(grid[2 : 2 + thing.cells, 3 : 3 + thing.cells].ravel().tolist())
                    names_of_ids.setdefault(ids, set()).add((shape, colour, size, texture))
    confusions = [names for names in names_of_ids.values() if len(names) > 1]
    assert len(confusions) <= 2, confusions


def test_any_size_that_tiles_divide(builtin_quantizer: VQGAN) -> None:
    image = read_image(PHOTOGRAPHS[0])
    large_quantizer = load_quantizer("builtin", size=256)
    (grid,) = large_quantizer.encode([image])
    assert grid.shape == (32, 32)
    assert (
        load_quantizer("builtin@256").fingerprint
        == large_quantizer.fingerprint
        != builtin_quantizer.fingerprint
    )
    (decoded_image,) = builtin_quantizer.decode([grid[:5, :7]])
    assert decoded_image.size == (56, 40)
    with pytest.raises(QuantizerError, match="size is 60; expected a positive multiple of 8"):
        load_quantizer("builtin@60")


def test_saved_and_loaded_it_gives_the_same_ids_and_pictures(
    builtin_quantizer: VQGAN, images: list[Image.Image], tmp_path: Path
) -> None:
    large_quantizer = load_quantizer("builtin", size=128)
    large_quantizer.save_pretrained(tmp_path / "q")
    quantizer_copy = load_quantizer(tmp_path / "q")
    assert (quantizer_copy.name, quantizer_copy.fingerprint) == (
        large_quantizer.name,
        large_quantizer.fingerprint,
    )
    for a, b in zip(large_quantizer.encode(images[-6:]), quantizer_copy.encode(images[-6:]), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.shape == (16, 16)
    grids = builtin_quantizer.encode(images[:2])
    for a, b in zip(builtin_quantizer.decode(grids), quantizer_copy.decode(grids), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    # Plain diffusers can read it too.
    assert VQModel.from_pretrained(tmp_path / "q").config.vq_embed_dim == 24


def test_the_fingerprint_follows_what_decides_ids_and_nothing_else(tmp_path: Path) -> None:
    quantizer = tiny.quantizer(tmp_path / "q")
    assert tiny.quantizer(tmp_path / "same").fingerprint == quantizer.fingerprint
    assert tiny.quantizer(tmp_path / "named", name="other").fingerprint == quantizer.fingerprint
    assert tiny.quantizer(tmp_path / "seeded", seed=1).fingerprint != quantizer.fingerprint

    def change_parameter(name: str) -> str:
        model = VQModel.from_config(quantizer.model.config)
        model.load_state_dict(quantizer.model.state_dict())
        model.get_parameter(name).data.view(-1)[0] += 1
        return VQGAN(model, "tiny", 32).fingerprint

    assert change_parameter("quantize.embedding.weight") != quantizer.fingerprint
    assert change_parameter("encoder.conv_in.weight") != quantizer.fingerprint
    assert change_parameter("decoder.conv_in.weight") == quantizer.fingerprint


def test_bad_grids_are_refused(builtin_quantizer: VQGAN) -> None:
    grid = np.zeros((2, 2), np.int64)
    with pytest.raises(
        QuantizerError, match=rf"grid 1: ids from 0 to {builtin_quantizer.codebook_size};.*'builtin'"
    ):
        builtin_quantizer.decode([grid, grid + np.array([0, builtin_quantizer.codebook_size])])
    with pytest.raises(QuantizerError, match="grid 0: ids from -1"):
        builtin_quantizer.decode([grid - 1])
    with pytest.raises(QuantizerError, match=r"grid 0: expected shape \(height, width\), found \(2, 2, 1\)"):
        builtin_quantizer.decode([grid[..., None]])


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    tiny.quantizer(tmp_path / "q")
    with pytest.raises(QuantizerError, match=r"nowhere: there is no such folder.*expected 'builtin'"):
        load_quantizer(tmp_path / "nowhere")

    def damage(name: str, content: bytes | None) -> Path:
        folder = shutil.copytree(tmp_path / "q", tmp_path / "copy", dirs_exist_ok=True)
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
        return folder

    weights = "diffusion_pytorch_model.safetensors"
    for name, content in ((weights, None), (weights, b"junk"), ("config.json", b"{"), ("config.json", b"{}")):
        with pytest.raises(QuantizerError, match=r"copy: (the quantizer cannot be loaded|holds no weights)"):
            load_quantizer(damage(name, content))
    manifest = json.loads((tmp_path / "q" / MANIFEST).read_text()) | {"fingerprint": "ab" * 32}
    with pytest.raises(QuantizerError, match=r"manifest says .tiny. \(abababababab"):
        load_quantizer(damage(MANIFEST, json.dumps(manifest).encode()))
