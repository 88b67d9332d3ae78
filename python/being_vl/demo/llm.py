"""A tiny Llama with a tokenizer of whole words: it stands for the pretrained LLM."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from being_vl.files import MANIFEST, list_files_below, write_aside, write_manifest
from being_vl.options import Options, StrPath

KIND = "llm"
"""Kind of the manifest of an untrained Llama."""

# No mark between question and answer: the answer follows the word that the question ends in, and so the first
# attention layer can look that word up. With marks in between, this model's budget does not suffice to learn which
# object is asked for.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ message['content'] }}\n"
    "{% else %}{{ message['content'] }}{{ eos_token }}\n{% endif %}{% endfor %}"
)


@dataclass
class TinyLlamaOptions(Options):
    """An untrained Llama whose words are those of some records.

    Args:
        records: LLaVA JSON whose words make the tokenizer.
        out: Folder of the model.
        hidden_size: Width.
        layers: Decoder layers.
        heads: Attention heads.
        seed: Seed of the weights.
    """

    records: Path
    out: Path
    hidden_size: int = 96
    layers: int = 3
    heads: int = 3
    seed: int = 0


def make_llama(options: TinyLlamaOptions) -> None:
    """Write the folder of an untrained Llama with its tokenizer."""
    tokenizer = word_tokenizer(options.records)
    torch.manual_seed(options.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden_size,
        intermediate_size=options.hidden_size * 8 // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        # About 1 / sqrt(width). The library's 0.02 suits widths of thousands; here attention would stay flat for
        # hundreds of steps.
        initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with write_aside(options.out, KIND) as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_manifest(folder, KIND, {"files": sorted({MANIFEST, *list_files_below(folder)})})


def word_tokenizer(records: StrPath) -> PreTrainedTokenizerFast:
    """A tokenizer of the words and punctuation marks of some records; it ignores case and question marks."""
    texts = [
        turn["value"]
        for record in json.loads(Path(records).read_text(encoding="utf-8"))
        for turn in record["conversations"]
    ]
    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("?", " ")])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("[.,;:!]"), "isolated")]
    )
    special_tokens = ["<pad>", "<bos>", "<eos>", "<unk>"]
    trainer = trainers.WordLevelTrainer(special_tokens=special_tokens, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=True,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer
