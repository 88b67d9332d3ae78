"""What is measured: for each contender a function that trains, and one that encodes all grids.

`train()` learns from the grids it was made with, and may return times by the tool's own clock; `encode()` returns the
number of tokens that they become.
"""

import contextlib
import io
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.bpe import naive


class ContenderError(Exception):
    """A contender that cannot run, and why."""


def being_vl(grids, job):
    """This package."""
    from being_vl import VisualBPE

    bpe = None

    def train():
        nonlocal bpe
        bpe = VisualBPE.train(
            grids,
            job["codebook_size"],
            job["merges"],
            job["mode"],
            alpha=job["alpha"],
            num_threads=job["threads"],
        )

    return train, lambda: len(bpe.encode_batch(grids, num_threads=job["threads"]).values)


def tokenizers(grids, job):
    """Hugging Face `tokenizers`: 1-D BPE; each id is a character, each grid one word in raster order."""
    from tokenizers import Tokenizer, models, trainers

    os.environ["RAYON_NUM_THREADS"] = str(job["threads"])
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if job["threads"] > 1 else "false"
    first = 0x10000  # past the surrogates
    texts = ["".join(map(chr, (grid.ravel().astype(np.int64) + first).tolist())) for grid in grids]
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=job["codebook_size"] + job["merges"],
        min_frequency=2,
        show_progress=False,
        initial_alphabet=[chr(first + i) for i in range(job["codebook_size"])],
    )
    return (
        lambda: tokenizer.train_from_iterator(texts, trainer),
        lambda: sum(len(encoding) for encoding in tokenizer.encode_batch_fast(texts)),
    )


def recount(grids, job):
    """The naive recount of `naive.py`."""
    regions = None

    def train():
        nonlocal regions
        _, regions = naive.train(grids, job["codebook_size"], job["merges"], job["alpha"])

    return train, lambda: regions.tokens()


def vbpe(grids, job):
    """Being-VL-0.5's published vBPE (Python and numba), from a checkout of its repository."""
    checkout = Path(job["checkout"])
    if not (checkout / "beingvl" / "model" / "vbpe.py").is_file():
        raise ContenderError(f"{checkout} has no beingvl/model/vbpe.py")
    # Its package imports a model with many requirements; the tokenizer is one file that needs numba and tqdm.
    sys.path.insert(0, str(checkout / "beingvl" / "model"))
    try:
        from vbpe import vBPE
    except ImportError as error:
        raise ContenderError(f"vBPE needs its requirements: pip install numba tqdm ({error})") from None

    def tokenizer():
        return vBPE(job["codebook_size"], 0, job["codebook_size"])

    # It writes into its input, and compiles when first called.
    with contextlib.redirect_stderr(io.StringIO()):
        tokenizer().train([grid.astype(np.int32) for grid in grids[:2]], 2)
    images = [np.ascontiguousarray(grid, np.int32) for grid in grids]
    bpe_tokenizer = tokenizer()

    def train():
        with contextlib.redirect_stderr(io.StringIO()):
            bpe_tokenizer.train([image.copy() for image in images], job["merges"])

    return train, lambda: sum(len(bpe_tokenizer.merge_token(image.copy()).ravel()) for image in images)


