"""Published VQ models: small random ones, saved as the real ones are, against the libraries' own classes."""

import json
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import VQModel
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    ChameleonVQVAE,
    ChameleonVQVAEConfig,
    Emu3ImageProcessor,
    Emu3VQVAE,
    Emu3VQVAEConfig,
    JanusVQVAE,
    JanusVQVAEConfig,
)
from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from being_vl.data.sequences import SequenceBuilder
from being_vl.errors import QuantizerError
from being_vl.model.assistant import Assistant
from being_vl.model.expand import expand
from being_vl.model.options import ExpandOptions
from being_vl.quantizer.base import Quantizer, load_quantizer
from being_vl.quantizer.job import quantize
from being_vl.quantizer.models.network import NetworkQuantizer
from being_vl.quantizer.options import QuantizeOptions
from being_vl.quantizer.preprocessing import Area, Crop, Pad, Preprocessing
from being_vl.shards.grids import GridStore
from being_vl.tokenizer.options import VocabularyOptions
from being_vl.tokenizer.train import train_vocabulary
from helpers import tiny

SIZE, CODES = 32, 64
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    """Smooth and noisy ones of several modes, sizes and proportions."""
    rng = np.random.default_rng(0)
    images = []
    for n, (width, height) in enumerate([(32, 32), (64, 40), (33, 50), (20, 17), (150, 70), (31, 97)]):
        noise = Image.fromarray(rng.integers(0, 256, (3 + n, 4 + n, 3), np.uint8))
        images.append(noise.resize((width, height), Image.Resampling.BICUBIC))
    images[1] = images[1].convert("L")
    images[2].putalpha(Image.linear_gradient("L").resize(images[2].size))
    return images


def spread_codes(codebook: nn.Embedding, latents: Tensor) -> None:
    """Codes like latents (N, D), so that many of them are used."""
    rows = torch.randperm(len(latents))[: len(codebook.weight)]
    with torch.no_grad():
        codebook.weight.normal_(latents.mean(), latents.std())
        codebook.weight[: len(rows)] = latents[rows]


@pytest.fixture(scope="module")
def taming() -> JanusVQVAE:
    """transformers' Janus is taming's architecture, with attention at the coarsest level."""
    torch.manual_seed(0)
    config = JanusVQVAEConfig(
        base_channels=32,
        channel_multiplier=[1, 2, 2],
        num_res_blocks=1,
        latent_channels=16,
        embed_dim=8,
        num_embeddings=CODES,
        num_patches=SIZE // 4,
    )
    model = JanusVQVAE(config).eval()
    with torch.no_grad():
        latents = model.quant_conv(model.encoder(torch.rand(4, 3, SIZE, SIZE) * 2 - 1))
    spread_codes(model.quantize.embedding, latents.permute(0, 2, 3, 1).flatten(0, 2))
    return model


@pytest.fixture(scope="module")
def chameleon(taming: JanusVQVAE) -> JanusVQVAE:
    """Chameleon's architecture, decoder included: taming's without attention outside the middle."""
    model = JanusVQVAE(taming.config).eval()
    model.load_state_dict(taming.state_dict())
    model.encoder.down[-1].attn = nn.ModuleList()
    model.decoder.up[0].attn = nn.ModuleList()
    return model


def reverse_levels(state: State) -> State:
    """taming counts the decoder's levels from the other end than transformers' Janus."""
    last_level = max(int(name.split(".")[2]) for name in state if name.startswith("decoder.up."))
    return {
        re.sub(r"(decoder\.up\.)(\d+)", lambda match: f"{match[1]}{last_level - int(match[2])}", name): tensor
        for name, tensor in state.items()
    }


class Callback:
    """Stands for Lightning's objects in a file of weights, whose code must not run."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return print, ("this must not run",)


def save_taming(folder: Path, state: State, resolution: int = SIZE, name: str = "vqgan.ckpt") -> Path:
    """As CompVis and Meta did: Lightning's file of weights and a YAML."""
    folder.mkdir(parents=True, exist_ok=True)
    state = reverse_levels(state) | {"loss.discriminator.main.0.weight": torch.zeros(3)}
    torch.save({"epoch": 3, "callbacks": {Callback: Callback()}, "state_dict": state}, folder / name)
    config = {"model": {"params": {"embed_dim": 8, "ddconfig": {"resolution": resolution}}}}
    (folder / "vqgan.yaml").write_text(yaml.safe_dump(config))
    return folder


def save_chameleon(folder: Path, model: JanusVQVAE) -> ChameleonVQVAE:
    """As `zawnpn/being-vq-8k`: transformers' class, which has no decoder, and its image processor."""
    fields = model.config.to_dict()
    names = ["base_channels", "channel_multiplier", "num_res_blocks", "latent_channels", "embed_dim"]
    model_without_decoder = ChameleonVQVAE(
        ChameleonVQVAEConfig(resolution=SIZE, num_embeddings=CODES, **{name: fields[name] for name in names})
    )
    missing_names, _ = model_without_decoder.load_state_dict(model.state_dict(), strict=False)
    assert not missing_names
    model_without_decoder.save_pretrained(folder)
    chameleon_processor().save_pretrained(folder)
    return model_without_decoder


