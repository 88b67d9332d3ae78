"""How fast records are prepared, how fast a training reads them, and in how much memory.

    python -m benchmarks.prepare --model DIR [--grids DIR] [--count 100000] [--workers 0 2] [--words 8] [--links 1]

Generates records of a question and an answer of `--words` words, each about one of the grids if there are some. A
process of its own prepares them; another opens what was made and reads 10,000 of them in a random order. With
`--links` N it is given each Arrow file N times, as links to it: so many more records are opened, as a training would,
without preparing them.

Reported: records and tokens per second of preparing, the CPU seconds of all its processes, imports included, and the
peak of resident memory of its largest; the records that are opened, the seconds that takes and the process's peak of
resident memory, imports included; the records read per second, and the process's memory then, without pages of files,
which Linux takes back when it needs them.
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

from being_vl.data.options import CATEGORIES, PrepareOptions
from being_vl.data.prepare import load_builder, prepare
from being_vl.data.store import PreparedSequences, shard_path
from being_vl.files import read_manifest, write_json
from being_vl.quantize.grids import GridStore

READS = 10_000
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
                    {"from": "human", "value": "What is it?"},
                    {"from": "gpt", "value": answer},
                ],
            }
            file.write(json.dumps(record | ({"image": keys[n % len(keys)]} if keys else {})) + "\n")


def measure(job):
    """Do `prepare` or `read` of the options in a file; prints what it took as JSON."""
    values = json.loads(job.read_text())
    kind = values.pop("kind")
    paths = {name: values[name] and Path(values[name]) for name in ("model", "out", "grids")}
    options = PrepareOptions(**values | paths | {"records": [Path(path) for path in values["records"]]})
    began = time.perf_counter()
    if kind == "prepare":
        prepare(options)
        manifest = read_manifest(options.out, "sequences")
        seconds = time.perf_counter() - began
        usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        peak = max(used.ru_maxrss for used in usage) * 1024 / 1e9
        busy = sum(used.ru_utime + used.ru_stime for used in usage)
        result = [manifest["records"] / seconds, manifest["tokens"] / seconds, busy, peak]
    else:
        builder = load_builder(options)
        began = time.perf_counter()
        sequences = PreparedSequences(options.out, builder)
        opened = time.perf_counter()
        peak = memory("VmHWM")
        places = [(group, n) for group, lengths in sequences.lengths.items() for n in [len(lengths)]]
        draw = np.random.default_rng(0)
        for position in range(READS):
            group, records = places[position % len(places)]
            sequences.get(group, int(draw.integers(records)), position)
        records = sum(map(len, sequences.lengths.values()))
        result = [records, opened - began, peak, READS / (time.perf_counter() - opened), memory("RssAnon")]
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


def link(source, target, times):
    """A folder in which each Arrow file of another stands several times."""
    target.mkdir()
    manifest = read_manifest(source, "sequences")
    shards = [
        shard | {"file": shard_path(target, n * times + copy).name}
        for n, shard in enumerate(manifest["shards"])
        for copy in range(times)
    ]
    for n, shard in enumerate(shards):
        (target / shard["file"]).hardlink_to(source / manifest["shards"][n // times]["file"])
    counts = {name: manifest[name] * times for name in ("records", "examples", "tokens")}
    write_json(target / "manifest.json", manifest | counts | {"shards": shards})


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
    parser.add_argument("--links", type=int, default=1)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure)
        return
    keys = list(GridStore.open(options.grids)) if options.grids else []
    print(
        "| records | workers | prepared /s | tokens /s | CPU s | peak GB | opened | open s | peak GB | read /s | GB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for count in options.count:
        for workers in options.workers:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder)
                write(path / "records.jsonl", count, options.words, keys)
                values = {"model": options.model, "records": [str(path / "records.jsonl")]}
                values |= {"out": str(path / "out"), "grids": options.grids and str(options.grids)}
                values["workers"] = workers
                records, tokens, busy, peak = run(path / "job.json", values | {"kind": "prepare"})
                link(path / "out", path / "links", options.links)
                values |= {"out": str(path / "links"), "kind": "read"}
                found, opened, at_open, read, after = run(path / "job.json", values)
                print(
                    f"| {count:,} | {workers} | {records:,.0f} | {tokens:,.0f} | {busy:.0f} | {peak:.2f} "
                    f"| {found:,} | {opened:.1f} | {at_open:.2f} | {read:,.0f} | {after:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
