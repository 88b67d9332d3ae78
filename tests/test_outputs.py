"""Where commands write: never over what they did not make, one at a time, and in one line where they cannot."""

import errno
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from being_vl import VisualBPE
from being_vl.commands import COMMANDS
from being_vl.errors import OutputError
from being_vl.files import list_files_below, read_manifest, temporary_path, write_aside, write_json
from being_vl.outputs import LOCK, check_folder, claim_folder, free_locks, lock_file, lock_folder
from being_vl.shards import job as jobs
from being_vl.shards.job import ShardedJob
from helpers.commands import being_vl, expect_refusal

FOLDER_KINDS = {
    "quantize": "grids",
    "encode": "tokens",
    "prepare": "sequences",
    "expand": "model",
    "quantizer train": "quantizer",
    "train": "training",
    "check": "training",
    "launch": "training",
    "run": "run",
    "demo": "run",
}
"""Commands that write a folder, and which of the places below holds what they make."""
FILE_KINDS = {
    "grids decode": "sheet.png",
    "vocab train": "vocabulary.json",
    "vocab import": "vocabulary.json",
    "vocab truncate": "vocabulary.json",
}
"""Commands that write a file."""
READERS = {"grids info", "grids verify", "vocab show", "vocab merge-stats", "plan", "generate", "completion"}
"""Commands that print, and write nothing."""
OVERWRITING = (COMMANDS.keys() - READERS) - {"launch", "grids decode"}
"""Commands that have the option."""

Snapshot = dict[str, tuple[str, bytes]]


def command(name: str, chain: Path, out: Path, folder: Path) -> list[object]:
    """The words of a command that writes to `out`; `folder` is one for files that it reads."""
    quantizer = ["--quantizer", chain / "quantizer"]
    grids, vocabulary, records = chain / "grids", chain / "vocabulary.json", chain / "data" / "train.json"
    images = chain / "data" / "images"
    training = ["--model", chain / "tied", "--records", records, "--grids", grids]
    words: dict[str, list[object]] = {
        "quantize": [images, *quantizer],
        "encode": [grids, "--vocabulary", vocabulary],
        "prepare": training,
        "expand": ["--llm", chain / "llm", "--vocabulary", vocabulary, *quantizer],
        "quantizer train": [
            *("--images", images, "--network.width", 32, "--codebook.size", 64, "--codebook.dim", 8),
            *("--batch_size", 4, "--steps", 2),
        ],
        "train": training,
        "check": training,
        "run": ["--images", images, "--records", records, "--llm", chain / "llm", *quantizer],
        "demo": ["--quick", "true"],
        "grids decode": [grids, *quantizer],
        "vocab train": [grids, "--num_merges", 5],
        "vocab import": [folder / "published.pkl"],
        "vocab truncate": [vocabulary, "--merges", 7],
    }
    if name == "launch":
        recipe = folder / "launch.json"  # which is YAML as well
        values = {"model": chain / "tied", "records": [str(records)], "grids": grids, "out": out}
        recipe.write_text(json.dumps(values, default=str))
        return ["launch", recipe]
    return [*name.split(), *words[name], "--out", out]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for files that commands read."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "published.pkl").write_bytes(pickle.dumps([((5, 7), 8192)]))
    return folder


