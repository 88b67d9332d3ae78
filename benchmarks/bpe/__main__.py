"""Measure visual BPE beside other tokenizers, as JSON; `benchmarks.bpe.report` makes tables and plots of it.

    python -m benchmarks.bpe OUT.json [--grids GRIDS.npy]
        [--parts compare merges images threads alpha worst encode small]
    python -m benchmarks.bpe.report OUT.json --into docs/results/visual-bpe.md --images docs/images

Without --grids, they are made by `benchmarks.bpe.grids` of the demo's photographs. Every measurement has a process
of its own, contenders take turns, in another order each round, and medians are reported. CPU seconds are user and
system time of all threads; other load of the host adds to them, up to a third, and more than that to wall time.

The parts: `compare` all contenders that can take the size, `tokenizers` also with threads, since it takes all cores by
default, and more CPU time by that; `merges` time against merges; `images` time and memory against
grids; `threads` how much faster threads are, beside as many programs at once that share nothing, which tell what the
cores are worth at the time; `alpha` what α costs; `worst` inputs that could turn something quadratic; `encode` threads
and the latency of one grid; `small` also the naive recount and the published tools, at a size that they can take.
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
    package = {"contender": "being-vl", "threads": 1}
    reference = {"contender": "tokenizers", "threads": 1}
    mode_settings = [{"mode": mode, "alpha": alpha} for mode in options.modes for alpha in (0.3, 0.0)]
    default_options = {"mode": options.modes[0], "alpha": 0.3}

    def make_job(part, *settings):
        job = {"part": part} | base
        for setting in settings:
            job |= setting
        return job

    yield from (make_job("compare", count, package, mode_setting) for mode_setting in mode_settings)
    for threads in options.threads:
        yield make_job("compare", count, reference, {"threads": threads})
    for merges in range(1024, options.merges + 1, 1024):
        yield make_job("merges", count, package, default_options, {"merges": merges})
        yield make_job("merges", count, reference, {"merges": merges})
    for n in options.counts:
        for threads in options.threads:
            yield make_job(
                "images", package, default_options, {"count": n, "threads": threads, "train_only": True}
            )
        if n <= TOKENIZERS_LIMIT:
            yield make_job("images", reference, {"count": n, "train_only": True})
    training_only = {"count": max(options.counts), "train_only": True}
    for threads in options.threads:
        yield make_job("threads", package, default_options, training_only, {"threads": threads})
        if threads > 1:
            yield make_job("threads", package, default_options, training_only, {"programs": threads})
    for mode in options.modes:
        yield from (
            make_job("alpha", count, package, {"mode": mode, "alpha": alpha}) for alpha in options.alphas
        )
        yield from (
            make_job("worst", package, {"mode": mode, "alpha": 0.3, "grids": n}) for n in grids.worst_cases()
        )
        for threads in options.threads:
            mode_setting = {"mode": mode, "alpha": 0.3, "threads": threads, "latency": threads == 1}
            yield make_job("encode", count, package, mode_setting)
    small_job = {"count": options.small[0], "merges": options.small[1]}
    yield from (make_job("small", small_job, package, mode_setting) for mode_setting in mode_settings)
    yield make_job("small", small_job, reference)
    yield make_job("small", small_job, {"contender": "recount", "mode": "pair", "alpha": 0.3})
    for name, checkout in (("vBPE", options.vbpe), ("MDBPE", options.mdbpe)):
        if checkout is not None:
            yield make_job("small", small_job, {"contender": name})


def run(job, options):
    """Measure in a process of its own, or the mean of several at once; an error is a result too."""
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


def measure_here(job):
    """The measurement itself, printed as JSON."""
    worst_grids = grids.worst_cases()
    data = (
        worst_grids[job["grids"]][0]
        if job["grids"] in worst_grids
        else grids.load(job["path"])[: job.get("count")]
    )
    print(json.dumps(contenders.measure(data, job)))


def machine():
    """The machine that this runs on."""
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
    """Run the parts and write the JSON after every round, so that a run that is stopped keeps what it has measured."""
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
            measure_here(options.job)
        except contenders.ContenderError as error:
            sys.exit(str(error))
        return
    if options.out is None:
        parser.error("the following arguments are required: out")
    if options.grids is None:
        max_grids = max(
            [options.count, *(options.counts if {"images", "threads"} & {*options.parts} else [])]
        )
        options.grids = Path("runs") / f"grids_builtin_n{max_grids}.npy"
        if not options.grids.exists():
            options.grids.parent.mkdir(exist_ok=True)
            grids.generate(options.grids, max_grids)
    if options.codebook_size is None:
        options.codebook_size = 1 << int(grids.load(options.grids).max()).bit_length()
    content = json.loads(options.out.read_text()) if options.out.exists() else {"measurements": []}
    earlier_entries = {
        json.dumps([entry["job"], entry["machine"]]): entry for entry in content["measurements"]
    }
    host, entries = machine(), []
    for job in jobs(options):
        if job["part"] in options.parts:
            entry = {"job": job, "machine": host, "runs": []}
            entries.append(earlier_entries.pop(json.dumps([job, host]), entry))
    content["measurements"] = [*earlier_entries.values(), *entries]
    for round_number in range(options.repeats):
        # After a process that took much memory, the next one gets pages that are slower to come by.
        random.Random(round_number).shuffle(entries)
        for number, entry in enumerate(entries, 1):
            print(
                f"round {round_number + 1}, {number}/{len(entries)}: {json.dumps(entry['job'])}",
                file=sys.stderr,
            )
            entry["runs"].append(run(entry["job"], options))
            options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