def chameleon_processor() -> ChameleonImageProcessorPil:
    return ChameleonImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})


def janus_processor() -> JanusImageProcessorPil:
    half = [0.5, 0.5, 0.5]
    return JanusImageProcessorPil(size={"height": SIZE, "width": SIZE}, image_mean=half, image_std=half)


def pixel_values(preprocessing: Preprocessing, image: Image.Image) -> Tensor:
    return preprocessing.normalise(torch.from_numpy(np.array(preprocessing.prepare(image))))


@torch.no_grad()
def find_ids(latents: Tensor, codebook: Tensor) -> NDArray[np.int64]:
    """The definition: (D, h, w) → ids of the nearest codes, in float64."""
    _, height, width = latents.shape
    ids = torch.cdist(latents.flatten(1).T.double(), codebook.double()).argmin(1)
    return ids.reshape(height, width).numpy()


def to_uint8(pixels: Tensor) -> NDArray[np.uint8]:
    """(3, h, w) of -1 to 1."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


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


def put_on_white(image: Image.Image) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


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


def llamagen_names(state: State) -> State:
    """The names in LlamaGen's vq_model.py, whose levels are counted as transformers' Janus does."""
    new_state = {}
    for name, tensor in state.items():
        name = re.sub(r"^(encoder\.down|decoder\.up)\.", lambda f: f"{f[1].split('.')[0]}.conv_blocks.", name)
        name = re.sub(r"(conv_blocks\.\d+)\.block\.", r"\1.res.", name)
        for n, part in enumerate(("block_1", "attn_1", "block_2")):
            name = name.replace(f".mid.{part}.", f".mid.{n}.")
        new_state[name] = tensor
    return new_state


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


@pytest.fixture(scope="module")
def emu3() -> Emu3VQVAE:
    torch.manual_seed(0)
    config = Emu3VQVAEConfig(
        codebook_size=CODES,
        base_channels=32,
        channel_multiplier=[1, 2],
        num_res_blocks=1,
        attn_resolutions=[1],
        hidden_size=64,
    )
    model = Emu3VQVAE(config).eval()
    with torch.no_grad():
        hidden = model.encoder(torch.rand(4, 4, 3, SIZE, SIZE) * 2 - 1)
        latents = model.quant_conv(hidden.permute(0, 2, 1, 3, 4)).permute(0, 2, 3, 4, 1).flatten(0, 3)
    spread_codes(model.quantize.embedding, latents)
    return model


def emu3_processor() -> Emu3ImageProcessor:
    return Emu3ImageProcessor(
        min_pixels=30**2, max_pixels=48**2, spatial_factor=2, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )


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


def every_format(folder: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A saved one of each class."""
    taming, emu3 = request.getfixturevalue("taming"), request.getfixturevalue("emu3")
    save_chameleon(folder / "chameleon", request.getfixturevalue("chameleon"))
    yield folder / "chameleon"
    yield save_taming(folder / "taming", taming.state_dict())
    taming.save_pretrained(folder / "janus")
    janus_processor().save_pretrained(folder / "janus")
    yield folder / "janus"
    emu3.save_pretrained(folder / "emu3")
    emu3_processor().save_pretrained(folder / "emu3")
    yield folder / "emu3"


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


