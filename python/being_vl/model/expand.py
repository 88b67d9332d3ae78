"""Enlarging a causal language model by the visual vocabulary (the paper's section 3.4)."""

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AddedToken

from being_vl.data.chat import DEFAULT_TEMPLATE, ChatFormat
from being_vl.errors import ConfigError, ModelError, QuantizerError
from being_vl.files import MANIFEST, read_manifest, sha256, write_aside, write_manifest
from being_vl.layout import LAYOUT_FILE, TOKEN_PREFIX, VocabularyLayout, num_text_tokens
from being_vl.model.options import ExpandOptions
from being_vl.model.processor import PROCESSOR_FILE, QUANTIZER_FOLDER, VOCABULARY_FILE, BeingVLProcessor
from being_vl.model.rows import codebook_of, describe, new_rows
from being_vl.model.weights import GGUF, find_file, load_config, open_llm, save_weights
from being_vl.quantize.base import Quantizer, load_quantizer
from being_vl.tokenizer import VisualBPE

log = logging.getLogger(__name__)

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
    *("*.model", GENERATION, LAYOUT_FILE, VOCABULARY_FILE, QUANTIZER_FOLDER, PROCESSOR_FILE),
)
"""What belongs to a model's folder beside config and weights, as patterns of names."""


def expand(options: ExpandOptions) -> VocabularyLayout:
    """Add rows for BOI, EOI, the codebook and the merges to a causal LM, and save it as a plain checkpoint.

    The text rows, all other weights and the dtype stay bit-identical; the checkpoint loads strictly with
    `AutoModelForCausalLM.from_pretrained`. The folder is complete: tokenizer (with a default chat template if it has
    none), `being_vl.json` (layout), `visual_vocabulary.json`, `quantizer/`, and last `manifest.json`.

    New rows are as `options.init` says (`being_vl.model.rows`). Where the embeddings are untied, the head's rows are
    drawn on their own; where they are tied, one draw serves both. A bias of the head is 0. Log and manifest tell the
    lengths and the spread of text rows and new rows.

    Weights are read tensor by tensor and written file by file, so that memory holds one file of the result, and not
    the model (`being_vl.model.weights`).

    Each id of the shared vocabulary is a special token of the tokenizer, `<|visual_start|>`, `<|visual_0|>` and so on,
    and rows of the LLM that its tokenizer had no token for are `<|visual_unused_…|>`.

    Returns:
        The layout of the shared vocabulary.

    Raises:
        ModelError: if `llm` is missing, no complete causal LM with tokenizer, or already expanded.
        VocabularyError: if the vocabulary's file is damaged.
        QuantizerError: if the vocabulary was made for another quantizer, naming both.
            Or it does not show the vectors that init `codebook` needs.
        ConfigError: if `out` holds something else than an expanded model, or `pad_to` is not positive.
    """
    if options.pad_to < 1:
        raise ConfigError(f"pad_to is {options.pad_to}; expected a positive number of rows")
    _check_out(options.out)
    check_llm(options.llm)
    bpe = VisualBPE.load(options.vocabulary)
    quantizer = load_quantizer(options.quantizer)
    _check_quantizer(bpe, quantizer, options)
    codebook = codebook_of(quantizer) if options.init == "codebook" else None
    llm = open_llm(options.llm)
    text_size, text_tokens = len(llm.tensor(llm.embedding)), num_text_tokens(llm.tokenizer)
    if text_tokens > text_size:
        raise ModelError(
            f"{options.llm}: the tokenizer has {text_tokens} ids, the embedding {text_size} rows"
        )
    if not llm.tokenizer.chat_template:
        llm.tokenizer.chat_template = DEFAULT_TEMPLATE
    ChatFormat(llm.tokenizer)
    layout = VocabularyLayout(
        text_size, bpe.base_vocab_size, bpe.num_merges, quantizer.name, quantizer.fingerprint
    )
    layout = dataclasses.replace(layout, padding=-layout.size % options.pad_to)
    _add_tokens(llm.tokenizer, layout, options.llm)
    generator = torch.Generator().manual_seed(options.seed)
    more, report = {}, {}
    for name, kind in {llm.head: "head", llm.embedding: "embedding"}.items():  # one if they are tied
        new = new_rows(options.init, llm.tensor(name)[:text_tokens], bpe, codebook, generator)
        report[kind] = {"text": describe(llm.tensor(name)[:text_tokens]), "new": describe(new)}
        more[name] = F.pad(new, (0, 0, 0, layout.padding))
    if llm.bias:
        more[llm.bias] = torch.zeros(layout.rows - text_size)
    log.info(
        "%s: %d text rows + %d visual rows + %d of padding = %d; init %s",
        *(options.llm, text_size, layout.num_new, layout.padding, layout.rows, options.init),
    )
    for kind, rows in report.items():
        log.info(
            "%s: mean length of text rows %.4f, of new rows %.4f; spread %.4f and %.4f",
            *(kind, *(rows[which][what] for what in ("norm", "spread") for which in ("text", "new"))),
        )
    llm.config.get_text_config().vocab_size = layout.rows
    generation = find_file(options.llm, GENERATION)
    with write_aside(options.out) as folder:
        folder.mkdir()
        save_weights(folder, llm, more)
        llm.config.save_pretrained(folder)
        BeingVLProcessor(llm.tokenizer, layout, bpe, quantizer).save_pretrained(folder)
        if generation:
            shutil.copyfile(generation, folder / GENERATION)
        made_of = dataclasses.asdict(options) | {"out": None, "vocabulary": str(options.vocabulary)}
        del made_of["out"]
        write_manifest(
            folder,
            "model",
            {
                "options": made_of,
                "vocabulary_sha256": sha256(options.vocabulary),
                "layout": dataclasses.asdict(layout),
                "rows": report,
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
                try:
                    shutil.copytree(path, target / path.name, dirs_exist_ok=True)
                except shutil.Error as error:  # of each file that could not be copied
                    raise OSError(error.args[0][0][2]) from error
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
    is_path = llm.endswith(GGUF) or llm.startswith((".", "/", "~")) or llm.count("/") > 1
    if is_path and not (Path(llm).is_file() if llm.endswith(GGUF) else Path(llm).is_dir()):
        kind = "file" if llm.endswith(GGUF) else "folder"
        raise ModelError(f"{llm}: no such {kind}; expected a causal LM of Hugging Face")
    load_config(llm)


def _add_tokens(tokenizer: Any, layout: VocabularyLayout, llm: str) -> None:
    """Give each id of the shared vocabulary a string; also the text rows that had none, since ids have no gaps."""
    unnamed = range(num_text_tokens(tokenizer), layout.text_size)
    names = [f"{TOKEN_PREFIX}unused_{row}|>" for row in unnamed] + layout.token_strings()
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    if tokenizer.convert_tokens_to_ids(names) != list(range(layout.size - len(names), layout.size)):
        raise ModelError(f"{llm}: its tokenizer does not take {names[0]} to {names[-1]} as its next ids")
