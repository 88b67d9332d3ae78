"""Enlarging a causal language model by the visual vocabulary (the paper's section 3.4)."""

import dataclasses
import logging
import math
import shutil
from pathlib import Path

import torch

from being_vl.data.chat import DEFAULT_TEMPLATE, ChatFormat
from being_vl.errors import ConfigError, ModelError, QuantizerError
from being_vl.files import MANIFEST, read_manifest, sha256, write_aside, write_manifest
from being_vl.model.layout import LAYOUT_FILE, VocabularyLayout
from being_vl.model.options import ExpandOptions
from being_vl.model.weights import CausalLM, find_file, load_config, open_llm, save_weights
from being_vl.quantize.base import Quantizer, load_quantizer
from being_vl.tokenizer import VisualBPE

log = logging.getLogger(__name__)

VOCABULARY_FILE = "visual_vocabulary.json"
QUANTIZER_FOLDER = "quantizer"
GENERATION = "generation_config.json"
COMPANIONS = (
    *(
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template*",
        "vocab.*",
        "merges.txt",
    ),
    *("*.model", GENERATION, LAYOUT_FILE, VOCABULARY_FILE, QUANTIZER_FOLDER),
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
    llm = open_llm(options.llm)
    text_size = len(llm.tensor(llm.embedding))
    if len(llm.tokenizer) > text_size:
        raise ModelError(
            f"{options.llm}: the tokenizer has {len(llm.tokenizer)} ids, the embedding {text_size} rows"
        )
    if not llm.tokenizer.chat_template:
        llm.tokenizer.chat_template = DEFAULT_TEMPLATE
    ChatFormat(llm.tokenizer)
    layout = VocabularyLayout(
        text_size, bpe.base_vocab_size, bpe.num_merges, quantizer.name, quantizer.fingerprint
    )
    more, scales = _new_rows(llm, layout, options.seed)
    log.info(
        "%s: %d text rows + %d visual rows = %d; standard deviation of text rows and new rows: %s",
        options.llm,
        text_size,
        layout.num_new,
        layout.size,
        ", ".join(f"{name} {text:.4f} and {new:.4f}" for name, (text, new) in scales.items()),
    )
    llm.config.get_text_config().vocab_size = layout.size
    generation = find_file(options.llm, GENERATION)
    with write_aside(options.out) as folder:
        folder.mkdir()
        save_weights(folder, llm, more)
        llm.config.save_pretrained(folder)
        llm.tokenizer.save_pretrained(folder)
        if generation:
            shutil.copyfile(generation, folder / GENERATION)
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
    load_config(llm)


def _new_rows(
    llm: CausalLM, layout: VocabularyLayout, seed: int
) -> tuple[dict[str, torch.Tensor], dict[str, tuple[float, float]]]:
    """The rows to append, by the tensor's name; the standard deviations of text rows and new rows, per matrix."""
    matrices = {"embedding": llm.embedding}
    if llm.head != llm.embedding:
        matrices["head"] = llm.head
    generator = torch.Generator().manual_seed(seed)
    more, scales = {}, {}
    for kind, name in matrices.items():
        text = llm.tensor(name)
        std = math.sqrt(2 / text.shape[1])
        more[name] = torch.randn((layout.num_new, text.shape[1]), generator=generator).mul_(std)
        scales[kind] = float(text.float().std()), std
    if llm.bias:
        more[llm.bias] = torch.zeros(layout.num_new)
    return more, scales
