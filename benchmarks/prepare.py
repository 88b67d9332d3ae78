"""How fast records are prepared, how fast a training reads them, and in how much memory.

    python -m benchmarks.prepare --model DIR [--grids DIR] [--count 100000] [--workers 0 2] [--words 8] [--opened N]

Generates records of a question and an answer of `--words` words, each about one of the grids if there are some. A
process of its own prepares them; another opens what was made, shuffles it as a training does, and reads the first
10,000. With `--opened` N it is given N tokenised records instead, generated with as many tokens each, no two of them
equal: more are opened than can be prepared in a short time.

Reported: records and tokens per second of preparing, the CPU seconds of all its processes, imports included, and the
peak of resident memory of its largest; the records that are opened, the seconds that takes, those until the first
record is there, the records read per second, the process's peak of resident memory, imports included, and what of it
is left without pages of files, which Linux takes back when it needs them.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from being_vl.data.curriculum import Curriculum
from being_vl.data.options import CATEGORIES, PrepareOptions
from being_vl.data.prepare import LEFT_OUT, prepare
from being_vl.data.sequences import SequenceBuilder, TokenSequence
from being_vl.data.store import KIND, PreparedSequences, sequence_columns
from being_vl.files import read_manifest, sha256, write_json
from being_vl.shards.arrow import shard_path, write_table
from being_vl.shards.grids import GridStore

READS = 10_000
SHARD_SIZE = 10_000
WORDS = ["a", "red", "square", "is", "left", "of", "the", "blue", "circle", "and", "two", "green", "stars"]


def write(path, count, words, keys):
    """Write generated records as JSON lines."""
    draw = np.random.default_rng(0)
    with path.open("w") as file:
        for n in range(count):
            answer = " ".join(WORDS[i] for i in draw.integers(len(WORDS), size=words))
            record = {
                "id": n,
                "category": CATEGORIES[n % len(CATEGORIES)],
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat is it?" if keys else "What is it?"},
                    {"from": "gpt", "value": answer},
                ],
            }
            file.write(json.dumps(record | ({"image": keys[n % len(keys)]} if keys else {})) + "\n")


def measure(job):
    """Do `prepare` or `read` of the options in a file; prints what it took as JSON."""
    values = json.loads(job.read_text())
    kind = values.pop("kind")
    options = PrepareOptions(**values)
    start = time.perf_counter()
    if kind == "prepare":
        prepare(options)
        manifest = read_manifest(options.out, KIND)
        seconds = time.perf_counter() - start
        usages = [resource.getrusage(scope) for scope in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        peak = max(usage.ru_maxrss for usage in usages) * 1024 / 1e9
        cpu_seconds = sum(usage.ru_utime + usage.ru_stime for usage in usages)
        result = [manifest["records"] / seconds, manifest["tokens"] / seconds, cpu_seconds, peak]
    else:
        builder = SequenceBuilder.from_model(options.model, options.grids, options.sequences.max_length)
        start = time.perf_counter()
        sequences = PreparedSequences(options.out, builder)
        open_time = time.perf_counter()
        draw = Curriculum(sequences.lengths, {}, seed=0).draw
        shuffle_time = time.perf_counter()
        for _ in range(READS):
            entry = draw()
            sequences.get(entry.group, entry.number, entry.position)
        speed = READS / (time.perf_counter() - shuffle_time)
        records = sum(map(len, sequences.lengths.values()))
        times = [open_time - start, shuffle_time - open_time, speed]
        result = [records, *times, memory("VmHWM"), memory("RssAnon")]
    print(json.dumps(result))


def memory(name):
    """This process's memory in GB, by its name in Linux's account."""
    (line,) = (
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")
    )
    return int(line.split()[1]) * 1024 / 1e9


def run(job, values):
    """`measure` in a process of its own."""
    write_json(job, values)
    command = [sys.executable, "-m", "benchmarks.prepare", "--model", values["model"], "--measure", str(job)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def generate(source, target, count):
    """A folder of `count` records of random ids, of the mean length of those in another and with its manifest."""
    target.mkdir()
    manifest = read_manifest(source, KIND)
    tokens = manifest["tokens"] // manifest["records"]
    weights = np.repeat(np.float32([0, 1]), [tokens // 2, tokens - tokens // 2])
    draw, shards = np.random.default_rng(0), []
    for start in range(0, count, SHARD_SIZE):
        ids = draw.integers(100, 300, (min(SHARD_SIZE, count - start), tokens), dtype=np.int32)
        sequences = [
            TokenSequence(
                row,
                weights,
                CATEGORIES[n % len(CATEGORIES)],
                "generated",
                f"generated.jsonl: record {start + n}",
            )
            for n, row in enumerate(ids)
        ]
        path = shard_path(target, KIND, len(shards))
        columns, counts = sequence_columns(sequences)
        write_table(path, columns, counts)
        shards.append({"file": path.name, **counts, "sha256": sha256(path)})
    (target / LEFT_OUT).touch()
    write_json(target / "manifest.json", manifest | {"records": count, "sequences": count, "shards": shards})


def main():
    """Generate, measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--grids", type=Path)
    parser.add_argument("--count", type=int, nargs="+", default=[100_000])
    parser.add_argument("--workers", type=int, nargs="+", default=[0])
    parser.add_argument("--words", type=int, default=8)
    parser.add_argument("--opened", type=int)
    parser.add_argument("--folder", type=Path, help="where the files are written; they are deleted")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure)
        return
    keys = list(GridStore.open(options.grids)) if options.grids else []
    print(
        "| records | workers | prepared /s | tokens /s | CPU s | peak GB "
        "| opened | open s | shuffle s | read /s | peak GB | GB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for count in options.count:
        for workers in options.workers:
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                path = Path(folder)
                write(path / "records.jsonl", count, options.words, keys)
                values = {"model": options.model, "records": [str(path / "records.jsonl")]}
                values |= {"out": str(path / "out"), "grids": [str(options.grids)] if options.grids else []}
                values["workers"] = workers
                records, tokens, cpu_seconds, peak = run(path / "job.json", values | {"kind": "prepare"})
                if options.opened:
                    generate(path / "out", path / "generated", options.opened)
                    values["out"] = str(path / "generated")
                read_records, *times, read_peak, own_memory = run(
                    path / "job.json", values | {"kind": "read"}
                )
                open_seconds, shuffle_seconds, read_speed = times
                print(
                    f"| {count:,} | {workers} | {records:,.0f} | {tokens:,.0f} | {cpu_seconds:.0f} | {peak:.2f} "
                    f"| {read_records:,} | {open_seconds:.1f} | {shuffle_seconds:.1f} | {read_speed:,.0f} "
                    f"| {read_peak:.2f} | {own_memory:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