@pytest.fixture
def places(chain: Path, tmp_path: Path) -> Path:
    """A folder of what people have: whatever it is, no command may change it."""
    home = tmp_path / "home"
    photos = home / "photos"
    (photos / "holidays").mkdir(parents=True)
    for name in ("a.png", "b.png", "holidays/c.png"):
        Image.new("RGB", (8, 8), "red").save(photos / name)
    # What our own jobs have made.
    for name in ("grids", "quantizer", "llm", "vocabulary.json"):
        path = chain / name
        shutil.copytree(path, home / name) if path.is_dir() else shutil.copy(path, home / name)
    shutil.copytree(chain / "tied", home / "model")
    for name, kind in {"tokens": "tokens", "sequences": "sequences", "run": "run"}.items():
        (home / name).mkdir()
        write_json(home / name / "fingerprint.json", {"kind": kind})
        (home / name / f"{kind}-00000.arrow").write_text("rows")
    (home / "training" / "stage1").mkdir(parents=True)
    write_json(home / "training" / "fingerprint.json", {"kind": "training", "stages": {}})
    (home / "training" / "log.jsonl").write_text("{}\n")
    (home / "training" / "stage1" / "model.safetensors").write_text("weights")
    # What jobs of others have made.
    (home / "app").mkdir()
    (home / "app" / "manifest.json").write_text('{"name": "app", "format": 3}')
    (home / "app" / "fingerprint.json").write_text("[]")
    (home / "hidden").mkdir()
    (home / "hidden" / ".secret").write_text("mine")
    (home / "nested" / "logs.log").mkdir(parents=True)
    (home / "photo.png").write_bytes((photos / "a.png").read_bytes())
    (home / "notes.txt").write_text("mine")
    (home / "records.json").write_text('[{"id": 1}]')
    (home / "empty.json").touch()
    # And what is no file and no folder.
    (home / "to-photos").symlink_to(photos)
    (home / "to-photo").symlink_to(home / "photo.png")
    (home / "to-nothing").symlink_to(home / "nothing")
    (home / "to-itself").symlink_to(home / "to-itself")
    os.mkfifo(home / "pipe")
    return home


def snapshot(folder: Path) -> Snapshot:
    """What is in a folder, byte for byte."""
    content = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        kind = stat.filemode(status.st_mode)
        if path.is_symlink():
            content[str(path)] = kind, bytes(path.readlink())
        else:
            content[str(path)] = kind, path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
    return content


def test_every_command_is_tried_below() -> None:
    assert FOLDER_KINDS.keys() | FILE_KINDS.keys() | READERS == COMMANDS.keys()


