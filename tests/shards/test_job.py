"""`quantize`, `prepare` and `encode` as jobs: what they keep, what they refuse, and what they replace."""

import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from being_vl import VisualBPE
from being_vl.data.options import PrepareOptions, SequenceOptions
from being_vl.data.prepare import prepare
from being_vl.errors import FingerprintError, OutputError
from being_vl.files import MANIFEST, read_manifest, temporary_path, write_manifest
from being_vl.fingerprints import FINGERPRINT
from being_vl.quantizer.job import quantize
from being_vl.quantizer.options import QuantizeOptions
from being_vl.shards.job import ShardedJob
from being_vl.tokenizer.encode import encode_grids
from being_vl.tokenizer.options import EncodeOptions

KINDS = {"quantize": "grids", "prepare": "sequences", "encode": "tokens"}

Run = Callable[..., None]


@pytest.fixture(scope="module")
def inputs(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the jobs read, for tests that change it: images, records, grids in five shards, vocabularies."""
    folder = tmp_path_factory.mktemp("inputs")
    shutil.copytree(chain / "data" / "images", folder / "images")
    shutil.copy(chain / "data" / "train.json", folder / "train.json")
    shutil.copy(chain / "vocabulary.json", folder / "vocabulary.json")
    VisualBPE.load(chain / "vocabulary.json").truncate(20).save(folder / "shorter.json")
    quantizer = str(chain / "quantizer")
    quantize(QuantizeOptions(chain / "data" / "images", folder / "grids", quantizer, shard_size=5))
    return folder


@pytest.fixture(params=KINDS)
def name(request: pytest.FixtureRequest) -> str:
    """Name of the job."""
    return str(request.param)


@pytest.fixture
def run(name: str, chain: Path, inputs: Path) -> Run:
    """The job, by its folder; `is_other` gives it options that make another output, `changes` those that do not."""

    def call(out: Path, is_other: bool = False, **changes: Any) -> None:
        if name == "quantize":
            quantizer = f"{chain / 'quantizer'}@64" if is_other else str(chain / "quantizer")
            quantize(QuantizeOptions(inputs / "images", out, quantizer, shard_size=5, **changes))
        elif name == "prepare":
            records = [inputs / "train.json"]
            sequences = SequenceOptions(max_length=400 if is_other else 500)
            prepare(
                PrepareOptions(
                    chain / "tied", records, out, chain / "grids", sequences, shard_size=7, **changes
                )
            )
        else:
            vocabulary = inputs / ("shorter.json" if is_other else "vocabulary.json")
            encode_grids(EncodeOptions(inputs / "grids", vocabulary, out, **changes))

    return call


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def versions(folder: Path) -> dict[str, tuple[int, int]]:
    """Of each file, what changes when it is written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_a_finished_output_is_kept(run: Run, name: str, tmp_path: Path) -> None:
    run(tmp_path / "out")
    old_versions = versions(tmp_path / "out")
    assert len(old_versions) >= 6
    run(tmp_path / "out")
    free_options = {
        "quantize": {"batch_size": 3, "workers": 0, "max_failed": 0.5},
        "prepare": {"lenient": True},
    }
    run(tmp_path / "out", **free_options.get(name, {"num_threads": 1}))
    run(tmp_path / "out", overwrite=True)
    assert versions(tmp_path / "out") == old_versions


def test_a_relative_path_is_the_same_folder(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run(Path("out"))
    old_versions = versions(tmp_path / "out")
    run(tmp_path / "out")
    assert versions(tmp_path / "out") == old_versions


@pytest.mark.parametrize("is_finished", [True, False])
def test_other_options_are_refused_and_nothing_is_touched(
    run: Run, tmp_path: Path, is_finished: bool
) -> None:
    out = tmp_path / "out"
    run(out)
    if not is_finished:
        (out / MANIFEST).unlink()
        next(out.glob("*-00001.arrow")).unlink()
    old_versions = versions(out)
    with pytest.raises(
        FingerprintError, match=r"out: was made with other options or inputs \(.* was .*, is "
    ):
        run(out, is_other=True)
    assert versions(out) == old_versions


def test_overwrite_replaces_what_other_options_made(run: Run, tmp_path: Path) -> None:
    run(tmp_path / "out")
    old_files = contents(tmp_path / "out")
    run(tmp_path / "out", is_other=True, overwrite=True)
    run(tmp_path / "new", is_other=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "new") != old_files


def test_an_interrupted_job_goes_on_and_gives_the_same_files(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(out)
    old_versions, files = versions(out), contents(out)
    (out / MANIFEST).unlink()
    missing_shard = next(out.glob("*-00001.arrow"))
    damaged_shard = next(out.glob("*-00002.arrow"))
    missing_shard.rename(temporary_path(missing_shard))  # as after kill -9 while it was written
    damaged_shard.write_bytes(damaged_shard.read_bytes()[:50])
    run(out)
    new_versions = versions(out)
    assert contents(out) == files
    assert {file for file in old_versions if old_versions[file] != new_versions[file]} - {
        "left-out.jsonl"
    } == {
        MANIFEST,
        missing_shard.name,
        damaged_shard.name,
    }


def test_an_interrupted_replacement_goes_on(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(out)
    first_path = next(out.glob("*-00000.arrow"))
    old_shard = first_path.read_bytes()
    run(out, is_other=True, overwrite=True)
    new_files = contents(out)
    (out / MANIFEST).unlink()
    first_path.write_bytes(old_shard)
    run(out, is_other=True)
    assert contents(out) == new_files


def test_foreign_files_are_never_deleted(run: Run, name: str, tmp_path: Path) -> None:
    out, kind = tmp_path / "out", KINDS[name]
    foreign_files = [
        *(f"{kind}-mine.arrow", f"{kind}-1.arrow", "notes.txt", "faults.txt", f"my-{kind}-00099.arrow"),
        *(f"{kind}-00099.arrow.tmp", f"folder/{kind}-00099.arrow"),
    ]
    # A folder that holds anything is refused, whatever it is; one of the job's own may get files of others.
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / f"{kind}-00000.arrow").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=f"is not empty, but holds {kind}-00000.arrow"):
            run(tmp_path / "photos", overwrite=overwrite)
    assert contents(tmp_path / "photos") == {f"{kind}-00000.arrow": b"mine"}
    run(out)
    (out / "folder").mkdir()
    for file in foreign_files:
        (out / file).write_text("mine")
    (out / f"{kind}-00098.arrow").touch()
    temporary_path(out / f"{kind}-00099.arrow").touch()
    run(out, is_other=True, overwrite=True)
    assert all((out / file).read_text() == "mine" for file in foreign_files)
    assert not (out / f"{kind}-00098.arrow").exists()
    assert not list(out.glob(".*"))


def test_the_output_of_another_kind_of_job_is_never_replaced(run: Run, name: str, tmp_path: Path) -> None:
    write_manifest(tmp_path / "model", "model", {})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / FINGERPRINT).write_text(json.dumps({"stages": []}))
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / MANIFEST).write_text("{}")
    for folder in ("model", "run", "app"):
        old_versions = versions(tmp_path / folder)
        for overwrite in (False, True):
            with pytest.raises(OutputError):
                run(tmp_path / folder, overwrite=overwrite)
        assert versions(tmp_path / folder) == old_versions


