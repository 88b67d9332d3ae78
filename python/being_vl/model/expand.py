"""Enlarging a causal language model by the visual vocabulary (the paper's section 3.4).

The folder is complete: weights, tokenizer (with a default chat template if it has none), `being_vl.json` (layout),
`visual_vocabulary.json`, `quantizer/`, and last `manifest.json`, which also tells the lengths and the spread of text
rows and new rows. Weights are read tensor by tensor and written file by file, so that memory holds one file of the
result, and not the model (`being_vl.model.weights`).
"""

import dataclasses
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AddedToken

from being_vl.contents import hash_files
from being_vl.data.chat import DEFAULT_TEMPLATE, ChatFormat
from being_vl.errors import FingerprintError, ModelError, QuantizerError
from being_vl.files import (
    MANIFEST,
    check_replaceable,
    list_files_below,
    list_names,
    resolve_link,
    sha256,
    write_aside,
    write_manifest,
)
from being_vl.fingerprints import FINGERPRINT, check_fingerprint, write_fingerprint
from being_vl.layout import LAYOUT_FILE, TOKEN_PREFIX, VOCABULARY_FILE, VocabularyLayout, num_text_tokens
from being_vl.model.options import ExpandOptions
from being_vl.model.processor import PROCESSOR_FILE, QUANTIZER_FOLDER, BeingVLProcessor
from being_vl.model.rows import describe_rows, find_codebook, make_rows
from being_vl.model.weights import GGUF, CausalLM, find_file, list_files, load_config, open_llm, save_weights
from being_vl.options import StrPath, fixed_options
from being_vl.outputs import check_folder, free_locks, lock_file, read_json
from being_vl.progress import show_log_lines
from being_vl.quantizer.base import Quantizer, load_quantizer
from being_vl.quantizer_names import check_same_quantizer
from being_vl.tokenizer.visual_bpe import VisualBPE

log = logging.getLogger(__name__)

KIND = "model"
"""Kind of the manifest of an expanded model."""
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
"""Patterns of the names of files that belong to a model's folder beside config and weights."""


@show_log_lines()
@free_locks()
def expand(options: ExpandOptions) -> VocabularyLayout:
    """Add rows for BOI, EOI, the codebook and the merges to a causal LM (the paper's section 3.4).

    The text rows, all other weights and the dtype stay bit-identical; the result loads strictly with
    `AutoModelForCausalLM.from_pretrained`. Called again with the same options and inputs, it keeps the folder.

    New rows are as `options.init` says (`being_vl.model.rows`). Where the embeddings are untied, the head's rows are
    drawn separately; where they are tied, one draw serves both. A bias of the head is 0.

    Returns:
        The layout of the shared vocabulary.

    Raises:
        ModelError: if `llm` is missing, no complete causal LM with tokenizer, or already expanded.
        VocabularyError: if the vocabulary's file is damaged.
        QuantizerError: if the vocabulary was made for another quantizer, naming both; or the quantizer does not show
            the vectors that init `codebook` needs.
        FingerprintError: if `out` holds a model that was expanded with other options or inputs, unless `overwrite`.
        OutputError: if `out` holds anything else than an expanded model, or another process is writing it.
    """
    check_folder(options.out, KIND, inputs=[options.llm, options.vocabulary, options.quantizer])
    # Check that the parts belong together.
    check_llm(options.llm)
    bpe = VisualBPE.load(options.vocabulary)
    quantizer = load_quantizer(options.quantizer)
    _check_quantizer(bpe, quantizer, options)
    codebook = find_codebook(quantizer) if options.init == "codebook" else None

    # Keep what an earlier call has finished.
    lock_file(options.out)
    fields = _fingerprint_fields(options, quantizer)
    if _is_finished(options.out, fields, options.overwrite):
        log.info("%s: finished before, kept", options.out)
        return VocabularyLayout.load(options.out)

    # Lay out the shared vocabulary, and make its new rows.
    llm = open_llm(options.llm)
    layout = _extend_tokenizer(llm, bpe, quantizer, options)
    new_rows, statistics = _make_new_rows(llm, bpe, codebook, layout, options)

    # Write the folder; it appears when it is complete.
    with write_aside(options.out, KIND) as folder:
        folder.mkdir()
        _write_model(folder, llm, new_rows, layout.rows, options.llm)
        BeingVLProcessor(llm.tokenizer, layout, bpe, quantizer).save_pretrained(folder)
        write_fingerprint(folder / FINGERPRINT, fields)
        manifest = {
            "options": fixed_options(options) | {"quantizer": options.quantizer},
            "vocabulary_sha256": sha256(options.vocabulary),
            "layout": dataclasses.asdict(layout),
            "rows": statistics,
            "files": sorted({MANIFEST, *list_files_below(folder)}),
        }
        write_manifest(folder, KIND, manifest)
    return layout


