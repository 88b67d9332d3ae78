"""Expanding tiny models of three families: what loads afterwards, and what is refused."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM

from being_vl import VisualBPE
from being_vl.data.chat import DEFAULT_TEMPLATE
from being_vl.data.records import Turn
from being_vl.errors import (
    ConfigError,
    FingerprintError,
    ModelError,
    OutputError,
    QuantizerError,
    VocabularyError,
)
from being_vl.layout import VocabularyLayout
from being_vl.model import weights
from being_vl.model.assistant import Assistant
from being_vl.model.expand import copy_companions, expand
from being_vl.model.options import ExpandOptions, Initialisation
from being_vl.quantizer.base import load_quantizer
from helpers import tiny

MERGES = 6


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantizer and a vocabulary made for it."""
    folder = tmp_path_factory.mktemp("parts")
    tiny_quantizer = tiny.quantizer(folder / "quantizer", codebook_size=1000)
    learn(folder / "vocabulary.json", tiny_quantizer.fingerprint)
    return folder


def learn(path: Path, fingerprint: str, name: str = "tiny", codebook_size: int = 1000) -> None:
    grid = np.repeat(np.arange(8).reshape(2, 4), 4, axis=0)
    VisualBPE.train(
        [grid],
        base_vocab_size=codebook_size,
        num_merges=MERGES,
        quantizer_name=name,
        quantizer_fingerprint=fingerprint,
    ).save(path)


def options(parts: Path, llm: Path | str, out: Path, **changes: object) -> ExpandOptions:
    inputs = {"vocabulary": parts / "vocabulary.json", "quantizer": str(parts / "quantizer")}
    return ExpandOptions(**{"llm": str(llm), "out": out} | inputs | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_the_expanded_model_loads_strictly_and_treats_text_as_before(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: tiny.Family, tied: bool
) -> None:
    """Untied ones in bfloat16, and from several files to several files."""
    dtype, shard_size = (torch.float32, "5GB") if tied else (torch.bfloat16, "20KB")
    monkeypatch.setattr(weights, "SHARD_SIZE", shard_size)
    monkeypatch.setattr(weights, "_load_tensors", None)  # all are read tensor by tensor
    llm = tiny.llm(tmp_path / "llm", family, tied, dtype=dtype, shard_size=shard_size)
    layout = expand(options(parts, llm, tmp_path / "out"))
    for folder in (llm, tmp_path / "out"):
        assert (len(list(folder.glob("*.safetensors"))) > 3) == (not tied)
    original_model = AutoModelForCausalLM.from_pretrained(llm, dtype="auto").eval()
    expanded_model, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True
    )
    assert not any(loading.values()), loading
    assert type(expanded_model.eval()) is type(original_model)

    rows = original_model.get_input_embeddings().weight.shape[0]
    assert layout.text_size == original_model.config.vocab_size == rows
    assert expanded_model.config.vocab_size == layout.size == rows + 2 + 1000 + MERGES
    assert (
        expanded_model.get_input_embeddings().weight.shape
        == expanded_model.get_output_embeddings().weight.shape
    )
    assert expanded_model.get_output_embeddings().weight.shape[0] == layout.size
    head_is_embedding = (
        expanded_model.get_output_embeddings().weight is expanded_model.get_input_embeddings().weight
    )
    assert head_is_embedding == tied == expanded_model.config.tie_word_embeddings

    expanded_weights = expanded_model.state_dict()
    for name, weight in original_model.state_dict().items():
        assert expanded_weights[name].dtype == weight.dtype == dtype
        assert torch.equal(expanded_weights[name][: len(weight)], weight), name
    ids = torch.arange(60).reshape(3, 20)
    with torch.inference_mode():
        assert torch.equal(expanded_model(ids).logits[..., :rows], original_model(ids).logits)
    prompt = torch.cat([ids[:, :10], torch.arange(layout.boi, layout.boi + 30).reshape(3, 10)], dim=1)
    output = expanded_model.generate(
        prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0
    )
    assert output.shape == (3, 25)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def save_as_pytorch(llm: Path, weights_of_llm: dict[str, torch.Tensor]) -> None:
    torch.save(weights_of_llm, llm / "pytorch_model.bin")
    (llm / "model.safetensors").unlink()


