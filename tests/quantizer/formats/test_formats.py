"""Published VQ models: small random ones, saved as the real ones are, against the libraries' own classes."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import VQModel
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import Emu3VQVAE, JanusVQVAE

from being_vl.errors import QuantizerError
from being_vl.quantizer.base import Quantizer, load_quantizer
from being_vl.quantizer.models.network import NetworkQuantizer
from helpers.vq_models import (
    CODES,
    SIZE,
    Callback,
    chameleon_processor,
    emu3_processor,
    janus_processor,
    llamagen_names,
    pixel_values,
    put_on_white,
    reverse_levels,
    save_chameleon,
    save_taming,
    spread_codes,
    to_uint8,
)


@torch.no_grad()
def find_ids(latents: Tensor, codebook: Tensor) -> NDArray[np.int64]:
    """The definition: (D, h, w) → ids of the nearest codes, in float64."""
    _, height, width = latents.shape
    ids = torch.cdist(latents.flatten(1).T.double(), codebook.double()).argmin(1)
    return ids.reshape(height, width).numpy()


@torch.no_grad()
def check_decode(quantizer: Quantizer, model: JanusVQVAE, grids: list[NDArray[np.int64]]) -> None:
    """Images are those of the model's decoder on its own codes, whatever else is decoded."""
    for grid, image in zip(grids, quantizer.decode(grids), strict=True):
        codes = model.quantize.embedding(torch.from_numpy(grid))
        if quantizer.name.startswith(("janus", "vq_ds16")):
            codes = F.normalize(codes, dim=-1)
        pixels = model.decoder(model.post_quant_conv(codes.permute(2, 0, 1)[None]))[0]
        difference = np.asarray(image).astype(int) - to_uint8(pixels).astype(int)
        assert abs(difference).max() <= 1  # where two ways of summing round a grey level differently
        np.testing.assert_array_equal(np.asarray(image), np.asarray(quantizer.decode([grid])[0]))


def test_chameleon_gives_the_ids_of_transformers_class_and_processor(
    chameleon: JanusVQVAE, images: list[Image.Image], tmp_path: Path
) -> None:
    published_model = save_chameleon(tmp_path / "being-vq-8k", chameleon)
    quantizer = load_quantizer(tmp_path / "being-vq-8k")
    assert isinstance(quantizer, Quantizer)
    assert (quantizer.name, quantizer.codebook_size, quantizer.downsample) == ("being-vq-8k", CODES, 4)
    grids = quantizer.encode(images)
    for image, grid in zip(images, grids, strict=True):
        pixels = chameleon_processor()(image, return_tensors="pt").pixel_values
        with torch.no_grad():
            expected = published_model.encode(pixels).image_tokens
        np.testing.assert_array_equal(grid.ravel(), expected)
        assert (grid.shape, grid.dtype) == ((8, 8), np.int64)
    assert len(np.unique(grids)) > 20
    with pytest.raises(QuantizerError, match=r"'being-vq-8k': its weights hold no decoder.*vqgan\.ckpt"):
        quantizer.decode(grids)


def test_chameleon_decodes_with_metas_checkpoint_or_a_converted_decoder(
    chameleon: JanusVQVAE, images: list[Image.Image], tmp_path: Path
) -> None:
    save_chameleon(tmp_path / "q", chameleon)
    quantizer_without_decoder = load_quantizer(tmp_path / "q")
    grids = quantizer_without_decoder.encode(images)

    save_taming(tmp_path / "q", chameleon.state_dict())
    quantizer_with_decoder = load_quantizer(tmp_path / "q")
    check_decode(quantizer_with_decoder, chameleon, grids)

    tensors = {name: tensor.contiguous() for name, tensor in chameleon.state_dict().items()}
    (tmp_path / "q" / "vqgan.ckpt").unlink()
    save_file(tensors, tmp_path / "q" / "model.safetensors")
    check_decode(load_quantizer(tmp_path / "q"), chameleon, grids)
    assert (
        quantizer_with_decoder.fingerprint
        == quantizer_without_decoder.fingerprint
        == load_quantizer(tmp_path / "q").fingerprint
    )

    save_chameleon(tmp_path / "q", chameleon)
    other_tensors = chameleon.state_dict() | {"quantize.embedding.weight": torch.zeros(CODES, 8)}
    save_taming(tmp_path / "q", other_tensors)
    with pytest.raises(QuantizerError, match=r"vqgan\.ckpt: its codebook is not that of the weights beside"):
        load_quantizer(tmp_path / "q")


