"""Two versions of being-vl beside each other: are merges and ids the same, and what does each take?

    pip install --no-deps --target OLD path/to/an/earlier/checkout
    python -m benchmarks.bpe.versions OLD NEW --grids grids.npz --merges 8192 --rounds 20

OLD and NEW are folders with a package `being_vl` in them. For both modes and several α, with one thread and with two,
their merges and the ids of all grids are compared. Then both learn and encode on one thread, in alternating processes,
and the medians of their CPU times are printed, as a ratio.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys

MODES = "pair", "oriented"
WORK = """
import hashlib, json, sys, time
import numpy as np
from being_vl import VisualBPE

job = json.loads(sys.argv[1])
content = np.load(job["grids"])
grids = (content[content.files[0]] if hasattr(content, "files") else content)[: job["count"]]
size = job["codebook_size"] or int(grids.max()) + 1
start = time.process_time()
bpe = VisualBPE.train(
    grids, size, job["merges"], merge_mode=job["mode"], alpha=job["alpha"], num_threads=job["threads"]
)
learn_seconds = time.process_time() - start
encode_seconds = []
for _ in range(job["repeats"]):
    start = time.process_time()
    batch = bpe.encode_batch(grids, num_threads=job["threads"])
    encode_seconds.append(time.process_time() - start)
ids = np.ascontiguousarray(batch.values).tobytes() + np.ascontiguousarray(batch.offsets).tobytes()
merges = json.dumps([list(map(int, merge)) for merge in bpe.merges]).encode()
hashes = [hashlib.sha256(data).hexdigest() for data in (merges, ids)]
print(json.dumps({"hashes": hashes, "learn": learn_seconds, "encode": min(encode_seconds)}))
"""


def measure(folder, job):
    """Hashes and CPU seconds of one version, in a process of its own."""
    environment = os.environ | {"PYTHONPATH": folder}
    command = [sys.executable, "-c", WORK, json.dumps(job)]
    result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(result.stdout)


def compare_results(folders, job):
    """Print for each setting whether merges and ids are the same; returns the number of settings that differ."""
    differences = 0
    for mode in MODES:
        for alpha in (0.0, 0.3, 1.0):
            for threads in (1, 2):
                setting = {"mode": mode, "alpha": alpha, "threads": threads, "repeats": 1}
                merges, ids = zip(
                    *(measure(folder, job | setting)["hashes"] for folder in folders), strict=True
                )
                is_same = len(set(merges)) == len(set(ids)) == 1
                differences += not is_same
                verdict = "the same" if is_same else f"DIFFERENT merges {merges}, ids {ids}"
                print(f"{mode}, α = {alpha}, {threads} threads: {verdict}", flush=True)
    return differences


def compare_times(folders, job, rounds):
    """Print the medians of CPU seconds and their ratio, of alternating processes."""
    for mode in MODES:
        runs = {folder: [] for folder in folders}
        for number in range(rounds):
            for folder in folders if number % 2 else reversed(folders):
                setting = {"mode": mode, "alpha": 0.3, "threads": 1, "repeats": 5}
                runs[folder].append(measure(folder, job | setting))
        for task in ("learn", "encode"):
            old, new = (statistics.median(run[task] for run in runs[folder]) for folder in folders)
            print(
                f"{task}, {mode}: {old:.4f} and {new:.4f} CPU s, {new / old:.3f} times ({rounds} rounds)",
                flush=True,
            )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", help="folder with the earlier package")
    parser.add_argument("new", help="folder with the later package")
    parser.add_argument("--grids", required=True, help=".npy or .npz of grids")
    parser.add_argument("--count", type=int, help="how many of them to take; all by default")
    parser.add_argument("--codebook_size", type=int, help="by default what the largest id needs")
    parser.add_argument("--merges", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=20, help="of the times; 0 for none")
    options = parser.parse_args()
    folders = [options.old, options.new]
    job = {name: getattr(options, name) for name in ("grids", "count", "codebook_size", "merges")}
    differences = compare_results(folders, job)
    if options.rounds:
        compare_times(folders, job, options.rounds)
    sys.exit(1 if differences else 0)


if __name__ == "__main__":
    main()
