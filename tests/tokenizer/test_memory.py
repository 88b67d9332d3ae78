"""Memory that is not there is a `MemoryError`, never the end of the process."""

import json
import subprocess
import sys

import numpy as np
import pytest

from being_vl import VisualBPE
from being_vl.errors import GridError

LADDER = """
import json, resource, sys
import numpy as np
from being_vl import VisualBPE

mode, threads = sys.argv[1], int(sys.argv[2])
rng = np.random.default_rng(0)
grids = rng.integers(0, 40, (80, 24, 24), dtype=np.uint16).repeat(3, 1).repeat(2, 2)
big = np.concatenate(list(grids))
bpe = VisualBPE.train(grids[:8], 40, 60, merge_mode=mode, num_threads=1)
ids, regions = bpe.encode(big, return_regions=True)
text = bpe.to_json()
jobs = {
    "train": lambda: VisualBPE.train(grids, 40, 60, merge_mode=mode, num_threads=threads),
    "resume": lambda: VisualBPE.train(grids[:8], 40, 90, merge_mode=mode, num_threads=threads, resume=bpe),
    "train for millions of merges": lambda: VisualBPE.train(
        grids[:2], 40, 16_000_000, merge_mode=mode, num_threads=threads, min_frequency=10**6
    ),
    "encode": lambda: bpe.encode(big),
    "encode with regions": lambda: bpe.encode(big, return_regions=True),
    "encode many": lambda: bpe.encode_batch(grids, num_threads=threads, return_regions=True),
    "decode": lambda: bpe.decode(ids, *big.shape, regions=regions),
    "read a vocabulary": lambda: VisualBPE.from_json(text),
}


def address_space():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def result(job, limit):
    message = "success"
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    try:
        job()
    except MemoryError as error:
        message = "MemoryError: " + str(error)
    except BaseException as error:
        message = f"{type(error).__name__}: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return message


results = {}
for name, job in jobs.items():
    results[name] = []
    for number in range(22):
        # From no more memory than there is to enough.
        results[name].append(result(job, address_space() + int(2**17 * 1.6**number)))
print(json.dumps(results))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of the address space")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("mode", ["pair", "oriented"])
def test_missing_memory_is_an_error(mode, threads):
    command = [sys.executable, "-c", LADDER, mode, str(threads)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-2000:]
    results = json.loads(process.stdout)
    for job, messages in results.items():
        assert all(message == "success" or message.startswith("MemoryError") for message in messages), (
            job,
            messages,
        )
        assert messages[-1] == "success", (job, messages)
    messages = {message for messages in results.values() for message in messages}
    assert any("bytes for" in message for message in messages), messages


STOPPED = """
import sys
from pathlib import Path
import numpy as np
from being_vl import VisualBPE

class Stop(Exception):
    pass

def stop(_):
    raise Stop

grids = np.random.default_rng(0).integers(0, 2000, (40, 16, 16))
for _ in range(3):
    for _ in range(60):
        try:
            VisualBPE.train(grids, 2000, 100, num_threads=int(sys.argv[1]), progress=stop, min_frequency=1)
            sys.exit("was not stopped")
        except Stop:
            pass
    print(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("threads", [1, 2])
def test_stopped_trainings_leave_no_memory_behind(threads):
    # In a process of its own, which does nothing else.
    command = [sys.executable, "-c", STOPPED, str(threads)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-2000:]
    memory = [int(line) for line in process.stdout.split()]
    # 130 kB for each of 120 trainings would be 16 MB.
    assert memory[-1] - memory[0] < 4e6, memory


class Blocks:
    """A sequence of blocks whose length is a function of how often it was asked for."""

    def __init__(self, length):
        self.length, self.calls = length, 0

    def blocks(self):
        return self

    def __len__(self):
        self.calls += 1
        return self.length(self.calls)

    def __getitem__(self, index):
        if index >= 50:
            raise IndexError(index)
        return np.arange(4), np.array([2]), np.array([2])


@pytest.mark.parametrize(
    ("length", "error"),
    [
        (lambda calls: calls, "blocks when they were read first"),
        (lambda calls: 5 if calls < 9 else calls, "5 blocks when they were read first"),
        (lambda calls: 5 if calls < 9 else 4, "and there are 4 now"),
        (lambda calls: 10**15, "block 50 is not there"),
        (lambda calls: -1, "should return >= 0"),
        (lambda calls: 2**80, "index-sized"),
    ],
    ids=["grows", "grows later", "shrinks", "too long", "negative", "no length"],
)
def test_blocks_that_change_while_they_are_read(length, error):
    with pytest.raises((GridError, ValueError, OverflowError), match=error):
        VisualBPE.train(Blocks(length), 4, 2)


class Content:
    def __init__(self, content):
        self.content = content

    def blocks(self):
        return self.content


class Other(list):
    """Other content when it is read again."""

    def __init__(self, first, second):
        super().__init__([first])
        self.second, self.is_read = second, False

    def __getitem__(self, index):
        item = self.second if self.is_read else super().__getitem__(index)
        self.is_read = True
        return item


BLOCK = np.arange(4), np.array([2]), np.array([2])


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (Other(BLOCK, (np.arange(4) / 2, *BLOCK[1:])), "expected integers, got dtype float64"),
        (Other(BLOCK, (np.arange(6), np.array([3]), np.array([2]))), "grid 0: 6 ids for 2x2 cells|4 ids for"),
        (Other(BLOCK, (np.arange(8) % 4, *[np.array([2, 2])] * 2)), "had 1 grids"),
        (Other(BLOCK, (np.arange(0), *[np.array([], int)] * 2)), "had 1 grids"),
        ((block for block in [BLOCK]), "which can be read twice, got generator"),
        ([list(BLOCK)], "block 0: expected a tuple"),
        ([BLOCK[:2]], "block 0: expected a tuple"),
        (None, "got NoneType"),
    ],
)
def test_blocks_with_other_content(content, error):
    with pytest.raises((GridError, TypeError), match=error):
        VisualBPE.train(Content(content), 6, 2)


def test_callbacks_may_train_and_change_the_grids():
    grids = np.random.default_rng(0).integers(0, 9, (30, 8, 8))
    expected = VisualBPE.train(grids, 9, 40)
    copy = grids.copy()
    inner = []

    def progress(_):
        copy[:] = 8
        inner.append(VisualBPE.train(grids, 9, 40))

    assert VisualBPE.train(copy, 9, 40, progress=progress) == expected
    assert inner
    assert all(bpe == expected for bpe in inner)