@pytest.mark.parametrize("name", [*FOLDER_KINDS, *FILE_KINDS])
def test_no_command_changes_what_it_did_not_make(
    name: str,
    chain: Path,
    inputs: Path,
    places: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wherever it is told to write, and also with --overwrite: one line, status 2, and all is as it was."""
    monkeypatch.setattr(os, "execvpe", None)  # or a launch would become torchrun
    own_kind = (FOLDER_KINDS | FILE_KINDS)[name]
    content = snapshot(places)
    targets = [place for place in sorted(places.iterdir()) if place.name != own_kind]
    targets += [places / "notes.txt" / "out", places / "pipe" / "out"]
    if name in FILE_KINDS:
        targets = [target for target in targets if not target.name.startswith("sheet")]
    else:
        targets += [places / "photos" / "holidays"]
    for target in targets:
        for flags in ([], ["--overwrite"]) if name in OVERWRITING else ([],):
            line = expect_refusal(capsys, being_vl(*command(name, chain, target, inputs), *flags))
            assert str(places) in line, (target, line)
            assert snapshot(places) == content, (target, line)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("name", [*FOLDER_KINDS, *FILE_KINDS])
def test_a_folder_that_cannot_be_written_to(
    name: str, chain: Path, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    line = expect_refusal(capsys, being_vl(*command(name, chain, tmp_path / "locked" / "out", inputs)))
    assert "cannot be written to" in line


def test_outputs_in_their_inputs_are_refused(
    chain: Path, inputs: Path, places: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(chain / "data", places / "data")
    content = snapshot(places)
    records = places / "data" / "train.json"
    quantizer = ["--quantizer", places / "quantizer"]
    training = ["--model", places / "model", "--records", records, "--grids", places / "grids", "--out"]
    jobs_of_places: list[tuple[list[object], list[str]]] = [
        (
            ["quantize", places / "photos", *quantizer, "--out"],
            ["photos", "to-photos", "quantizer/grids"],
        ),
        (["encode", places / "grids", "--vocabulary", places / "vocabulary.json", "--out"], ["grids/tokens"]),
        (["prepare", *training], ["grids/a", "model/a"]),
        (["train", *training], ["grids/a", "model/a"]),
        (["check", *training], ["grids/a"]),
        (["quantizer", "train", "--images", places / "photos", "--out"], ["photos"]),
        (["vocab", "train", places / "grids", "--out"], ["grids/v.json"]),
        (["vocab", "truncate", places / "vocabulary.json", "--merges", 3, "--out"], ["vocabulary.json"]),
        (
            ["grids", "decode", places / "grids", *quantizer, "--out"],
            ["grids/sheet.png", "quantizer/sheet.png"],
        ),
        (
            [
                "expand",
                "--llm",
                places / "llm",
                "--vocabulary",
                places / "vocabulary.json",
                *quantizer,
                "--out",
            ],
            ["llm", "llm/expanded", "quantizer/a"],
        ),
        (
            ["run", "--images", places / "photos", "--records", records, "--llm", places / "llm", "--out"],
            ["photos", "llm/run"],
        ),
    ]
    for words, outs in jobs_of_places:
        for out in outs:
            line = expect_refusal(capsys, being_vl(*words, places / out))
            assert "is the input, too" in line or "which is read" in line, line
            assert snapshot(places) == content
    # A folder of plain images is no unit, and what is made in it is not read as one of them.
    for _ in range(2):
        assert being_vl("quantize", places / "photos", *quantizer, "--out", places / "photos" / "grids") == 0
    assert content.items() <= snapshot(places).items()
    assert read_manifest(places / "photos" / "grids", "grids")["grids"] == 3


@pytest.mark.parametrize("name", ["quantize", "encode", "vocab import", "vocab truncate", "grids decode"])
def test_new_and_empty_places_are_taken(name: str, chain: Path, inputs: Path, tmp_path: Path) -> None:
    """Missing parents, links to places that may be written, and folders with what does not count."""
    suffix = "" if name in FOLDER_KINDS else ".json"
    assert being_vl(*command(name, chain, tmp_path / "new" / "parents" / f"out{suffix}", inputs)) == 0
    if name in FOLDER_KINDS:
        (tmp_path / "disk" / "lost+found").mkdir(parents=True)
        bystanders = (".DS_Store", ".gitkeep", "job.log", "slurm-17.out", f".old{LOCK}", ".nfs0000a1")
        for file in bystanders:
            (tmp_path / "disk" / file).write_text("mine")
        (tmp_path / "link").symlink_to(tmp_path / "disk")
        assert being_vl(*command(name, chain, tmp_path / "link", inputs)) == 0
        assert (tmp_path / "link").is_symlink()
        assert all((tmp_path / "disk" / file).read_text() == "mine" for file in bystanders)
        read_manifest(tmp_path / "disk", FOLDER_KINDS[name])
    else:
        path = tmp_path / "new" / "parents" / "out.json"
        (tmp_path / "link.json").symlink_to(path)
        old_content = path.read_bytes()
        path.write_bytes(old_content + b"\n")
        assert being_vl(*command(name, chain, tmp_path / "link.json", inputs), *overwrite_flag(name)) == 0
        assert (tmp_path / "link.json").is_symlink()
        assert path.read_bytes() == old_content
    assert not [path for path in tmp_path.rglob("*being-vl*") if path.name != f".old{LOCK}"]


def overwrite_flag(name: str) -> list[str]:
    return ["--overwrite"] if name in OVERWRITING else []


def test_files_beside_a_vocabulary_are_not_replaced(
    chain: Path, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("partial", "report", "fingerprint"):
        for number, content in enumerate(('{"mine": 1}', "", "[]")):
            (tmp_path / f"v{number}.{part}.json").write_text(content)
            for name in ("vocab train", "vocab import", "vocab truncate"):
                line = expect_refusal(
                    capsys,
                    being_vl(*command(name, chain, tmp_path / f"v{number}.json", inputs), "--overwrite"),
                )
                assert f"v{number}.{part}.json" in line
            assert (tmp_path / f"v{number}.{part}.json").read_text() == content
            (tmp_path / f"v{number}.{part}.json").unlink()


def test_what_looks_like_a_temporary_file_is_not_removed(chain: Path, inputs: Path, tmp_path: Path) -> None:
    for name, out in {"vocab import": "v.json", "grids decode": "s.png", "encode": "tokens"}.items():
        for suffix in (".tmp", "~", ".lock", ".partial"):
            (tmp_path / f"{out}{suffix}").mkdir()
            (tmp_path / f"{out}{suffix}" / "mine").write_text("mine")
        assert being_vl(*command(name, chain, tmp_path / out, inputs)) == 0
        for suffix in (".tmp", "~", ".lock", ".partial"):
            assert (tmp_path / f"{out}{suffix}" / "mine").read_text() == "mine"


def test_files_that_were_added_to_an_output_stay(tmp_path: Path) -> None:
    """A folder is replaced as a whole only if all that is in it is the job's, in its folders as well."""

    def write(text: str) -> None:
        with write_aside(tmp_path / "model", "model") as folder:
            (folder / "tokenizer").mkdir(parents=True)
            (folder / "tokenizer" / "words.txt").write_text(text)
            write_json(
                folder / "manifest.json",
                {
                    "format": "being-vl/model",
                    "format_version": 1,
                    "files": ["manifest.json", "tokenizer/words.txt"],
                },
            )

    write("one")
    write("two")
    assert (tmp_path / "model" / "tokenizer" / "words.txt").read_text() == "two"
    for name in ("tokenizer/mine.txt", "mine.txt"):
        (tmp_path / "model" / name).write_text("mine")
        with pytest.raises(OutputError, match=f"holds {name}, which is no part"):
            write("three")
        (tmp_path / "model" / name).unlink()
    (tmp_path / "model" / "mine").mkdir()
    with pytest.raises(OutputError, match="holds mine, which"):
        write("three")
    assert list_files_below(tmp_path / "model") == {"manifest.json", "tokenizer/words.txt", "mine"}
    assert not temporary_path(tmp_path / "model").exists()


def test_a_sheet_is_drawn_again(chain: Path, inputs: Path, tmp_path: Path) -> None:
    widths = []
    for count in (1, 4):
        words = command("grids decode", chain, tmp_path / "sheet.png", inputs)
        assert being_vl(*words, "--count", count) == 0
        with Image.open(tmp_path / "sheet.png") as sheet:
            widths.append(sheet.width)
    assert widths[0] < widths[1]


def hold(function: Callable[[Path], str], path: Path, ready: Any) -> None:
    """Hold a lock until killed."""
    function(path)
    ready.set()
    time.sleep(60)


@contextmanager
def holder(path: Path, function: Callable[[Path], str] = lock_folder) -> Iterator[Any]:
    """Another process that holds the lock of a folder, or that beside a file."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=hold, args=(function, path, ready), daemon=True)
    process.start()
    assert ready.wait(30)
    try:
        yield process
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize("name", [*FOLDER_KINDS, *FILE_KINDS])
def test_two_at_once_are_refused(
    name: str, chain: Path, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "launch":
        return  # what it writes is whole, and launches of several nodes write the same
    out = tmp_path / ("out.json" if name in FILE_KINDS else "out")
    beside = name in FILE_KINDS or name == "expand"
    place = out / "prepared" if name == "check" else out
    with holder(place, lock_file if beside else lock_folder) as process:
        line = expect_refusal(capsys, being_vl(*command(name, chain, out, inputs)))
        assert f"process {process.pid} on " in line
        assert "is writing there; wait for it" in line
        assert "since 2" in line
    assert not out.is_file()
    # The dead hold nothing.
    with free_locks():
        (lock_file if beside else lock_folder)(place)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_locks_of_one_process(tmp_path: Path) -> None:
    """A job that another one of the same thread has started may write there; one of another thread may not."""
    faults: list[str] = []

    def lock_too() -> None:
        try:
            lock_folder(tmp_path / "out")
        except OutputError as error:
            faults.append(str(error))

    with free_locks():
        content = lock_folder(tmp_path / "out")
        with free_locks():
            assert lock_folder(tmp_path / "out") == content
        (tmp_path / "link").symlink_to(tmp_path / "out")
        assert lock_folder(tmp_path / "link") == content
        assert json.loads((tmp_path / "out" / LOCK).read_text())["process"] == os.getpid()
        thread = threading.Thread(target=lock_too)
        thread.start()
        thread.join()
    assert "is writing there" in faults[0]
    assert not any((tmp_path / "out").iterdir())


def test_a_lock_that_was_freed_meanwhile_is_taken_rightly(tmp_path: Path) -> None:
    """Forty processes at once: never two inside, though each removes the lock's file."""
    context = multiprocessing.get_context("fork")
    counter = tmp_path / "inside"

    def work(number: int) -> None:
        end = time.monotonic() + 1
        while time.monotonic() < end:
            try:
                with free_locks():
                    lock_folder(tmp_path / "out")
                    counter.touch(exist_ok=False)
                    counter.unlink()
            except OutputError:
                pass

    processes = [context.Process(target=work, args=(number,)) for number in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 8


def test_a_killed_job_goes_on(tmp_path: Path) -> None:
    """Its lock's file and its temporary files do not make the folder another one's."""
    with holder(tmp_path / "out") as process:
        temporary_path(tmp_path / "out" / "fingerprint.json").write_text("{")
        os.kill(process.pid, signal.SIGKILL)
    assert (tmp_path / "out" / LOCK).exists()
    assert not check_folder(tmp_path / "out", "grids")
    with free_locks():
        claim_folder(tmp_path / "out", "grids")
    assert check_folder(tmp_path / "out", "grids")


def numbers_job(folder: Path, count: int = 4) -> ShardedJob[int]:
    job = ShardedJob[int](folder, "numbers", {"count": count})
    for number in range(count):
        job.add_shard(number, number)
    return job


def make(job: ShardedJob[int], numbers: list[int]) -> None:
    for number in numbers:
        job.shards[number].write({"number": pa.array([number])}, {"sum": number})


@pytest.mark.parametrize(
    "loss", ["folder", "shard", "damaged shard", "fingerprint", "other job", "replaced folder"]
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_deleted_is_not_waited_for(
    loss: str, ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by one rank nor by the first of two, which waits for the other one's shards."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    out = tmp_path / "out"
    with free_locks():
        job = numbers_job(out)
        make(job, [shard.inputs for shard in job.claim()])
        if loss in ("folder", "replaced folder"):
            shutil.rmtree(out)
        if loss == "replaced folder":
            out.mkdir()
        if loss == "shard":
            job.shards[2].path.unlink()
        if loss == "damaged shard":
            job.shards[2].path.write_bytes(job.shards[2].path.read_bytes()[:100])
        if loss == "fingerprint":
            (out / "fingerprint.json").unlink()
            job.shards[0].path.unlink()
        if loss == "other job":
            write_json(out / "fingerprint.json", {"kind": "numbers", "count": 9})
            job.shards[0].path.unlink()
        place = "numbers-00002" if "shard" in loss else "out: was deleted or replaced"
        with pytest.raises(OutputError, match=place):
            job.publish(["sum"], {})


def test_a_deleted_folder_is_not_made_again(tmp_path: Path) -> None:
    with free_locks():
        job = numbers_job(tmp_path / "out")
        job.claim()
        make(job, [0])
        shutil.rmtree(tmp_path / "out")
        with pytest.raises(OutputError, match=r"numbers-00001.arrow: .*the folder .* is gone"):
            make(job, [1])
    assert not (tmp_path / "out").exists()


def test_the_shards_of_another_rank_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(jobs, "LOG_SECONDS", 0.1)
    with free_locks(), caplog.at_level("INFO", "being_vl"):
        job = numbers_job(tmp_path / "out")
        make(job, [shard.inputs for shard in job.claim()])
        threading.Timer(0.8, make, (job, [1, 3])).start()
        assert job.publish(["sum"], {}) == {"sum": 6}
    assert "waiting for 2 shards of other ranks, such as numbers-00001.arrow" in caplog.text


def test_ranks_of_another_job_wait_until_theirs_holds_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that was killed has left its lock's file; the second rank does not begin in its name."""
    monkeypatch.setenv("MASTER_PORT", "1")
    with holder(tmp_path / "out"):
        pass
    monkeypatch.setenv("MASTER_PORT", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    write_json(tmp_path / "out" / "fingerprint.json", numbers_job(tmp_path / "new").fingerprint)
    claims: list[list[int]] = []

    def claim_second() -> None:
        claims.append([shard.inputs for shard in second.claim()])

    monkeypatch.setenv("RANK", "1")
    second = numbers_job(tmp_path / "out")
    thread = threading.Thread(target=claim_second, daemon=True)
    thread.start()
    time.sleep(0.5)
    assert not claims
    monkeypatch.setenv("RANK", "0")
    with free_locks():
        assert [shard.inputs for shard in numbers_job(tmp_path / "out").claim()] == [0, 2]
        thread.join(10)
    assert claims == [[1, 3]]


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes meanwhile."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


LIMITED = {
    "quantize": (2000, []),
    "encode": (2000, []),
    "prepare": (4000, []),
    "prepare by workers": (4000, ["--workers", 2, "--shard_size", 20]),
    "expand": (30_000, []),
    "quantizer train": (100_000, []),
    "quantizer train at its start": (150, []),
    "vocab train": (1500, ["--checkpoint_every", 1]),
    "vocab import": (100, []),
    "grids decode": (1000, []),
}


@pytest.mark.parametrize("case", LIMITED)
def test_files_that_cannot_be_written_are_named(
    case: str, chain: Path, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line with the file and the reason; nothing half written has its name, and the job goes on later."""
    name = case.partition(" by ")[0].partition(" at ")[0]
    limit, flags = LIMITED[case]
    out = tmp_path / ("out.json" if name in FILE_KINDS else "out")
    words = [*command(name, chain, out, inputs), *flags]
    with file_size_limit(limit):
        line = expect_refusal(capsys, being_vl(*words))
    assert str(out.with_suffix("")) in line
    assert os.strerror(errno.EFBIG) in line
    assert line.count("\n") == 0
    assert len(line) < 500
    assert not list(tmp_path.rglob("*being-vl*"))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert all(path.stat().st_size < limit for path in files)
    for path in files:
        if path.suffix == ".json":
            json.loads(path.read_text())
    assert being_vl(*words) == 0


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded", "/elsewhere"),
        OSError(errno.EROFS, "Read-only file system"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        Exception("No space left on device (os error 28)"),
    ],
)
def test_errors_of_disks_by_whichever_library(error: Exception, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("before")

    def fail() -> None:
        with write_aside(tmp_path / "out") as path:
            path.write_text("half")
            raise error

    with pytest.raises(OutputError, match=r"out: cannot be written: (No space|Disk quota|Read-only)") as info:
        fail()
    assert ("MB are free there" in str(info.value)) == ("No space" in str(error))
    assert (tmp_path / "out").read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 1


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    for error in (
        FileNotFoundError(errno.ENOENT, "No such file", "input.json"),
        ValueError("os error"),
        KeyError(1),
    ):
        with pytest.raises(type(error)) as info, write_aside(tmp_path / "out"):
            raise error
        assert info.value is error
    assert not any(tmp_path.iterdir())


def test_vocabularies_saved_from_python_replace_files_alone(tmp_path: Path) -> None:
    bpe = VisualBPE.train(np.zeros((1, 4, 4), int), 3, 1)
    (tmp_path / "v.json").write_text("{}")
    bpe.save(tmp_path / "v.json")
    assert VisualBPE.load(tmp_path / "v.json").num_merges == 1
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").touch()
    for name in ("pipe", "folder"):
        with pytest.raises((OutputError, OSError), match=name):
            bpe.save(tmp_path / name)
    assert (tmp_path / "folder" / "mine").exists()