def mdbpe(grids, job):
    """The published MDBPE (C++), from a checkout in which its program has been built.

    Size of grids, largest id and number of merges are constants in its `src/main.cc`, so they must be those of the
    run. Its own clock, which leaves out reading and writing files, tells the time; it works on one thread, so its CPU
    time is no longer than that, and no longer than that of the whole program.
    """
    checkout = Path(job["checkout"])
    source = next(checkout.glob("**/src/main.cc"), None)
    programs = [p for p in checkout.glob("**/tokenprocessor") if p.is_file() and os.access(p, os.X_OK)]
    if source is None or not programs:
        raise ContenderError(f"{checkout} has no src/main.cc, or no built program `tokenprocessor`")
    text = source.read_text()
    constants = [
        int(n)
        for name in (
            r"token_max = (\d+)",
            r"tokens_to_create = (\d+)",
            r"isize2\((\d+), \d+",
            r"isize2\(\d+, (\d+)",
        )
        for n in re.findall(name, text)[:1]
    ]
    _, height, width = grids.shape
    expected = [job["codebook_size"] - 1, job["merges"], width, height]
    if constants != expected:
        raise ContenderError(
            f"{source}: token_max, tokens_to_create and image_dimensions are {constants}, expected {expected}; "
            "build it again"
        )
    folder = tempfile.TemporaryDirectory()
    root = Path(folder.name)
    (root / "run").mkdir()
    (root / "data" / "data_cpp").mkdir(parents=True)
    for i, grid in enumerate(grids):
        head = np.array([width, height], "<i4").tobytes()
        (root / "data" / "data_cpp" / f"{i}.dat").write_bytes(head + grid.astype("<i4").tobytes())

    def train():
        process = subprocess.run([programs[0]], cwd=root / "run", capture_output=True, text=True)
        match = re.search(r"Took (\d+) ms", process.stdout + process.stderr)
        if match is None:
            raise ContenderError(f"{programs[0]} ended with {process.returncode}: {process.stderr[-300:]}")
        seconds = int(match[1]) / 1000
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        peak = usage.ru_maxrss / 1024
        cpu = min(seconds, usage.ru_utime + usage.ru_stime)
        return {"train_cpu": cpu, "train_wall": seconds, "peak": peak, "growth": peak}

    def encode():
        files = (root / "data" / "data_cpp_out" / "transcribed_data").glob("**/*_sequence.dat")
        tokens = sum(file.stat().st_size // 12 for file in files)
        folder.cleanup()
        return tokens

    return train, encode


CONTENDERS = {
    "being-vl": being_vl,
    "tokenizers": tokenizers,
    "recount": recount,
    "vBPE": vbpe,
    "MDBPE": mdbpe,
}
NO_ENCODER = {"recount", "MDBPE"}


def clock():
    """(CPU seconds of all threads, wall seconds) so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return np.array([usage.ru_utime + usage.ru_stime, time.perf_counter()])


def memory(field):
    """VmRSS (now) or VmHWM (peak) of this process in MB."""
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def measure(grids, job):
    """One run of one contender in this process: seconds, memory, and the length of what it makes of the grids."""
    train, encode = CONTENDERS[job["contender"]](grids, job)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    memory_before = memory("VmRSS")
    start = clock()
    tool_times = train()
    end_of_training = clock()
    peak = memory("VmHWM")
    result = {"ids": int(np.prod(grids.shape)), "peak": peak, "growth": peak - memory_before}
    result["train_cpu"], result["train_wall"] = end_of_training - start
    if not job.get("train_only"):
        result["tokens"] = encode()
        if job["contender"] not in NO_ENCODER:
            result["encode_cpu"], result["encode_wall"] = clock() - end_of_training
    if job.get("latency"):
        result["latency_wall"], result["latency_cpu"] = latency(grids, job)
    return {name: float(value) for name, value in (result | (tool_times or {})).items()}


def latency(grids, job):
    """Median wall milliseconds of encoding one grid from Python, and mean CPU milliseconds."""
    from being_vl import VisualBPE

    bpe = VisualBPE.train(grids, job["codebook_size"], job["merges"], job["mode"], alpha=job["alpha"])
    sample = [np.ascontiguousarray(grid) for grid in grids[:1000]]
    for grid in sample:
        bpe.encode(grid)
    walls = []
    cpu = time.process_time()
    for grid in sample:
        start = time.perf_counter()
        bpe.encode(grid)
        walls.append(time.perf_counter() - start)
    return 1000 * float(np.median(walls)), 1000 * (time.process_time() - cpu) / len(sample)