def test_chameleon_inside_the_whole_language_model(
    chameleon: JanusVQVAE, images: list[Image.Image], tmp_path: Path
) -> None:
    save_chameleon(tmp_path / "vq", chameleon)
    folder = tmp_path / "chameleon-7b"
    folder.mkdir()
    chameleon_processor().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "chameleon", "vq_config": {}}))
    names = [name for name in chameleon.state_dict() if not name.startswith("decoder.")]
    for n in range(2):
        part = {f"model.vqmodel.{name}": chameleon.state_dict()[name].contiguous() for name in names[n::2]}
        save_file(part | {f"model.layers.{n}.weight": torch.zeros(2)}, folder / f"model-{n}.safetensors")
    a, b = load_quantizer(folder), load_quantizer(tmp_path / "vq")
    assert a.fingerprint == b.fingerprint
    np.testing.assert_array_equal(a.encode(images), b.encode(images))


@pytest.mark.parametrize("architecture", ["taming", "chameleon"])
def test_original_checkpoints_of_taming_and_of_meta(
    architecture: str, images: list[Image.Image], tmp_path: Path, request: pytest.FixtureRequest, capsys: Any
) -> None:
    model: JanusVQVAE = request.getfixturevalue(architecture)
    quantizer = load_quantizer(save_taming(tmp_path / "tokenizer", model.state_dict()))
    assert "this must not run" not in capsys.readouterr().out
    grids = quantizer.encode(images)
    for image, grid in zip(images, grids, strict=True):
        # As in Meta's image_tokenizer.py and in taming's notebook.
        rgb = image.convert("RGB") if image.mode != "RGBA" else put_on_white(image)
        scale = SIZE / min(rgb.size)
        rgb = rgb.resize((round(scale * rgb.width), round(scale * rgb.height)), Image.Resampling.LANCZOS)
        left, top = (rgb.width - SIZE) // 2, (rgb.height - SIZE) // 2
        pixels = np.asarray(rgb.crop((left, top, left + SIZE, top + SIZE))) / 255 * 2 - 1
        with torch.no_grad():
            reference = model.encode(torch.from_numpy(pixels).float().permute(2, 0, 1)[None])
        np.testing.assert_array_equal(grid.ravel(), reference.image_tokens)
    check_decode(quantizer, model, grids)


def test_checkpoints_from_before_torch_1_6(taming: JanusVQVAE, tmp_path: Path) -> None:
    state = reverse_levels(taming.state_dict())
    for name, is_zip in (("old", False), ("new", True)):
        torch.save({"state_dict": state}, tmp_path / f"{name}.ckpt", _use_new_zipfile_serialization=is_zip)
    old_quantizer, new_quantizer = (load_quantizer(tmp_path / f"{name}.ckpt") for name in ("old", "new"))
    assert (old_quantizer.name, old_quantizer.fingerprint) == ("old", new_quantizer.fingerprint)


def test_a_folder_of_logs_as_taming_published_them(taming: JanusVQVAE, tmp_path: Path) -> None:
    folder = tmp_path / "vqgan_imagenet_f16_16384"
    save_taming(folder / "checkpoints", taming.state_dict(), resolution=64, name="last.ckpt")
    (folder / "configs").mkdir()
    (folder / "checkpoints" / "vqgan.yaml").rename(folder / "configs" / "model.yaml")
    folder_quantizer, file_quantizer = (
        load_quantizer(folder),
        load_quantizer(folder / "checkpoints" / "last.ckpt"),
    )
    for quantizer in (folder_quantizer, file_quantizer):
        assert quantizer.encode([Image.new("RGB", (9, 9))])[0].shape == (16, 16)
    assert folder_quantizer.fingerprint == file_quantizer.fingerprint
    assert folder_quantizer.name == "vqgan_imagenet_f16_16384"


