"""Measure visual BPE beside what else there is, as JSON; `benchmarks.bpe.report` makes tables and plots of it.

    python -m benchmarks.bpe OUT.json [--grids GRIDS.npy]
        [--parts compare merges images threads alpha worst encode small]
    python -m benchmarks.bpe.report OUT.json --into docs/results/visual-bpe.md --images docs/images

Without --grids, they are made by `benchmarks.bpe.grids` of the demo's photographs. Every measurement has a process
of its own, contenders take turns, in another order each round, and medians are reported. CPU seconds are user and
system time of all threads; what else the host does makes them more, by a third or so, and wall time by more than that.

The parts: `compare` all contenders that stand the size, `tokenizers` also with threads, since it takes all cores unless
told otherwise, and more CPU time by that; `merges` time against merges; `images` time and memory against
grids; `threads` how much faster threads are, beside as many programs at once that share nothing, which tell what the
cores are worth at the time; `alpha` what α costs; `worst` inputs that could turn something quadratic; `encode` threads
and the latency of one grid; `small` also the naive recount and the published tools, at a size that they stand.
"""

import argparse
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.bpe import contenders, grids

PARTS = ("compare", "merges", "images", "threads", "alpha", "worst", "encode", "small")
TOKENIZERS_LIMIT = 20_000  # grids; its memory grows with the texts


def jobs(options):
    """All measurements of one round, in order."""
    base = {"grids": options.grids.name, "codebook_size": options.codebook_size, "merges": options.merges}
    count = {"count": options.count}
    ours = {"contender": "being-vl", "threads": 1}
    other = {"contender": "tokenizers", "threads": 1}
    ways = [{"mode": mode, "alpha": alpha} for mode in options.modes for alpha in (0.3, 0.0)]
    first = {"mode": options.modes[0], "alpha": 0.3}

    def one(part, *settings):
        job = {"part": part} | base
        for setting in settings:
            job |= setting
        return job

    yield from (one("compare", count, ours, way) for way in ways)
    for threads in options.threads:
        yield one("compare", count, other, {"threads": threads})
    for merges in range(1024, options.merges + 1, 1024):
        yield one("merges", count, ours, first, {"merges": merges})
        yield one("merges", count, other, {"merges": merges})
    for n in options.counts:
        for threads in options.threads:
            yield one("images", ours, first, {"count": n, "threads": threads, "train_only": True})
        if n <= TOKENIZERS_LIMIT:
            yield one("images", other, {"count": n, "train_only": True})
    trained = {"count": max(options.counts), "train_only": True}
    for threads in options.threads:
        yield one("threads", ours, first, trained, {"threads": threads})
        if threads > 1:
            yield one("threads", ours, first, trained, {"programs": threads})
    for mode in options.modes:
        yield from (one("alpha", count, ours, {"mode": mode, "alpha": alpha}) for alpha in options.alphas)
        yield from (one("worst", ours, {"mode": mode, "alpha": 0.3, "grids": n}) for n in grids.worst_cases())
        for threads in options.threads:
            way = {"mode": mode, "alpha": 0.3, "threads": threads, "latency": threads == 1}
            yield one("encode", count, ours, way)
    small = {"count": options.small[0], "merges": options.small[1]}
    yield from (one("small", small, ours, way) for way in ways)
    yield one("small", small, other)
    yield one("small", small, {"contender": "recount", "mode": "pair", "alpha": 0.3})
    for name, checkout in (("vBPE", options.vbpe), ("MDBPE", options.mdbpe)):
        if checkout is not None:
            yield one("small", small, {"contender": name})


def run(job, options):
    """Measure in a process of its own, or the mean of several at once; what went wrong is a result too."""
    checkouts = {"vBPE": options.vbpe, "MDBPE": options.mdbpe}
    paths = {"path": str(options.grids), "checkout": str(checkouts.get(job["contender"]))}
    command = [sys.executable, "-m", "benchmarks.bpe", "--job", json.dumps(job | paths)]
    # One arena where there is one thread, as in a process without Python's threads: peaks do not depend on where memory
    # came from. Several threads would wait for each other there.
    arenas = {"MALLOC_ARENA_MAX": "1"} if job.get("threads", 1) == 1 else {}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    programs = [
        subprocess.Popen(command, env=os.environ | arenas, **pipes) for _ in range(job.get("programs", 1))
    ]
    results = []
    for program, (output, errors) in [(program, program.communicate()) for program in programs]:
        if program.returncode != 0:
            return {"error": (errors.strip().splitlines() or [f"exit status {program.returncode}"])[-1]}
        results.append(json.loads(output.splitlines()[-1]))
    if len(results) == 1:
        return results[0]
    return {key: statistics.fmean(result[key] for result in results) for key in results[0]}


def child(job):
    """The measurement itself."""
    worst = grids.worst_cases()
    data = worst[job["grids"]][0] if job["grids"] in worst else grids.load(job["path"])[: job.get("count")]
    print(json.dumps(contenders.measure(data, job)))


def machine():
    """What this ran on."""
    import numpy as np
    import tokenizers

    cpu = Path("/proc/cpuinfo")
    names = re.findall("model name.*: (.*)", cpu.read_text()) if cpu.exists() else []
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "tokenizers": tokenizers.__version__,
    }


def main():
    """Run the parts and write the JSON after every round, so that a run that is stopped leaves what it had."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("out", nargs="?", type=Path, help="JSON file; runs are added to those it has")
    parser.add_argument("--grids", type=Path, help=".npy or .npz file (array `grids`)")
    parser.add_argument("--codebook-size", type=int, help="by default the power of two above the grids' ids")
    parser.add_argument("--count", type=int, default=2000, help="grids in most parts")
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 2000, 5000, 10_000, 20_000])
    parser.add_argument("--merges", type=int, default=8192)
    parser.add_argument("--small", type=int, nargs=2, default=[100, 64], metavar=("GRIDS", "MERGES"))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--modes", nargs="+", choices=("pair", "oriented"), default=["pair", "oriented"])
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.0, 0.1, 0.3, 0.5, 1.0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vbpe", type=Path, help="checkout of Being-VL-0.5")
    parser.add_argument("--mdbpe", type=Path, help="checkout of MDBPE with its program built")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job is not None:
        try:
            child(options.job)
        except contenders.Failed as error:
            sys.exit(str(error))
        return
    if options.out is None:
        parser.error("the following arguments are required: out")
    if options.grids is None:
        most = max([options.count, *(options.counts if {"images", "threads"} & {*options.parts} else [])])
        options.grids = Path("runs") / f"grids_builtin_n{most}.npy"
        if not options.grids.exists():
            options.grids.parent.mkdir(exist_ok=True)
            grids.generate(options.grids, most)
    if options.codebook_size is None:
        options.codebook_size = 1 << int(grids.load(options.grids).max()).bit_length()
    content = json.loads(options.out.read_text()) if options.out.exists() else {"measurements": []}
    known = {json.dumps([entry["job"], entry["machine"]]): entry for entry in content["measurements"]}
    here, entries = machine(), []
    for job in jobs(options):
        if job["part"] in options.parts:
            new = {"job": job, "machine": here, "runs": []}
            entries.append(known.pop(json.dumps([job, here]), new))
    content["measurements"] = [*known.values(), *entries]
    for turn in range(options.repeats):
        # After a process that took much memory, the next one gets pages that are slower to come by.
        random.Random(turn).shuffle(entries)
        for number, entry in enumerate(entries, 1):
            print(f"round {turn + 1}, {number}/{len(entries)}: {json.dumps(entry['job'])}", file=sys.stderr)
            entry["runs"].append(run(entry["job"], options))
            options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