def save_with_tied_head(llm: Path, weights_of_llm: dict[str, torch.Tensor]) -> None:
    weights_of_llm["lm_head.weight"] = weights_of_llm["model.embed_tokens.weight"].clone()
    save_file(weights_of_llm, llm / "model.safetensors", {"format": "pt"})


def save_with_old_buffers(llm: Path, weights_of_llm: dict[str, torch.Tensor]) -> None:
    weights_of_llm["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights_of_llm, llm / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("write", [save_as_pytorch, save_with_tied_head, save_with_old_buffers])
def test_checkpoints_of_other_forms_become_the_same_plain_one(
    parts: Path, tmp_path: Path, write: Callable[[Path, dict[str, torch.Tensor]], None]
) -> None:
    llm = tiny.llm(tmp_path / "llm")
    expand(options(parts, llm, tmp_path / "expected"))
    write(llm, tensors(llm))
    expand(options(parts, llm, tmp_path / "out"))
    expected, result = tensors(tmp_path / "expected"), tensors(tmp_path / "out")
    assert expected.keys() == result.keys()
    assert all(torch.equal(result[name], expected[name]) for name in expected)


def test_a_head_that_differs_though_the_config_ties_it_is_refused(parts: Path, tmp_path: Path) -> None:
    llm = tiny.llm(tmp_path / "llm", tied=False)
    config = json.loads((llm / "config.json").read_text())
    (llm / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(ModelError, match=r"llm: tie_word_embeddings is True .* differ; set it to false"):
        expand(options(parts, llm, tmp_path / "out"))


def test_a_name_on_the_hub_is_found_in_the_cache_without_a_network(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "cache" / "models--people--tiny"
    tiny.llm(repository / "snapshots" / "0123", shard_size="20KB")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    expand(options(parts, "people/tiny", tmp_path / "out"))
    layout = VocabularyLayout.load(tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == layout.size


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_new_rows_are_drawn_by_he_seeded_and_all_different(parts: Path, tmp_path: Path, tied: bool) -> None:
    llm = tiny.llm(tmp_path / "llm", tied=tied)

    def new_rows(name: str, **changes: object) -> list[torch.Tensor]:
        layout = expand(options(parts, llm, tmp_path / name, **changes))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
        return [end.weight[layout.text_size :].detach() for end in embeddings]

    rows = new_rows("a")
    for drawn_rows in rows:
        assert drawn_rows.std().item() == pytest.approx(math.sqrt(2 / 32), rel=0.02)
        assert abs(drawn_rows.mean().item()) < 0.01
        assert torch.pdist(drawn_rows).min() > 0.3  # resizing with mean_resizing would leave them 1e-6 apart
    assert torch.equal(*rows) == tied
    assert all(map(torch.equal, rows, new_rows("again")))
    assert not torch.equal(rows[0], new_rows("other", seed=1)[0])


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("init", ["text", "codebook"])
def test_new_rows_that_are_matched_to_the_text_rows(
    parts: Path, tmp_path: Path, init: Initialisation, tied: bool
) -> None:
    """Each matrix to its own: mean, spread, and the directions in which its text rows differ; none collapse."""
    llm = tiny.llm(tmp_path / "llm", tied=tied)
    weights_of_llm = tensors(llm)
    stretch = torch.linspace(0.1, 3, 32)
    for number, name in enumerate(name for name in weights_of_llm if len(weights_of_llm[name]) == 405):
        weights_of_llm[name] = weights_of_llm[name] * (stretch if number else stretch.flip(0)) + 0.05 * (
            number + 1
        )
        weights_of_llm[name][400:] = 99  # rows without a token tell nothing
    save_file(weights_of_llm, llm / "model.safetensors", {"format": "pt"})
    layout = expand(options(parts, llm, tmp_path / "out", init=init))
    report = json.loads((tmp_path / "out" / "manifest.json").read_text())["rows"]
    assert set(report) == ({"embedding"} if tied else {"embedding", "head"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    codes = load_quantizer(parts / "quantizer").model.quantize.embedding.weight
    for kind, end in {
        "embedding": model.get_input_embeddings(),
        "head": model.get_output_embeddings(),
    }.items():
        text, new_part = end.weight[:400].detach(), end.weight[layout.text_size :].detach()
        figures = report.get(kind, report["embedding"])
        for rows, figures_of_rows in ((text, figures["text"]), (new_part, figures["new"])):
            assert figures_of_rows["norm"] == pytest.approx(rows.norm(dim=1).mean().item(), rel=1e-4)
            assert figures_of_rows["spread"] == pytest.approx(
                (rows - rows.mean(0)).square().sum(1).mean().sqrt().item(), rel=1e-4
            )
        assert figures["new"]["spread"] == pytest.approx(figures["text"]["spread"], rel=0.1)
        assert (new_part.mean(0) - text.mean(0)).norm() < 0.1 * figures["text"]["spread"]
        assert torch.pdist(new_part).min() > 0.01 * figures["text"]["spread"]
        if init == "text":
            error = (torch.cov(new_part.T) - torch.cov(text.T)).norm() / torch.cov(text.T).norm()
            assert error < 0.25  # of 1008 draws
        else:
            visual_rows = new_part[2:]
            assert (
                torch.corrcoef(torch.stack([torch.pdist(codes), torch.pdist(visual_rows[:1000])]))[0, 1] > 0.5
            )
            for row, (a, b, *_) in enumerate(VisualBPE.load(parts / "vocabulary.json").merges, 1000):
                jitter = (visual_rows[row] - (visual_rows[a] + visual_rows[b]) / 2).norm() / figures["text"][
                    "spread"
                ]
                assert 0 < jitter < 0.3


def test_rows_of_zeros_fill_up_to_a_multiple(parts: Path, tmp_path: Path) -> None:
    for tied in (True, False):
        llm, out = tiny.llm(tmp_path / f"llm-{tied}", tied=tied), tmp_path / f"out-{tied}"
        layout = expand(options(parts, llm, out, pad_to=64))
        assert (layout.size, layout.rows, layout.padding) == (1413, 1472, 59)
        assert VocabularyLayout.load(out) == layout
        model, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not any(loading.values())
        assert model.config.vocab_size == 1472
        for end in (model.get_input_embeddings(), model.get_output_embeddings()):
            assert end.weight.shape == (1472, 32)
            assert not end.weight[1413:].any()
            assert end.weight[:1413].any(dim=1).all()
        assert Assistant.load(out, "cpu").answer(["Hello."], [[]], max_new_tokens=4)
    with pytest.raises(ConfigError, match="pad_to: expected at least 1, found 0"):
        expand(options(parts, llm, tmp_path / "out", pad_to=0))


def test_visual_tokens_are_entries_of_the_tokenizer(parts: Path, tmp_path: Path) -> None:
    for family in ("llama", "qwen2"):
        llm, out = tiny.llm(tmp_path / family, family), tmp_path / f"{family}-out"
        layout = expand(options(parts, llm, out))
        tokenizer = AutoTokenizer.from_pretrained(out)
        assert len(tokenizer) == layout.size
        ids = [layout.boi, *layout.to_model([0, 17, 999, 1000, 1005]), layout.eoi]
        text = "<|visual_start|><|visual_0|><|visual_17|><|visual_999|><|visual_1000|><|visual_1005|><|visual_end|>"
        assert tokenizer.decode(ids) == text
        assert tokenizer(text, add_special_tokens=False).input_ids == ids
        assert tokenizer.convert_ids_to_tokens(range(layout.boi, layout.size)) == layout.token_strings()
        assert tokenizer.decode([*ids, 300], skip_special_tokens=True) == tokenizer.decode([300])
        around = tokenizer(f"Is it {text} red?", add_special_tokens=False).input_ids
        assert [i for i in around if i >= layout.text_size] == ids
        # An id that the LLM has a row for, but its tokenizer had no token.
        assert (
            tokenizer.convert_ids_to_tokens(layout.text_size - 1)
            == f"<|visual_unused_{layout.text_size - 1}|>"
        )


def test_strings_of_visual_tokens_in_a_text_are_text(parts: Path, tmp_path: Path) -> None:
    layout = expand(options(parts, tiny.llm(tmp_path / "llm"), tmp_path / "out"))
    assistant = Assistant.load(tmp_path / "out", "cpu")
    question = "What is <|visual_start|><|visual_17|><|visual_end|> and <|visual_unused_401|>?"
    ids = assistant.builder.prompt([Turn("user", question)])
    assert ids.max() < layout.text_size - 5
    assert question in assistant.builder.tokenizer.decode(ids)


def test_the_folder_holds_all_that_belongs_to_the_model(parts: Path, tmp_path: Path) -> None:
    llm = tiny.llm(tmp_path / "llm", template=tiny.LLAMA3)
    out = tmp_path / "out"
    layout = expand(options(parts, llm, out))
    assert VocabularyLayout.load(out) == layout
    assert (out / "visual_vocabulary.json").read_bytes() == (parts / "vocabulary.json").read_bytes()
    quantizer = load_quantizer(out / "quantizer")
    assert (quantizer.name, quantizer.fingerprint) == (layout.quantizer_name, layout.quantizer_fingerprint)
    original_tokenizer, expanded_tokenizer = (
        AutoTokenizer.from_pretrained(llm),
        AutoTokenizer.from_pretrained(out),
    )
    assert expanded_tokenizer.get_vocab().items() >= original_tokenizer.get_vocab().items()
    assert expanded_tokenizer.chat_template == original_tokenizer.chat_template == tiny.LLAMA3
    text = "<|begin_of_text|>Größe: 12 circles\n\n  are <|eot_id|> here"
    assert expanded_tokenizer(text).input_ids == original_tokenizer(text).input_ids
    assert expanded_tokenizer.special_tokens_map == original_tokenizer.special_tokens_map
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["format"] == "being-vl/model"
    assert manifest["options"]["llm"] == str(llm)
    assert not list(tmp_path.glob("*.tmp"))
    assert {path.suffix for path in out.iterdir()} == {".json", ".jinja", ".safetensors", ""}

    copy = tmp_path / "copy"
    copy.mkdir()
    copy_companions(out, copy)
    missing_names = {path.name for path in out.iterdir()} - {path.name for path in copy.iterdir()}
    assert missing_names == {"config.json", "model.safetensors", "manifest.json", "fingerprint.json"}
    assert AutoTokenizer.from_pretrained(copy)(text).input_ids == original_tokenizer(text).input_ids
    assert load_quantizer(copy / "quantizer").fingerprint == layout.quantizer_fingerprint


def test_a_tokenizer_without_chat_template_gets_the_default(parts: Path, tmp_path: Path) -> None:
    expand(options(parts, tiny.llm(tmp_path / "llm"), tmp_path / "out"))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == DEFAULT_TEMPLATE


def test_the_generation_config_is_kept(parts: Path, tmp_path: Path) -> None:
    """Also Llama 2's own, whose temperature without sampling transformers finds fault with."""
    llm = tiny.llm(tmp_path / "llm")
    generation_config = json.loads((llm / "generation_config.json").read_text()) | {
        "temperature": 0.9,
        "max_length": 99,
    }
    (llm / "generation_config.json").write_text(json.dumps(generation_config))
    expand(options(parts, llm, tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == generation_config


def test_expanding_again_keeps_a_finished_model(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, out = tiny.llm(tmp_path / "llm"), tmp_path / "out"
    layout = expand(options(parts, llm, out))
    monkeypatch.setattr("being_vl.model.expand.open_llm", None)
    assert expand(options(parts, llm, out, overwrite=True)) == layout


@pytest.mark.parametrize("name", ["config.json", "visual_vocabulary.json", "quantizer/manifest.json"])
def test_a_model_that_lacks_a_file_is_made_again(
    name: str, parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And not, if the LLM was only touched or its folder moved: its content counts."""
    llm, out = tiny.llm(tmp_path / "llm"), tmp_path / "out"
    expand(options(parts, llm, out))
    data = (out / name).read_bytes()
    (out / name).unlink()
    caplog.set_level("INFO", "being_vl")
    expand(options(parts, llm, out))
    assert (out / name).read_bytes() == data
    assert f"since {name} is gone" in caplog.text
    for file in llm.iterdir():
        file.touch()
    caplog.clear()
    expand(options(parts, llm, out))
    assert "finished before, kept" in caplog.text


def test_expanding_with_other_options_or_inputs_is_refused(parts: Path, tmp_path: Path) -> None:
    llm, out = tiny.llm(tmp_path / "llm"), tmp_path / "out"
    expand(options(parts, llm, out))
    weights_before = (out / "model.safetensors").read_bytes()
    with pytest.raises(FingerprintError, match=r"out: was made with other .*seed was 0, is 1.*--overwrite"):
        expand(options(parts, llm, out, seed=1))
    shutil.copytree(parts, tmp_path / "parts")
    bpe = VisualBPE.load(parts / "vocabulary.json").truncate(MERGES - 1)
    bpe.save(tmp_path / "parts" / "vocabulary.json")
    with pytest.raises(FingerprintError, match="vocabulary_sha256 was"):
        expand(options(tmp_path / "parts", llm, out))
    tiny.llm(llm, seed=1)
    with pytest.raises(FingerprintError, match=r"llm_files\.model\.safetensors was"):
        expand(options(parts, llm, out))
    assert (out / "model.safetensors").read_bytes() == weights_before
    expand(options(parts, llm, out, overwrite=True))
    assert (out / "model.safetensors").read_bytes() != weights_before


def test_expanding_overwrites_nothing_but_its_own_files(parts: Path, tmp_path: Path) -> None:
    llm, out = tiny.llm(tmp_path / "llm"), tmp_path / "out"
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="is the input, too"):
            expand(options(parts, llm, llm, overwrite=overwrite))
        with pytest.raises(OutputError, match=r"is not empty, but holds config.json"):
            expand(options(parts, llm, tiny.llm(tmp_path / "other-llm"), overwrite=overwrite))
    assert AutoModelForCausalLM.from_pretrained(llm).config.vocab_size < 1000
    expand(options(parts, llm, out))
    (out / "notes.txt").write_text("by hand")
    with pytest.raises(OutputError, match=r"out: holds notes.txt, which is no part of an earlier output"):
        expand(options(parts, llm, out, seed=1, overwrite=True))
    (out / "notes.txt").unlink()
    expand(options(parts, llm, out, seed=1, overwrite=True))


def test_a_model_that_is_expanded_already_is_refused(parts: Path, tmp_path: Path) -> None:
    expand(options(parts, tiny.llm(tmp_path / "llm"), tmp_path / "out"))
    with pytest.raises(ModelError, match=r"out: is already expanded \(has being_vl.json\)"):
        expand(options(parts, tmp_path / "out", tmp_path / "twice"))
    assert not (tmp_path / "twice").exists()


def test_a_vocabulary_of_another_quantizer_is_refused_naming_both(parts: Path, tmp_path: Path) -> None:
    llm = tiny.llm(tmp_path / "llm")
    learn(tmp_path / "v.json", "ab" * 32, name="theirs")
    with pytest.raises(
        QuantizerError, match=r"v.json: is of quantizer 'theirs' \(abab.*quantizer is of 'tiny' \("
    ):
        expand(options(parts, llm, tmp_path / "out", vocabulary=tmp_path / "v.json"))
    fingerprint = load_quantizer(parts / "quantizer").fingerprint
    learn(tmp_path / "v.json", fingerprint, codebook_size=500)
    with pytest.raises(QuantizerError, match=r"v.json: made for a codebook of 500, .*'tiny' has 1000"):
        expand(options(parts, llm, tmp_path / "out", vocabulary=tmp_path / "v.json"))
    (tmp_path / "v.json").write_text("{}")
    with pytest.raises(VocabularyError):
        expand(options(parts, llm, tmp_path / "out", vocabulary=tmp_path / "v.json"))
    assert not (tmp_path / "out").exists()


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def change_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))


def add_layer(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))


def remove_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def replace_by_bert(folder: Path) -> None:
    shutil.rmtree(folder)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertForMaskedLM(config).save_pretrained(folder)


def mark_as_quantized(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))


def remove_folder(folder: Path) -> None:
    shutil.rmtree(folder)


DAMAGES = {
    remove_folder: "no such folder",
    remove_config: "cannot be loaded as a causal LM",
    remove_weights: "cannot be loaded as a causal LM",
    cut_weights: "cannot be loaded as a causal LM",
    change_shape: "cannot be loaded as a causal LM",
    add_layer: "weights are missing: model.layers.4.",
    remove_tokenizer: "its tokenizer cannot be loaded",
    mark_as_quantized: "its weights are quantized; expected the model before it was",
    replace_by_bert: "is a BertForMaskedLM; expected a causal LM",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_what_is_no_whole_causal_lm_is_refused_in_one_line(
    parts: Path, tmp_path: Path, damage: object
) -> None:
    llm = tiny.llm(tmp_path / "llm")
    damage(llm)  # type: ignore[operator]
    with pytest.raises(ModelError) as error:
        expand(options(parts, llm, tmp_path / "out"))
    assert str(error.value).startswith(f"{llm}: ")
    assert DAMAGES[damage] in str(error.value)  # type: ignore[index]
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_layout_maps_ids_both_ways_and_checks_them(tmp_path: Path) -> None:
    layout = VocabularyLayout(100, 16, 4, "tiny", "ab")
    assert (layout.boi, layout.eoi, layout.first_visual) == (100, 101, 102)
    assert (layout.size, layout.num_new) == (122, 22)
    tokens = np.array([[0, 19], [3, 16]], np.uint32)
    ids = layout.to_model(tokens)
    assert ids.tolist() == [[102, 121], [105, 118]]
    assert layout.to_visual(ids).tolist() == tokens.tolist()
    assert layout.to_model([]).tolist() == []
    for method, ids_outside, message in [
        (layout.to_model, [1, 20], r"visual BPE id 20 at index 1 is outside 0\.\.19"),
        (layout.to_model, [-1], "visual BPE id -1 at index 0"),
        (layout.to_model, [0.5], "are float64; expected integers"),
        (layout.to_visual, [102, 101], r"model id 101 at index 1 is outside 102\.\.121"),
    ]:
        with pytest.raises(ModelError, match=message):
            method(ids_outside)  # type: ignore[arg-type]

    layout.save(tmp_path)
    assert VocabularyLayout.load(tmp_path) == layout
    path = tmp_path / "being_vl.json"
    fields = json.loads(path.read_text())
    for content, message in [
        ("{", "cannot be read"),
        ("[]", "not a layout"),
        (json.dumps(fields | {"format": "being-vl/grids"}), "not a layout"),
        (json.dumps(fields | {"num_merges": "4"}), "'num_merges' is '4'; expected int"),
        (json.dumps(fields | {"text_size": -1}), "'text_size' is -1"),
        (
            json.dumps({key: fields[key] for key in fields if key != "quantizer_name"}),
            "'quantizer_name' is None",
        ),
    ]:
        path.write_text(content)
        with pytest.raises(ModelError, match=message):
            VocabularyLayout.load(tmp_path)
    path.unlink()
    with pytest.raises(ModelError, match=r"no being_vl.json; expected a model that `being-vl expand`"):
        VocabularyLayout.load(tmp_path)
