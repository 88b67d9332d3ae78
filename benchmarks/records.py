"""How fast files of records are read, and in how much memory.

    python -m benchmarks.records [--count 1000000 10000000] [--kinds json jsonl messages parquet tar] [--folder DIR]

Generates records of one short question and answer, no two of them equal; `messages` is chat data as JSON lines. Each
file is then read by a process of its own that opens it, checks all records in turn and sorts them by category, and
reads 10,000 in a random order. Reported: the size of the file, the seconds to open it, records per second of each way,
and the peak of resident memory of the process, imports included.
"""

import argparse
import io
import json
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np

from being_vl.data.options import CATEGORIES
from being_vl.data.records import Records

RANDOM_READS = 10_000
ROWS = 1000
NAMES = {
    "json": "records.json",
    "jsonl": "records.jsonl",
    "messages": "messages.jsonl",
    "parquet": "records.parquet",
    "tar": "records.tar",
}


def records(count, chat=False):
    """Generated LLaVA JSON, or chat data."""
    sides = ("role", "content", "user", "assistant") if chat else ("from", "value", "human", "gpt")
    role, text, user, assistant = sides
    for n in range(count):
        yield {
            "id": str(n),
            "images" if chat else "image": [f"{n}.png"] if chat else f"{n}.png",
            "category": CATEGORIES[n % len(CATEGORIES)],
            "messages" if chat else "conversations": [
                {role: user, text: "<image>\nWhat is it?"},
                {role: assistant, text: f"Number {n}."},
            ],
        }


def write(path, count):
    """Write generated records to `path`, in the format of its name."""
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.Table.from_pylist(list(records(1)))
        with pq.ParquetWriter(path, table.schema) as writer:
            batch = []
            for n, record in enumerate(records(count), 1):
                batch.append(record)
                if n % ROWS == 0 or n == count:
                    writer.write_table(pa.Table.from_pylist(batch))
                    batch = []
    elif path.suffix == ".tar":
        with tarfile.open(path, "w") as tar:
            for n, record in enumerate(records(count)):
                data = json.dumps(record).encode()
                info = tarfile.TarInfo(f"{n:09d}.json")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
                tar.members = []
    else:
        start, separator, end = ("[", ",\n", "]") if path.suffix == ".json" else ("", "\n", "")
        with path.open("w") as file:
            file.write(start)
            for n, record in enumerate(records(count, path.stem == "messages")):
                file.write((separator if n else "") + json.dumps(record))
            file.write(end)


def measure(path):
    """Seconds to open, records per second in turn and in random order, and peak memory in GB; printed as JSON."""
    start = time.perf_counter()
    source = Records(path)
    open_end = time.perf_counter()
    source.group_by_category()
    reading = time.perf_counter()
    reads = min(RANDOM_READS, len(source))
    for number in np.random.default_rng(0).integers(len(source), size=reads).tolist():
        source[number]
    end = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(json.dumps([open_end - start, len(source) / (reading - open_end), reads / (end - reading), peak]))


def main():
    """Generate, measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--kinds", nargs="+", default=list(NAMES))
    parser.add_argument("--folder", type=Path, help="where the files are written; they are deleted")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure)
        return
    print(
        "| file | records | GB | open s | in turn /s | random /s | peak GB |\n|---|---|---|---|---|---|---|"
    )
    for count in options.count:
        for kind in options.kinds:
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                path = Path(folder) / NAMES[kind]
                write(path, count)
                command = [sys.executable, "-m", "benchmarks.records", "--measure", str(path)]
                result = subprocess.run(command, check=True, stdout=subprocess.PIPE)
                open_seconds, sequential_rate, random_rate, peak = json.loads(result.stdout)
                size = path.stat().st_size / 1e9
                print(
                    f"| {kind} | {count:,} | {size:.2f} | {open_seconds:.1f} | {sequential_rate:,.0f} "
                    f"| {random_rate:,.0f} | {peak:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
