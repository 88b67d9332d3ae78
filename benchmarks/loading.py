"""How much of the host's memory each rank takes until a training has taken its first step.

    python -m benchmarks.loading --folder /tmp/loading [--hidden 1024] [--layers 28] [--ranks 2] [--zero 0 2 3]

Makes a Llama of random weights (about 350 million parameters with these values), once in bf16 and once in float32,
and trains its final norm in bf16 for a step under each ZeRO stage. Meanwhile the memory of each rank is read a hundred
times a second: its own, and with the pages of files that it has mapped, which ranks share and Linux takes back when it
needs them. Printed is the maximum of both over the ranks, beyond what a rank takes that trains a model of one small
layer.
"""

import argparse
import json
import os
import subprocess
import time
from pathlib import Path

import psutil
import torch
import yaml
from transformers import AutoModelForCausalLM

from being_vl.demo.llm import TinyLlamaOptions, make_llama
from being_vl.launch.torchrun import local_command

SENTENCE = "a red square is left of the blue circle and two green stars"


def make_model(folder: Path, hidden: int, layers: int, dtype: torch.dtype) -> Path:
    """A model in a folder of its own, made if it is not there."""
    path = folder / f"{hidden}-{layers}-{dtype}"
    if not path.exists():
        make_llama(TinyLlamaOptions(folder / "records.json", path, hidden, layers, hidden // 64))
        AutoModelForCausalLM.from_pretrained(path, dtype=dtype).save_pretrained(path)
    return path


def peak_memory(folder: Path, model: Path, zero: int, ranks: int) -> tuple[float, float]:
    """The maximum over ranks of a rank's private memory, and of all that is resident, in MB."""
    stage = {"name": "one", "unfreeze": ["norm"], "learning_rate": 1e-3, "max_steps": 1}
    out = folder / f"out-{time.time_ns()}"
    options = {"model": str(model), "records": [str(folder / "records.json")], "out": str(out)}
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(options | {"zero": zero, "precision": {"dtype": "bf16"}, "stages": [stage]})
    )
    command = local_command(ranks, ["train", "--recipe", str(recipe)])
    log = out / "log.jsonl"
    private_bytes, resident_bytes = 0, 0
    with subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE
    ) as launcher:
        while launcher.poll() is None and not (log.is_file() and log.read_text()):
            for child in psutil.Process(launcher.pid).children():
                try:
                    memory = child.memory_info()
                except psutil.NoSuchProcess:
                    continue
                private_bytes = max(private_bytes, memory.rss - memory.shared)
                resident_bytes = max(resident_bytes, memory.rss)
            time.sleep(0.01)
        messages = launcher.communicate()[1].decode()
    if not log.is_file():
        raise SystemExit(messages)
    return private_bytes / 1e6, resident_bytes / 1e6


def main() -> None:
    """Make the models, train, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="for models and trainings")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--zero", type=int, nargs="+", default=[0, 2, 3])
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    conversation = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": SENTENCE}]
    record = {"category": "foundation", "conversations": conversation}
    (options.folder / "records.json").write_text(json.dumps([record | {"id": n} for n in range(32)]))
    small_model = make_model(options.folder, 64, 1, torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        model = make_model(options.folder, options.hidden, options.layers, dtype)
        size = sum(file.stat().st_size for file in model.glob("*.safetensors")) / 1e6
        print(
            f"{dtype}, {size:,.0f} MB; peak MB of a rank, beyond that with a small model: private, and resident"
        )
        for zero in options.zero:
            small_bytes, large_bytes = (
                peak_memory(options.folder, shape, zero, options.ranks) for shape in (small_model, model)
            )
            print(
                f"  ZeRO-{zero}: {large_bytes[0] - small_bytes[0]:8,.0f} {large_bytes[1] - small_bytes[1]:8,.0f}"
            )


if __name__ == "__main__":
    main()