def upstream_janus_ids(model: JanusVQVAE, pixels: Tensor) -> NDArray[np.int64]:
    """As LlamaGen does it: latents and codes are compared at length 1."""
    with torch.no_grad():
        latents = F.normalize(model.quant_conv(model.encoder(pixels))[0], dim=0)
    return find_ids(latents, F.normalize(model.quantize.embedding.weight.detach(), dim=-1))


def test_janus_gives_the_original_ids_which_transformers_class_does_not(
    taming: JanusVQVAE, images: list[Image.Image], tmp_path: Path
) -> None:
    taming.save_pretrained(tmp_path / "janus")
    janus_processor().save_pretrained(tmp_path / "janus")
    quantizer = load_quantizer(tmp_path / "janus")
    grids = quantizer.encode(images)
    num_differences = 0
    for image, grid in zip(images, grids, strict=True):
        pixels = janus_processor()(put_on_white(image.convert("RGBA")), return_tensors="pt").pixel_values
        np.testing.assert_array_equal(grid, upstream_janus_ids(taming, pixels))
        with torch.no_grad():
            num_differences += int((taming.encode(pixels).image_tokens.numpy() != grid.ravel()).sum())
    assert num_differences > 0
    check_decode(quantizer, taming, grids)

    unit_model = JanusVQVAE(taming.config).eval()
    unit_model.load_state_dict(taming.state_dict())
    unit_model.quantize.embedding.weight.data = F.normalize(unit_model.quantize.embedding.weight.data, dim=-1)
    pixels = janus_processor()(images[0], return_tensors="pt").pixel_values
    with torch.no_grad():  # codes of length 1, where both give the same
        np.testing.assert_array_equal(unit_model.encode(pixels).image_tokens, grids[0].ravel())


