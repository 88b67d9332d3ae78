"""Enlarging a causal language model by the visual vocabulary (the paper's section 3.4)."""

import dataclasses
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from being_vl.data.chat import DEFAULT_TEMPLATE, ChatFormat
from being_vl.errors import ConfigError, ModelError, QuantizerError
from being_vl.files import MANIFEST, read_manifest, sha256, write_aside, write_manifest
from being_vl.model.layout import LAYOUT_FILE, VocabularyLayout
from being_vl.model.options import ExpandOptions
from being_vl.quantize.base import Quantizer, load_quantizer
from being_vl.tokenizer import VisualBPE

log = logging.getLogger(__name__)

VOCABULARY_FILE = "visual_vocabulary.json"
QUANTIZER_FOLDER = "quantizer"
COMPANIONS = (
    *(
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template*",
        "vocab.*",
        "merges.txt",
    ),
    *("*.model", "generation_config.json", LAYOUT_FILE, VOCABULARY_FILE, QUANTIZER_FOLDER),
)
"""What belongs to a model's folder beside config and weights, as patterns of names."""


def expand(options: ExpandOptions) -> VocabularyLayout:
    """Add rows for BOI, EOI, the codebook and the merges to a causal LM, and save it as a plain checkpoint.

    The text rows, all other weights and the dtype stay bit-identical; the checkpoint loads strictly with
    `AutoModelForCausalLM.from_pretrained`. The folder is complete: tokenizer (with a default chat template if it has
    none), `being_vl.json` (layout), `visual_vocabulary.json`, `quantizer/`, and last `manifest.json`.

    New rows are drawn from a normal distribution with standard deviation sqrt(2 / hidden size): He's for fan-in, the
    hidden size being what a row of the output head sums over. So each is about sqrt(2) long, whatever the size. Where
    the embeddings are untied, the head's rows are drawn on their own; where they are tied, one draw serves both. A bias
    of the head is 0. Until training has taught the model that answers hold no image ids, these take a part of the
    probability of the next token: their logits have a standard deviation of sqrt(2) times the root mean square of the
    final hidden state. (SmolLM2-135M, tied, with 2,050 new rows: 0.06 % of the probability. With rows as long as its
    text rows, 2.3 times longer, it is 22 %.) The log shows the standard deviations of text rows and new rows.

    Returns:
        The layout of the shared vocabulary.

    Raises:
        ModelError: if `llm` is missing, no complete causal LM with tokenizer, or already expanded.
        VocabularyError: if the vocabulary's file is damaged.
        QuantizerError: if the vocabulary was made for another quantizer, naming both.
        ConfigError: if `out` holds something else than an expanded model.
    """
    _check_out(options.out)
    check_llm(options.llm)
    bpe = VisualBPE.load(options.vocabulary)
    quantizer = load_quantizer(options.quantizer)
    _check_quantizer(bpe, quantizer, options)
    model, tokenizer = _load(options.llm)
    text_size = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > text_size:
        raise ModelError(
            f"{options.llm}: the tokenizer has {len(tokenizer)} ids, the embedding {text_size} rows"
        )
    if not tokenizer.chat_template:
        tokenizer.chat_template = DEFAULT_TEMPLATE
    ChatFormat(tokenizer)
    layout = VocabularyLayout(
        text_size, bpe.base_vocab_size, bpe.num_merges, quantizer.name, quantizer.fingerprint
    )
    scales = _enlarge(model, layout, options.seed)
    log.info(
        "%s: %d text rows + %d visual rows = %d; standard deviation of text rows and new rows: %s",
        options.llm,
        text_size,
        layout.num_new,
        layout.size,
        ", ".join(f"{name} {text:.4f} and {new:.4f}" for name, (text, new) in scales.items()),
    )
    with write_aside(options.out) as folder:
        folder.mkdir()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        layout.save(folder)
        shutil.copyfile(options.vocabulary, folder / VOCABULARY_FILE)
        quantizer.save_pretrained(folder / QUANTIZER_FOLDER)
        made_of = dataclasses.asdict(options) | {"out": None, "vocabulary": str(options.vocabulary)}
        del made_of["out"]
        write_manifest(
            folder,
            "model",
            {
                "options": made_of,
                "vocabulary_sha256": sha256(options.vocabulary),
                "layout": dataclasses.asdict(layout),
                "row_std": {name: {"text": text, "new": new} for name, (text, new) in scales.items()},
            },
        )
    return layout


