"""Tiny real models, tokenizers, quantizers and grids, made on the spot: nothing is downloaded."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from being_vl import VisualBPE
from being_vl.data.options import CATEGORIES, PrepareOptions
from being_vl.data.sequences import RecordGroup, SequenceBuilder, TokenSequence
from being_vl.files import sha256, write_manifest
from being_vl.model.expand import expand
from being_vl.model.options import ExpandOptions
from being_vl.quantizer.base import Quantizer
from being_vl.quantizer.models.tiled import VQGAN, cut_tiles, new_model
from being_vl.shards.arrow import shard_path, write_table
from being_vl.shards.grids import GridRow, GridStore, grid_columns

torch.set_num_threads(1)  # at these sizes more threads only wait for each other

Family = Literal[
    *("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3"),
    *("smollm3", "olmo", "olmo2", "olmo3", "phi"),
]
CONFIGS: dict[Family, Any] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "mistral": MistralConfig,
    "gemma": GemmaConfig,
    "gemma2": Gemma2Config,
    "gemma3": Gemma3TextConfig,
    "smollm3": SmolLM3Config,
    "olmo": OlmoConfig,
    "olmo2": Olmo2Config,
    "olmo3": Olmo3Config,
    "phi": PhiConfig,  # its output head has a bias
}

TEXT = [
    "USER: What colour is the circle?\nASSISTANT: The circle is red.",
    "How many squares are there? There are three large blue squares on a striped background.",
    "Describe the picture. A small green triangle stands left of a yellow star, above a black circle.",
    "Is the star above the triangle? Yes, it is. No, it is below. user assistant system",
    "Which one is larger, the first or the second image? They are equal: 0 1 2 3 4 5 6 7 8 9.",
]

LLAMA3 = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Qwen3: the last answer opens with an empty thought, earlier ones do not.
QWEN3 = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer(
    bos: bool = True, template: str | None = None, vocab_size: int = 400
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `TEXT`: `bos` as Llama has and Qwen has not."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = ["<|begin_of_text|>"] if bos else []
    names += ["<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    names += ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(name, special=True) for name in names],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT, trainer)
    result = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin_of_text|>" if bos else None,
        eos_token="<|end_of_text|>",
    )
    result.chat_template = template
    return result


def llm(
    folder: Path,
    family: Family = "llama",
    tied: bool = True,
    template: str | None = None,
    hidden: int = 32,
    layers: int = 4,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    shard_size: str = "5GB",
    **config: Any,
) -> Path:
    """Save a tiny causal LM with its tokenizer, as a pretrained one would lie on disk.

    Its embedding has a few rows more than the tokenizer has ids, as many published models.
    """
    words = tokenizer(bos=family == "llama", template=template)
    options = {
        "vocab_size": len(words) + 5,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden // 4,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": None,
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](**options | config)).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard_size)
    words.save_pretrained(folder)
    return folder


def quantizer(folder: Path, codebook_size: int = 16, name: str = "tiny", seed: int = 0) -> VQGAN:
    """Save a quantizer of 32×32 pixels to 4×4 ids: random weights, and codes that tell colours apart."""
    torch.manual_seed(seed)
    model = new_model(codebook_size, code_dim=4, tile=8, width=32)
    colours = torch.rand(codebook_size, 3, 1, 1).expand(-1, -1, 8, 8) * 2 - 1
    with torch.no_grad():
        model.quantize.embedding.weight.copy_(model.encode(cut_tiles(model, colours)).latents.flatten(1))
    result = VQGAN(model, name=name, size=32)
    result.save_pretrained(folder)
    return result


def write_grids(
    folder: Path,
    content: dict[str, NDArray[np.int64]],
    quantizer_of_grids: Quantizer,
    failures: dict[str, str] | None = None,
    root: Path | None = None,
) -> GridStore:
    """Write grids as `being-vl quantize` would."""
    rows = [GridRow(key, grid, (32, 32), "0" * 64) for key, grid in content.items()]
    folder.mkdir(parents=True, exist_ok=True)
    path = shard_path(folder, "grids", 0)
    write_table(path, grid_columns(rows, quantizer_of_grids.codebook_size), {})
    quantizer_fields = {
        "name": quantizer_of_grids.name,
        "fingerprint": quantizer_of_grids.fingerprint,
        "codebook_size": quantizer_of_grids.codebook_size,
        "downsample": quantizer_of_grids.downsample,
    }
    shards = [{"file": path.name, "grids": len(rows), "sha256": sha256(path)}]
    fields = {"quantizer": quantizer_fields, "failures": failures or {}, "shards": shards}
    write_manifest(folder, "grids", {"root": str(root or folder.absolute() / "images"), **fields})
    return GridStore.open(folder)


def grids(
    folder: Path,
    keys: list[str],
    quantizer_of_grids: Quantizer,
    seed: int = 0,
    failures: dict[str, str] | None = None,
) -> GridStore:
    """Write random 4×4 grids of equal pairs of ids, so that there is something to merge."""
    generator = np.random.default_rng(seed)
    content = {
        key: np.repeat(generator.integers(quantizer_of_grids.codebook_size, size=(2, 4)), 2, axis=0)
        for key in keys
    }
    return write_grids(folder, content, quantizer_of_grids, failures)


def expanded(
    folder: Path, keys: list[str], tied: bool = True, family: Family = "llama", **options: Any
) -> tuple[Path, GridStore]:
    """All that training and asking need, in `folder`: llm, quantizer, grids, vocabulary and the expanded model."""
    store = grids(folder / "grids", keys, quantizer(folder / "quantizer"))
    vocabulary = folder / "vocabulary.json"
    VisualBPE.train(
        list(store.values()),
        base_vocab_size=store.codebook_size,
        num_merges=8,
        quantizer_name=store.quantizer_name,
        quantizer_fingerprint=store.quantizer_fingerprint,
    ).save(vocabulary)
    base = llm(folder / "llm", family, tied, **options)
    expand(ExpandOptions(str(base), vocabulary, folder / "model", str(folder / "quantizer")))
    return folder / "model", store


def training_inputs(chain: Path) -> dict[str, Any]:
    """What a recipe of a training on the tied model of the fixture `chain` begins with."""
    records = [str(chain / "data" / "train.json")]
    return {"model": str(chain / "tied"), "grids": str(chain / "grids"), "records": records}


def builder(options: PrepareOptions) -> SequenceBuilder:
    """What `prepare` with these options builds sequences by."""
    sequences = options.sequences
    return SequenceBuilder.from_model(
        options.model, options.grids, sequences.max_length, sequences.too_long, sequences.loss
    )


class SequenceList:
    """`Sequences` in memory."""

    dropout = 0.0
    categories = CATEGORIES

    def __init__(self, sequences: list[TokenSequence], pad_id: int = 0) -> None:
        self.pad_id = pad_id
        self.sequences: dict[RecordGroup, list[TokenSequence]] = {}
        for sequence in sequences:
            self.sequences.setdefault(sequence.group, []).append(sequence)
        self.lengths = {
            group: np.array([len(e.ids) for e in group_sequences], np.int32)
            for group, group_sequences in self.sequences.items()
        }

    def get(self, group: RecordGroup, index: int, position: int, share: float = 1.0) -> TokenSequence:
        return self.sequences[group][index]