def _fingerprint_fields(options: ExpandOptions, quantizer: Quantizer) -> dict[str, Any]:
    """What an expanded model follows from; of the LLM its files, by their content."""
    return fixed_options(options) | {
        "kind": KIND,
        "llm_files": {path.name: digest for path, digest in hash_files(list_files(options.llm)).items()},
        "vocabulary_sha256": sha256(options.vocabulary),
        "quantizer": quantizer.fingerprint,
    }


def _is_finished(out: Path, fields: dict[str, Any], overwrite: bool) -> bool:
    """Whether `out` holds this very model; else it is free, or may be overwritten.

    Raises:
        FingerprintError: if it holds a model that was expanded with other options or inputs, unless `overwrite`.
        OutputError: if it holds anything that `expand` did not write.
    """
    try:
        if check_folder(out, KIND) and check_fingerprint(out / FINGERPRINT, fields):
            names = read_json(out / MANIFEST).get("files", [MANIFEST])
            missing_names = {name for name in names if not (out / name).is_file()}
            if not missing_names:
                return True
            log.info("%s: made again, since %s is gone", out, list_names(missing_names))
    except FingerprintError:
        if not overwrite:
            raise
    check_replaceable(resolve_link(out), KIND)
    return False


def _extend_tokenizer(
    llm: CausalLM, bpe: VisualBPE, quantizer: Quantizer, options: ExpandOptions
) -> VocabularyLayout:
    """Give the LLM's tokenizer the visual tokens, and a chat template if it has none; the layout that this makes.

    Each id of the shared vocabulary is a special token, `<|visual_start|>`, `<|visual_0|>` and so on, and rows of the
    LLM that its tokenizer had no token for are `<|visual_unused_…|>`.
    """
    text_size, text_tokens = len(llm.tensor(llm.embedding)), num_text_tokens(llm.tokenizer)
    if text_tokens > text_size:
        raise ModelError(
            f"{options.llm}: the tokenizer has {text_tokens} ids, the embedding {text_size} rows"
        )
    if not llm.tokenizer.chat_template:
        llm.tokenizer.chat_template = DEFAULT_TEMPLATE
    ChatFormat(llm.tokenizer)  # raises if the template cannot be used
    layout = VocabularyLayout(
        text_size, bpe.base_vocab_size, bpe.num_merges, quantizer.name, quantizer.fingerprint
    )
    layout = dataclasses.replace(layout, padding=-layout.size % options.pad_to)
    _add_tokens(llm.tokenizer, layout, options.llm)
    log.info(
        "%s: %d text rows + %d visual rows + %d of padding = %d; init %s",
        *(options.llm, layout.text_size, layout.num_new, layout.padding, layout.rows, options.init),
    )
    return layout


