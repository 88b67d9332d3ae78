"""Memory that `being-vl expand` takes, on a stand-in of a large Llama whose files hold only holes.

    python -m benchmarks.expand --folder /tmp/expand --layers 32

writes Llama-3-8B's shape (bfloat16, untied, files of 5 GB) as sparse files that take no room on the disk, expands it by
8,192 ids and 1,024 merges in a process of its own, and prints that process's largest resident memory as the kernel
counted it, mapped file pages included. The result is as large as the model.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from being_vl import VisualBPE
from being_vl.quantizer.models.tiled import VQGAN, new_model

CODEBOOK, MERGES = 8192, 1024


def sparse_llama(folder: Path, layers: int) -> int:
    """Write a Llama of 8B's width whose weights are zeros that take no room; returns the bytes of its weights."""
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        weights = LlamaForCausalLM(config).to(torch.bfloat16).state_dict()
    split = split_torch_state_dict_into_shards(weights, max_shard_size="5GB")
    for file, names in split.filename_to_tensors.items():
        header, end = {}, 0
        for name in names:
            start, end = end, end + weights[name].nbytes
            header[name] = {"dtype": "BF16", "shape": list(weights[name].shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    words = {f"w{i}": i for i in range(127_999)} | {"</s>": 127_999}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), eos_token="</s>"
    )
    tokenizer.save_pretrained(folder)
    return sum(tensor.nbytes for tensor in weights.values())


def main() -> None:
    """Make the stand-in, expand it, print the memory, remove both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where both models go; must not exist")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--init", default="he")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True)
    try:
        size = sparse_llama(arguments.folder / "llm", arguments.layers)
        quantizer = VQGAN(new_model(CODEBOOK, code_dim=8, tile=8, width=32), "stand-in", 64)
        quantizer.save_pretrained(arguments.folder / "quantizer")
        grids = np.random.default_rng(0).zipf(1.3, (200, 16, 16)) % CODEBOOK
        VisualBPE.train(
            list(grids),
            base_vocab_size=CODEBOOK,
            num_merges=MERGES,
            min_frequency=1,
            quantizer_fingerprint=quantizer.fingerprint,
        ).save(arguments.folder / "vocabulary.json")
        start = time.perf_counter()
        options = {"llm": "llm", "quantizer": "quantizer", "vocabulary": "vocabulary.json", "out": "out"}
        flags = [f"--{name}={arguments.folder / path}" for name, path in options.items()]
        command = [sys.executable, "-m", "being_vl", "expand", *flags, f"--init={arguments.init}"]
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        files = len(list((arguments.folder / "out").glob("*.safetensors")))
        print(
            f"{size / 1e9:.1f} GB of weights into {files} files, init {arguments.init}: "
            f"largest resident memory {peak / 1e9:.2f} GB, {seconds:.0f} s"
        )
    finally:
        shutil.rmtree(arguments.folder)


if __name__ == "__main__":
    main()
