"""Where published VQ models are read from, what is refused, and that two of them are never mixed."""

import json
import shutil
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import JanusVQVAE

from being_vl.data.sequences import SequenceBuilder
from being_vl.errors import QuantizerError
from being_vl.model.assistant import Assistant
from being_vl.model.expand import expand
from being_vl.model.options import ExpandOptions
from being_vl.quantizer.base import load_quantizer
from being_vl.quantizer.job import quantize
from being_vl.quantizer.options import QuantizeOptions
from being_vl.shards.grids import GridStore
from being_vl.tokenizer.options import VocabularyOptions
from being_vl.tokenizer.train import train_vocabulary
from helpers import tiny
from helpers.vq_models import every_format, llamagen_names, save_chameleon, save_taming


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