def _make_new_rows(
    llm: CausalLM, bpe: VisualBPE, codebook: Tensor | None, layout: VocabularyLayout, options: ExpandOptions
) -> tuple[dict[str, Tensor], dict[str, dict[str, dict[str, float]]]]:
    """Rows to append, by the tensor's name; and length and spread of text rows and new rows of each matrix."""
    text_tokens = num_text_tokens(llm.tokenizer)
    generator = torch.Generator().manual_seed(options.seed)
    new_rows, statistics = {}, {}
    for name, kind in {llm.head: "head", llm.embedding: "embedding"}.items():  # one if they are tied
        text_rows = llm.tensor(name)[:text_tokens]
        rows = make_rows(options.init, text_rows, bpe, codebook, generator)
        statistics[kind] = {"text": describe_rows(text_rows), "new": describe_rows(rows)}
        new_rows[name] = F.pad(rows, (0, 0, 0, layout.padding))
    if llm.bias:
        new_rows[llm.bias] = torch.zeros(layout.rows - layout.text_size)
    for kind, lengths in statistics.items():
        log.info(
            "%s: mean length of text rows %.4f, of new rows %.4f; spread %.4f and %.4f",
            *(
                kind,
                lengths["text"]["norm"],
                lengths["new"]["norm"],
                lengths["text"]["spread"],
                lengths["new"]["spread"],
            ),
        )
    return new_rows, statistics


def _write_model(folder: Path, llm: CausalLM, new_rows: dict[str, Tensor], rows: int, source: str) -> None:
    """Write weights, config, and the generation config that the LLM has, if any."""
    save_weights(folder, llm, new_rows)
    llm.config.get_text_config().vocab_size = rows
    llm.config.save_pretrained(folder)
    if generation := find_file(source, GENERATION):
        shutil.copyfile(generation, folder / GENERATION)


def copy_companions(source: StrPath, target: StrPath) -> None:
    """Copy what belongs to a model's folder beside config and weights.

    That is the tokenizer's files, the generation config and, of an expanded model, layout, vocabulary and quantizer.
    Files of the same names in `target` are replaced.
    """
    source, target = Path(source), Path(target)
    for pattern in COMPANIONS:
        for path in source.glob(pattern):
            if path.is_dir():
                try:
                    shutil.copytree(path, target / path.name, dirs_exist_ok=True)
                except shutil.Error as error:  # of each file that could not be copied
                    raise OSError(error.args[0][0][2]) from error
            else:
                shutil.copyfile(path, target / path.name)


def _check_quantizer(bpe: VisualBPE, quantizer: Quantizer, options: ExpandOptions) -> None:
    check_same_quantizer(
        str(options.vocabulary),
        (bpe.quantizer_name, bpe.quantizer_fingerprint),
        options.quantizer,
        (quantizer.name, quantizer.fingerprint),
    )
    if bpe.base_vocab_size != quantizer.codebook_size:
        raise QuantizerError(
            f"{options.vocabulary}: made for a codebook of {bpe.base_vocab_size}, but quantizer {quantizer.name!r} has "
            f"{quantizer.codebook_size}"
        )


def check_llm(llm: StrPath) -> None:
    """Check that `expand` can begin with a folder, hub name or GGUF file, without loading weights.

    Raises:
        ModelError: if it is missing, no causal LM, or already expanded.
    """
    llm = os.fspath(llm)
    if (Path(llm) / LAYOUT_FILE).is_file():
        raise ModelError(f"{llm}: is already expanded (has {LAYOUT_FILE}); expected a plain causal LM")
    is_path = llm.endswith(GGUF) or llm.startswith((".", "/", "~")) or llm.count("/") > 1
    if is_path and not (Path(llm).is_file() if llm.endswith(GGUF) else Path(llm).is_dir()):
        kind = "file" if llm.endswith(GGUF) else "folder"
        raise ModelError(f"{llm}: no such {kind}; expected a causal LM of Hugging Face")
    load_config(llm)


def _add_tokens(tokenizer: Any, layout: VocabularyLayout, llm: str) -> None:
    """Give each id of the shared vocabulary a string; also the text rows that had none, since ids have no gaps."""
    unnamed_rows = range(num_text_tokens(tokenizer), layout.text_size)
    names = [f"{TOKEN_PREFIX}unused_{row}|>" for row in unnamed_rows] + layout.token_strings()
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    if tokenizer.convert_tokens_to_ids(names) != list(range(layout.size - len(names), layout.size)):
        raise ModelError(f"{llm}: its tokenizer does not take {names[0]} to {names[-1]} as its next ids")