def copy_companions(source: Path, target: Path) -> None:
    """Copy all that belongs to a model's folder beside config and weights.

    That is the tokenizer's files, the generation config and, of an expanded model, layout, vocabulary and quantizer.
    What `target` already has under the same names is replaced.
    """
    for pattern in COMPANIONS:
        for path in source.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, target / path.name, dirs_exist_ok=True)
            else:
                shutil.copyfile(path, target / path.name)


def _check_out(out: Path) -> None:
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).is_file()):
        raise ConfigError(f"{out}: exists and is not an expanded model; choose another folder for the output")
    if (out / MANIFEST).is_file():
        read_manifest(out, "model")


def _check_quantizer(bpe: VisualBPE, quantizer: Quantizer, options: ExpandOptions) -> None:
    if bpe.quantizer_fingerprint not in (None, quantizer.fingerprint):
        raise QuantizerError(
            f"{options.vocabulary}: made for quantizer {bpe.quantizer_name!r} ({bpe.quantizer_fingerprint[:12]}), but "
            f"{options.quantizer!r} is {quantizer.name!r} ({quantizer.fingerprint[:12]})"
        )
    if bpe.base_vocab_size != quantizer.codebook_size:
        raise QuantizerError(
            f"{options.vocabulary}: made for a codebook of {bpe.base_vocab_size}, but quantizer {quantizer.name!r} has "
            f"{quantizer.codebook_size}"
        )


def check_llm(llm: str) -> None:
    """Check that `expand` can begin with a folder or hub name, without loading weights.

    Raises:
        ModelError: if it is missing, no causal LM, or already expanded.
    """
    if (Path(llm) / LAYOUT_FILE).is_file():
        raise ModelError(f"{llm}: is already expanded (has {LAYOUT_FILE}); expected a plain causal LM")
    if not Path(llm).is_dir() and (llm.startswith((".", "/", "~")) or llm.count("/") > 1):
        raise ModelError(f"{llm}: no such folder; expected a causal LM of Hugging Face")
    try:
        config = AutoConfig.from_pretrained(llm)
    except (OSError, ValueError, KeyError) as error:
        raise _no_llm(llm, error) from error
    kind = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if kind is None or kind.__name__ not in (config.architectures or [kind.__name__]):
        found = ", ".join(config.architectures or [type(config).__name__])
        raise ModelError(f"{llm}: is a {found}; expected a causal LM")


def _load(llm: str) -> tuple[Any, Any]:
    """The LLM in the dtype of its checkpoint, and its tokenizer."""
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(llm, dtype="auto", output_loading_info=True)
        if loading["missing_keys"]:
            some = ", ".join(sorted(loading["missing_keys"])[:3])
            raise ModelError(f"{llm}: {len(loading['missing_keys'])} weights are missing: {some}")
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if isinstance(error, ModelError):
            raise
        raise _no_llm(llm, error) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(llm)
    except Exception as error:  # tokenizers raise plain Exception on damaged files
        raise ModelError(f"{llm}: its tokenizer cannot be loaded: {_first_line(error)}") from error
    if model.get_output_embeddings() is None:
        raise ModelError(f"{llm}: {type(model).__name__} has no output head that can be enlarged")
    return model, tokenizer


def _enlarge(model: Any, layout: VocabularyLayout, seed: int) -> dict[str, tuple[float, float]]:
    """Add the new rows; the standard deviations of text rows and new rows, per matrix."""
    model.resize_token_embeddings(layout.size, mean_resizing=False)
    matrices = {"embedding": model.get_input_embeddings().weight}
    head = model.get_output_embeddings()
    if head.weight is not matrices["embedding"]:
        matrices["head"] = head.weight
    generator = torch.Generator().manual_seed(seed)
    scales = {}
    with torch.no_grad():
        for name, weight in matrices.items():
            std = math.sqrt(2 / weight.shape[1])
            rows = torch.randn((layout.num_new, weight.shape[1]), generator=generator)
            weight[layout.text_size :] = rows.mul_(std).to(weight.dtype)
            scales[name] = float(weight[: layout.text_size].float().std()), std
        if getattr(head, "bias", None) is not None:
            head.bias[layout.text_size :] = 0
    return scales


def _no_llm(llm: str, error: Exception) -> ModelError:
    return ModelError(f"{llm}: cannot be loaded as a causal LM of Hugging Face: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