def test_llamagens_files_and_the_original_janus(
    taming: JanusVQVAE, images: list[Image.Image], tmp_path: Path
) -> None:
    state = llamagen_names(taming.state_dict()) | {"quantize.codebook_used": torch.zeros(8)}
    assert "encoder.conv_blocks.0.res.0.conv1.weight" in state
    torch.save({"model": state, "optimizer": {}, "steps": 1}, tmp_path / "vq_ds16_c2i.pt")
    quantizer = load_quantizer(tmp_path / "vq_ds16_c2i.pt", size=SIZE)
    grids = quantizer.encode(images[3:])
    for image, grid in zip(images[3:], grids, strict=True):
        small_image = image
        while min(small_image.size) >= 2 * SIZE:
            small_image = small_image.resize(
                (small_image.width // 2, small_image.height // 2), Image.Resampling.BOX
            )
        scale = SIZE / min(small_image.size)
        fitted_image = small_image.resize(
            (round(small_image.width * scale), round(small_image.height * scale)), Image.Resampling.BICUBIC
        )
        left, top = (fitted_image.width - SIZE) // 2, (fitted_image.height - SIZE) // 2
        crop = np.asarray(fitted_image)[top : top + SIZE, left : left + SIZE]
        pixels = torch.from_numpy(2.0 * (crop / 255.0) - 1.0).float().permute(2, 0, 1)[None]
        np.testing.assert_array_equal(grid, upstream_janus_ids(taming, pixels))
    check_decode(quantizer, taming, grids)
    assert load_quantizer(tmp_path / "vq_ds16_c2i.pt").encode(images[:1])[0].shape == (64, 64)

    original_folder, converted_folder = tmp_path / "janus-pro", tmp_path / "janus-hf"
    original_folder.mkdir()
    torch.save(
        {f"gen_vision_model.{name}": tensor for name, tensor in state.items()},
        original_folder / "pytorch_model.bin",
    )
    torch.save(Callback(), original_folder / "training_args.bin")
    (original_folder / "config.json").write_text(json.dumps({"model_type": "multi_modality"}))
    options = {"image_size": SIZE, "background_color": [127, 127, 127], "min_size": 14}
    half = [0.5, 0.5, 0.5]
    (original_folder / "preprocessor_config.json").write_text(
        json.dumps(options | {"image_mean": half, "image_std": half, "rescale_factor": 1 / 255})
    )
    taming.save_pretrained(converted_folder)
    janus_processor().save_pretrained(converted_folder)
    assert load_quantizer(original_folder).fingerprint == load_quantizer(converted_folder).fingerprint


def test_diffusers_vqmodel(images: list[Image.Image], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = VQModel(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        layers_per_block=1,
        latent_channels=8,
        num_vq_embeddings=CODES,
        sample_size=SIZE,
    ).eval()
    spread_codes(model.quantize.embedding, torch.randn(CODES, 8) * 0.5)
    model.save_pretrained(tmp_path / "vqmodel")
    quantizer = load_quantizer(tmp_path / "vqmodel")
    assert isinstance(quantizer, NetworkQuantizer)
    for image in images:
        (grid,) = quantizer.encode([image])
        pixels = pixel_values(quantizer.preprocessing, image)[None]
        with torch.no_grad():
            latents = model.encode(pixels).latents
            np.testing.assert_array_equal(grid.ravel(), model.quantize(latents)[2][2])
            expected = to_uint8(model.decode(latents).sample[0])
        (reconstruction,) = quantizer.decode([grid])
        assert abs(np.asarray(reconstruction).astype(int) - expected.astype(int)).max() <= 1


def test_emu3_gives_the_ids_and_sizes_of_transformers_class_and_processor(
    emu3: Emu3VQVAE, images: list[Image.Image], tmp_path: Path
) -> None:
    emu3.save_pretrained(tmp_path / "emu3")
    emu3_processor().save_pretrained(tmp_path / "emu3")
    quantizer = load_quantizer(tmp_path / "emu3")
    grids = quantizer.encode(images)
    for image, grid in zip(images, grids, strict=True):
        inputs = emu3_processor()(put_on_white(image.convert("RGBA")), return_tensors="pt")
        with torch.no_grad():
            (expected,) = emu3.encode(inputs.pixel_values, inputs.image_sizes).image_tokens
            pixels = emu3.decode(torch.from_numpy(grid)[None])[0]
        np.testing.assert_array_equal(grid, expected)
        np.testing.assert_array_equal(np.asarray(quantizer.decode([grid])[0]), to_uint8(pixels))
    assert len({grid.shape for grid in grids}) > 3
    assert len(np.unique(np.concatenate([grid.ravel() for grid in grids]))) > 10


def test_emu3_under_its_original_names(emu3: Emu3VQVAE, images: list[Image.Image], tmp_path: Path) -> None:
    renames = (
        (r"\.(down|up)_block\.", "."),
        (r"\.middle_block\.attn_norm\.", ".mid.attn_1.norm."),
        (r"\.middle_block\.", ".mid."),
        (r"\.attn_norms\.(\d+)\.", r".attn.\1.norm."),
        (r"\.([qkv])_proj\.", r".\1."),
        (r"\.out_proj\.", ".proj_out."),
    )
    state = {}
    for name, tensor in emu3.state_dict().items():
        if re.search(r"_proj\.weight$", name):
            tensor = tensor[:, :, None, None]
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        state[name] = tensor.contiguous()
    assert "decoder.mid.attn_1.norm.conv_y.weight" in state
    original_folder, converted_folder = tmp_path / "Emu3-VisionTokenizer", tmp_path / "hf"
    original_folder.mkdir()
    save_file(state, original_folder / "model.safetensors")
    config = {
        "model_type": "Emu3VisionVQ",
        "codebook_size": CODES,
        "ch": 32,
        "ch_mult": [1, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [1],
        "z_channels": 4,
        "embed_dim": 4,
        "dropout": 0.0,
    }
    (original_folder / "config.json").write_text(json.dumps(config))
    emu3.save_pretrained(converted_folder)
    for folder in (original_folder, converted_folder):
        emu3_processor().save_pretrained(folder)
    a, b = load_quantizer(original_folder), load_quantizer(converted_folder)
    assert a.fingerprint == b.fingerprint
    np.testing.assert_array_equal(a.encode(images[:1]), b.encode(images[:1]))
