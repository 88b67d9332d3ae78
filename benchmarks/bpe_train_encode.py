"""Training and encoding beside Hugging Face `tokenizers` (1-D BPE on the raster order of the same ids).

    python benchmarks/bpe_train_encode.py [GRIDS.npz] [--codebook-size 8192] [--num-merges 8192] [--threads 1] ...

GRIDS.npz holds an (N, H, W) integer array `grids`; without it, grids come from a seeded generator. Each measurement
runs in a process of its own, the contenders take turns, and the table shows medians
(in brackets: how many times faster than `tokenizers`). CPU seconds are user and system
time of all threads, so they hardly depend on what else the machine does.
"""

import argparse
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

CONTENDERS = {
    "being-vl, pair, α = 0.3": ("pair", 0.3),
    "being-vl, pair, α = 0": ("pair", 0.0),
    "being-vl, oriented, α = 0.1": ("oriented", 0.1),
    "being-vl, oriented, α = 0": ("oriented", 0.0),
    "tokenizers, 1-D": None,
}


def synthetic(count, codebook_size, seed=0, side=32):
    """Grids with a skewed use of ids, in which half of the cells repeat the cell on the left or above."""
    rng = np.random.default_rng(seed)
    shape = (count, side, side)
    palette = (rng.pareto(1.0, (count, 40)) * codebook_size / 40).astype(np.int64) % codebook_size
    grids = np.take_along_axis(palette, rng.integers(0, 40, shape).reshape(count, -1), 1).reshape(shape)
    copied = rng.integers(0, 4, shape)
    for row in range(side):
        for column in range(side):
            if column:
                left = copied[:, row, column] == 0
                grids[left, row, column] = grids[left, row, column - 1]
            if row:
                above = copied[:, row, column] == 1
                grids[above, row, column] = grids[above, row - 1, column]
    return grids.astype(np.uint16 if codebook_size <= 1 << 16 else np.uint32)


def load(arguments):
    """The grids, and the number of ids in their codebook."""
    if arguments.grids is None:
        return synthetic(arguments.count, arguments.codebook_size), arguments.codebook_size
    with np.load(arguments.grids) as file:
        grids = file["grids"][: arguments.count]
    return grids, arguments.codebook_size or int(grids.max()) + 1


def clock():
    """(CPU seconds, wall seconds) so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return np.array([usage.ru_utime + usage.ru_stime, time.perf_counter()])


def peak():
    """Largest resident memory so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name, arguments):
    """One run of one contender, in this process."""
    os.environ["RAYON_NUM_THREADS"] = str(arguments.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if arguments.threads > 1 else "false"
    grids, codebook_size = load(arguments)
    if CONTENDERS[name] is None:
        train, encode = tokenizers_1d(grids, codebook_size, arguments)
    else:
        train, encode = being_vl(grids, codebook_size, arguments, *CONTENDERS[name])
    before = peak()
    start = clock()
    train()
    trained = clock()
    memory = peak() - before
    tokens = encode()
    encoded = clock()
    (train_cpu, train_wall), (encode_cpu, encode_wall) = trained - start, encoded - trained
    return {
        "train_cpu": train_cpu,
        "train_wall": train_wall,
        "memory": memory,
        "encode_cpu": encode_cpu,
        "encode_wall": encode_wall,
        "ids": grids.size,
        "tokens": tokens,
    }


def being_vl(grids, codebook_size, arguments, mode, alpha):
    """Ours: a function that trains, and one that encodes all grids and returns the number of tokens."""
    from being_vl import VisualBPE

    bpe = None

    def train():
        nonlocal bpe
        bpe = VisualBPE.train(
            grids, codebook_size, arguments.num_merges, mode, alpha, num_threads=arguments.threads
        )

    return train, lambda: len(bpe.encode_batch(grids, num_threads=arguments.threads).values)


def tokenizers_1d(grids, codebook_size, arguments):
    """The same two for `tokenizers`; every id is a character and every grid one word, made before the clock starts."""
    from tokenizers import Tokenizer, models, trainers

    first = 0x10000
    texts = [
        "".join(map(chr, row)) for row in (grids.reshape(len(grids), -1).astype(np.int64) + first).tolist()
    ]
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=codebook_size + arguments.num_merges,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=[chr(first + i) for i in range(codebook_size)],
    )
    return (
        lambda: tokenizer.train_from_iterator(texts, trainer),
        lambda: sum(len(encoding) for encoding in tokenizer.encode_batch_fast(texts)),
    )


def table(runs, arguments, grids, codebook_size):
    """Medians as a markdown table."""
    cpu = Path("/proc/cpuinfo")
    names = re.findall("model name.*: (.*)", cpu.read_text()) if cpu.exists() else []
    processor = names[0] if names else platform.processor()
    source = "generated grids" if arguments.grids is None else Path(arguments.grids).name
    print(
        f"{source}: {len(grids)} grids of {grids.shape[1]}×{grids.shape[2]}, codebook {codebook_size}, "
        f"{arguments.num_merges} merges, {arguments.threads} thread(s), {arguments.repeats} run(s); {processor}\n"
    )
    print(
        "| | train, CPU s | train, wall s | memory, MB | encode, CPU ms per grid | encode, M ids/s of CPU | length |"
    )
    print("|---|---|---|---|---|---|---|")
    medians = {
        name: {key: statistics.median(result[key] for result in results) for key in results[0]}
        for name, results in runs.items()
    }
    reference = next((medians[name] for name in runs if CONTENDERS[name] is None), None)
    for name, value in medians.items():
        ratio = {key: f" ({reference[key] / value[key]:.1f}×)" if reference else "" for key in value}
        print(
            f"| {name} | {value['train_cpu']:.2f}{ratio['train_cpu']} | {value['train_wall']:.2f} "
            f"| {value['memory']:.0f} | {1000 * value['encode_cpu'] / len(grids):.3f}{ratio['encode_cpu']} "
            f"| {value['ids'] / value['encode_cpu'] / 1e6:.1f} | {value['tokens'] / value['ids']:.4f} |"
        )


def main():
    """Run all contenders and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("grids", nargs="?", help=".npz with an array `grids`; by default grids are generated")
    parser.add_argument("--count", type=int, default=2000, help="number of grids to take or generate")
    parser.add_argument("--codebook-size", type=int, default=8192)
    parser.add_argument("--num-merges", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", help="contenders whose names contain this")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        print(json.dumps({key: float(value) for key, value in measure(arguments.measure, arguments).items()}))
        return
    names = [name for name in CONTENDERS if arguments.only is None or arguments.only in name]
    runs = {name: [] for name in names}
    for _ in range(arguments.repeats):
        for name in names:
            command = [sys.executable, *sys.argv, "--measure", name]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            runs[name].append(json.loads(output))
    table(runs, arguments, *load(arguments))


if __name__ == "__main__":
    main()