def test_hub_names_are_taken_from_the_cache(
    chameleon: JanusVQVAE, images: list[Image.Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "hub" / "models--zawnpn--being-vq-8k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    save_chameleon(repository / "snapshots" / "abc", chameleon)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    quantizer = load_quantizer("zawnpn/being-vq-8k")
    assert quantizer.name == "being-vq-8k"
    np.testing.assert_array_equal(
        quantizer.encode(images), load_quantizer(repository / "snapshots" / "abc").encode(images)
    )
    with pytest.raises(QuantizerError, match=r"nobody/nothing: neither here nor on the hub.*'builtin'"):
        load_quantizer("nobody/nothing")


def test_what_is_no_vq_model_is_refused_with_what_it_is(taming: JanusVQVAE, tmp_path: Path) -> None:
    save_file({"lm_head.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(QuantizerError, match=r"no tensor is named …quantize\.embedding\.weight"):
        load_quantizer(tmp_path)
    codebook = OrderedDict(
        {"quantize.embedding.weight": torch.zeros(2, 2), "encoder.weird.weight": torch.zeros(1)}
    )
    save_file(codebook, tmp_path / "model.safetensors")
    with pytest.raises(
        QuantizerError,
        match=r"none of the formats being_vl, chameleon, diffusers, emu3.*encoder\.weird\.weight",
    ):
        load_quantizer(tmp_path)
    state = taming.state_dict()
    state.pop("decoder.conv_in.weight")
    with pytest.raises(QuantizerError, match=r"cannot be loaded \(.*VQModel"):
        load_quantizer(save_taming(tmp_path / "cut", state))
    content = (tmp_path / "cut" / "vqgan.ckpt").read_bytes()
    for damaged_content in (content[:1000], b"a text"):
        (tmp_path / "cut" / "vqgan.ckpt").write_bytes(damaged_content)
        with pytest.raises(QuantizerError, match=r"vqgan\.ckpt: damaged, or no weights"):
            load_quantizer(tmp_path / "cut")


def test_fingerprints_travel_and_two_quantizers_are_never_mixed(
    images: list[Image.Image], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    for n, image in enumerate(images):
        (tmp_path / "images").mkdir(exist_ok=True)
        image.save(tmp_path / "images" / f"{n}.png")
    quantizer_a, quantizer_b = (
        str(next(every_format(tmp_path, request))),
        str(tmp_path / "chameleon") + "@32:aspect",
    )
    for name, quantizer in (("one", quantizer_a), ("other", quantizer_b)):
        quantize(QuantizeOptions(tmp_path / "images", tmp_path / name / "grids", quantizer))
        train_vocabulary(
            VocabularyOptions([tmp_path / name / "grids"], tmp_path / name / "bpe.json", num_merges=4)
        )
    llm = str(tiny.llm(tmp_path / "llm"))
    expand(ExpandOptions(llm, tmp_path / "other" / "bpe.json", tmp_path / "other" / "model", quantizer_b))

    store = GridStore.open(tmp_path / "other" / "grids")
    assert len({grid.shape for grid in store.values()}) > 3
    assistant = Assistant.load(tmp_path / "other" / "model", "cpu")
    questions = [list(images), list(store.values())]
    answers_by_image, answers_by_grid = (
        assistant.answer(["What?"] * 6, [[item] for item in each], max_new_tokens=4) for each in questions
    )
    assert answers_by_image == answers_by_grid

    fingerprints = [load_quantizer(name).fingerprint[:12] for name in (quantizer_a, quantizer_b)]
    names = rf"'chameleon' \(({'|'.join(fingerprints)})\).*'chameleon' \(({'|'.join(fingerprints)})\)"
    grids = [tmp_path / name / "grids" for name in ("one", "other")]
    with pytest.raises(QuantizerError, match=names):
        train_vocabulary(VocabularyOptions(grids, tmp_path / "bpe.json", num_merges=4))
    with pytest.raises(QuantizerError, match=names):
        expand(ExpandOptions(llm, tmp_path / "one" / "bpe.json", tmp_path / "model", quantizer_b))
    builder = assistant.builder
    with pytest.raises(QuantizerError, match=names):
        SequenceBuilder(
            builder.tokenizer, builder.layout, builder.bpe, GridStore.open(tmp_path / "one" / "grids")
        )
    shutil.rmtree(tmp_path / "other" / "model" / "quantizer")
    load_quantizer(quantizer_a).save_pretrained(tmp_path / "other" / "model" / "quantizer")
    with pytest.raises(QuantizerError, match=names):
        Assistant.load(tmp_path / "other" / "model", "cpu").answer(["What?"], [images[:1]])


def test_of_a_large_model_on_the_hub_only_the_files_of_its_vq_model_are_downloaded(
    chameleon: JanusVQVAE, taming: JanusVQVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[list[str]] = []

    def download(repository: str, allow_patterns: list[str]) -> str:
        requests.append(allow_patterns)
        return str(tmp_path / repository)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    save_chameleon(tmp_path / "facebook" / "chameleon-7b", chameleon)
    files = {f"model.vqmodel.{name}": "model-3.safetensors" for name in chameleon.state_dict()}
    files |= {"model.layers.0.weight": "model-1.safetensors", "model.vqmodel.other": "model-2.safetensors"}
    index = tmp_path / "facebook" / "chameleon-7b" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    index.with_name("model.safetensors").rename(index.with_name("model-3.safetensors"))
    assert load_quantizer("facebook/chameleon-7b").name == "chameleon-7b"
    assert requests == [["*.json", "*.yaml"], ["model-3.safetensors"]]

    requests.clear()
    (tmp_path / "FoundationVision" / "LlamaGen").mkdir(parents=True)
    file = tmp_path / "FoundationVision" / "LlamaGen" / "vq_ds16_c2i.pt"
    torch.save({"model": llamagen_names(taming.state_dict())}, file)
    assert load_quantizer("FoundationVision/LlamaGen/vq_ds16_c2i.pt").name == "vq_ds16_c2i"
    assert requests == [["*.json", "*.yaml"], ["vq_ds16_c2i.pt"]]
