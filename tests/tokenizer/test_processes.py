"""Processes, threads and signals: fork and spawn, data loaders, Ctrl-C, the GIL."""

import multiprocessing
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from being_vl import VisualBPE
from helpers.photos import PHOTOS
from helpers.photos import PHOTOS_K as K


def lengths(bpe, grids):
    return [len(ids) for ids in bpe.encode_batch(grids)]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes(bpe, method):
    grids = np.concatenate([PHOTOS] * 2)
    expected = lengths(bpe, grids)
    context = multiprocessing.get_context(method)
    with context.Pool(2) as pool:
        results = pool.starmap_async(lengths, [(bpe, grids)] * 3).get(timeout=60)
        assert results == [expected] * 3


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_data_loader_workers(bpe):
    data = pytest.importorskip("torch.utils.data")

    class EncodedPhotos(data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return bpe.encode_batch([PHOTOS[index]] * 40).values

    bpe.encode_batch(np.concatenate([PHOTOS] * 2))
    loader = data.DataLoader(EncodedPhotos(), batch_size=None, num_workers=2, timeout=60)
    for index, values in enumerate(loader):
        assert values.tolist() == bpe.encode(PHOTOS[index]).tolist() * 40


LONG_WORK = {
    "train": "VisualBPE.train(noise, 8192, 10**6, num_threads={threads}, min_frequency=1)",
    "train, all alike": "VisualBPE.train(np.zeros((800, 256, 256), np.uint8), 1, 99, num_threads={threads})",
    "encode_batch": "bpe.encode_batch(np.zeros((800, 256, 256), np.uint8), num_threads={threads})",
    "encode": "bpe.encode(np.zeros((6000, 6000), np.uint8))",
}
SCRIPT = """
import sys, threading, time, os, signal
import numpy as np
from being_vl import VisualBPE
noise = np.random.default_rng(0).integers(0, 8192, (3000, 32, 32), np.uint16)
bpe = VisualBPE.train(np.zeros((1, 256, 256), int), 1, 99)
times = []
def interrupt():
    times.append(time.monotonic())
    os.kill(os.getpid(), signal.SIGINT)
threading.Timer(0.5, interrupt).start()
try:
    {work}
except KeyboardInterrupt:
    print("stopped", time.monotonic() - times[0])
else:
    print("finished")
"""


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("work", LONG_WORK)
def test_ctrl_c(work, threads):
    """SIGINT ends long work with KeyboardInterrupt soon (about 0.1 s on an idle machine), and the process lives on."""
    script = SCRIPT.format(work=LONG_WORK[work].format(threads=threads))
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("stopped"), run.stdout


def test_the_gil_is_free_meanwhile():
    """Other Python threads go on while training runs."""
    ticks = []
    stop = threading.Event()

    def tick():
        while not stop.is_set():
            ticks.append(time.monotonic())
            time.sleep(0.01)

    thread = threading.Thread(target=tick)
    thread.start()
    VisualBPE.train(np.zeros((60, 256, 256), np.uint8), 1, 99, num_threads=1)
    stop.set()
    thread.join()
    assert len(ticks) > 5


def test_no_zombie_handlers():
    """Training leaves Python's own handling of Ctrl-C as it was."""
    handler = signal.getsignal(signal.SIGINT)
    VisualBPE.train(PHOTOS, K, 10)
    assert signal.getsignal(signal.SIGINT) is handler