def test_shards_of_unknown_origin_are_refused(run: Run, tmp_path: Path) -> None:
    run(tmp_path / "out")
    files = contents(tmp_path / "out")
    (tmp_path / "out" / FINGERPRINT).unlink()
    old_versions = versions(tmp_path / "out")
    with pytest.raises(FingerprintError, match=rf"but no {FINGERPRINT}.*--overwrite"):
        run(tmp_path / "out")
    assert versions(tmp_path / "out") == old_versions
    (tmp_path / "out" / FINGERPRINT).write_text("{")
    with pytest.raises(ValueError, match="fingerprint"):
        run(tmp_path / "out")
    run(tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == files


def test_only_shards_of_grids_that_changed_are_encoded_anew(
    chain: Path, inputs: Path, tmp_path: Path
) -> None:
    images = shutil.copytree(inputs / "images", tmp_path / "images")
    grids, tokens = tmp_path / "grids", tmp_path / "tokens"
    job = QuantizeOptions(images, grids, str(chain / "quantizer"), shard_size=5)
    encoding = EncodeOptions(grids, inputs / "vocabulary.json", tokens)
    quantize(job)
    encode_grids(encoding)
    old_versions = versions(tokens)
    first_path, second_path, *_ = sorted(images.iterdir())
    shutil.copy(second_path, first_path)
    quantize(job)
    encode_grids(encoding)
    changes = {name for name, version in versions(tokens).items() if old_versions[name] != version}
    assert changes == {"tokens-00000.arrow", MANIFEST}


def test_other_inputs_of_the_same_kind_are_refused(chain: Path, inputs: Path, tmp_path: Path) -> None:
    other_inputs = {name: shutil.copytree(inputs / name, tmp_path / name) for name in ("images", "grids")}
    records = Path(shutil.copy(inputs / "train.json", tmp_path / "train.json"))
    quantizer, model = str(chain / "quantizer"), chain / "tied"
    quantize(QuantizeOptions(inputs / "images", tmp_path / "a", quantizer))
    prepare(PrepareOptions(model, [inputs / "train.json"], tmp_path / "b", chain / "grids"))
    encode_grids(EncodeOptions(inputs / "grids", inputs / "vocabulary.json", tmp_path / "c"))
    with pytest.raises(FingerprintError, match="images was "):
        quantize(QuantizeOptions(other_inputs["images"], tmp_path / "a", quantizer))
    with pytest.raises(FingerprintError, match="shard_size was 4096, is 3"):
        quantize(QuantizeOptions(inputs / "images", tmp_path / "a", quantizer, shard_size=3))
    with pytest.raises(FingerprintError, match="records was "):
        prepare(PrepareOptions(model, [records], tmp_path / "b", chain / "grids"))
    with pytest.raises(FingerprintError, match="grids was "):
        prepare(PrepareOptions(model, [inputs / "train.json"], tmp_path / "b", inputs / "grids"))
    with pytest.raises(FingerprintError, match="grids was "):
        encode_grids(EncodeOptions(other_inputs["grids"], inputs / "vocabulary.json", tmp_path / "c"))


def test_fewer_inputs_leave_no_stale_shard(chain: Path, inputs: Path, tmp_path: Path) -> None:
    images = shutil.copytree(inputs / "images", tmp_path / "images")
    job = QuantizeOptions(images, tmp_path / "grids", str(chain / "quantizer"), shard_size=5)
    quantize(job)
    for path in sorted(images.iterdir())[8:]:
        path.unlink()
    store = quantize(job)
    assert store is not None
    assert len(store) == 8
    assert sorted(path.name for path in job.out.glob("*.arrow")) == ["grids-00000.arrow", "grids-00001.arrow"]


def make_numbers(
    folder: Path, numbers: list[int], rank: int = 0, world_size: int = 1, **options: Any
) -> None:
    """A job of a shard per number, as one of its ranks."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
    job = ShardedJob[int](folder, "numbers", {"count": len(numbers)}, **options)
    for number in numbers:
        job.add_shard(number, number)
    if job.is_finished():
        return
    for shard in job.claim():
        time.sleep(0.01)
        shard.write({"number": pa.array([shard.inputs])}, {"sum": shard.inputs})
    if job.rank == 0:
        totals = job.publish(["sum"], {"quality": "good"})
        assert totals == {"sum": sum(numbers)}


def make_on_ranks(folder: Path, numbers: list[int], order: list[int], **options: Any) -> list[int | None]:
    """The job's ranks as processes, started one after the other in this order; their exit statuses."""
    context = multiprocessing.get_context("fork")
    processes = []
    for rank in order:
        arguments = (folder, numbers, rank, len(order))
        processes.append(context.Process(target=make_numbers, args=arguments, kwargs=options))
        processes[-1].start()
        time.sleep(0.05)
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]])
def test_ranks_that_start_in_any_order_make_each_shard_once(tmp_path: Path, order: list[int]) -> None:
    numbers = list(range(20, 31))
    assert make_on_ranks(tmp_path / "ranks", numbers, order) == [0, 0, 0]
    assert make_on_ranks(tmp_path / "one", numbers, [0]) == [0]
    assert contents(tmp_path / "ranks") == contents(tmp_path / "one")
    entries = read_manifest(tmp_path / "ranks", "numbers")["shards"]
    assert [entry["sum"] for entry in entries] == numbers
    # Changed inputs, while the manifest of the earlier ones is still there.
    numbers[4] = 99
    assert make_on_ranks(tmp_path / "ranks", numbers, order) == [0, 0, 0]
    assert read_manifest(tmp_path / "ranks", "numbers")["sum"] == sum(numbers)
    # Another job: refused on every rank, then replaced.
    old_versions = versions(tmp_path / "ranks")
    assert make_on_ranks(tmp_path / "ranks", numbers[:7], order) == [1, 1, 1]
    assert versions(tmp_path / "ranks") == old_versions
    assert make_on_ranks(tmp_path / "ranks", numbers[:7], order, overwrite=True) == [0, 0, 0]
    assert make_on_ranks(tmp_path / "fewer", numbers[:7], [0]) == [0]
    assert contents(tmp_path / "ranks") == contents(tmp_path / "fewer")
