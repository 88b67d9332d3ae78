"""Shards with other bytes than their job wrote are refused before anything reads them."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest

from being_vl.data.options import PrepareOptions
from being_vl.data.prepare import prepare
from being_vl.data.sequences import SequenceBuilder
from being_vl.data.store import PreparedSequences, verify_sequences
from being_vl.errors import ManifestError
from being_vl.shards import checksums
from being_vl.shards.arrow import is_intact
from being_vl.shards.checksums import ShardEntry, verify_shards
from being_vl.shards.grids import GridStore
from helpers import tiny
from helpers.damage import damage

VARIATIONS = 160


@pytest.fixture(scope="module")
def grids(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(chain / "grids", tmp_path_factory.mktemp("copy") / "grids"))


@pytest.fixture(scope="module")
def prepared(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SequenceBuilder]:
    """A folder of sequences, and what reads it."""
    out = tmp_path_factory.mktemp("prepared") / "out"
    options = PrepareOptions(
        chain / "tied", [chain / "data" / "train.json"], out, [chain / "grids"], shard_size=7
    )
    prepare(options)
    return out, tiny.builder(options)


def test_damaged_grids_are_refused(grids: Path) -> None:
    path = next(grids.glob("*.arrow"))
    data = path.read_bytes()
    for variation in damage(data, VARIATIONS):
        path.write_bytes(variation)
        with pytest.raises(
            ManifestError, match=rf"{path.name}: was changed .* `being-vl quantize` again"
        ) as error:
            GridStore.open(grids)
        assert len(str(error.value).splitlines()) == 1
    path.write_bytes(data)
    assert len(GridStore.open(grids))


def test_damaged_sequences_are_refused(prepared: tuple[Path, SequenceBuilder], tmp_path: Path) -> None:
    source, builder = prepared
    folder = Path(shutil.copytree(source, tmp_path / "prepared"))
    path = sorted(folder.glob("*.arrow"))[1]
    data = path.read_bytes()
    for variation in damage(data, VARIATIONS, seed=1):
        path.write_bytes(variation)
        with pytest.raises(ManifestError, match=rf"{path.name}: was changed .* `being-vl prepare` again"):
            PreparedSequences(folder, builder)
    path.write_bytes(data)
    PreparedSequences(folder, builder)
    for change in (path.unlink, path.mkdir):
        change()
        with pytest.raises(ManifestError, match=rf"{path.name}: cannot be read"):
            PreparedSequences(folder, builder)


def test_ranks_share_the_work_and_leave_nothing_out(
    prepared: tuple[Path, SequenceBuilder], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(prepared[0], tmp_path / "prepared"))
    shards = sorted(folder.glob("*.arrow"))
    assert len(shards) >= 3
    for number, path in enumerate(shards):
        data = path.read_bytes()
        path.write_bytes(data[:-1])
        for rank in range(3):
            if number % 3 == rank:
                with pytest.raises(ManifestError, match=path.name):
                    verify_sequences(folder, rank, 3)
            else:
                verify_sequences(folder, rank, 3)
        path.write_bytes(data)


@pytest.mark.parametrize(
    "shards", [None, 3, [1], [{"file": "a.arrow"}], [{"file": "../a.arrow", "grids": 1, "sha256": ""}],
               [{"file": "a.arrow", "grids": "1", "sha256": ""}], [{"file": 1, "grids": 1, "sha256": ""}]]
)  # fmt: skip
def test_a_damaged_list_of_shards_is_named(grids: Path, tmp_path: Path, shards: object) -> None:
    manifest = json.loads((grids / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"shards": shards}))
    with pytest.raises(ManifestError, match=r"manifest\.json: its list of shards is damaged"):
        GridStore.open(tmp_path)


def test_what_takes_long_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checksums, "LOG_SECONDS", -1.0)
    caplog.set_level(logging.INFO)
    (tmp_path / "a").write_bytes(os.urandom(10_000_000))
    verify_shards([ShardEntry(tmp_path / "a", 1, checksums.sha256(tmp_path / "a"))], "prepare", 0, 2)
    assert "1 files are as they were written (0.0 GB in" in caplog.text
    assert "rank 0" in caplog.text


def test_damaged_shards_of_an_unfinished_job_are_made_again(
    prepared: tuple[Path, SequenceBuilder], chain: Path, tmp_path: Path
) -> None:
    source = prepared[0]
    files = {path.name: path.read_bytes() for path in source.glob("*.arrow")}
    names = sorted(files)
    assert all(is_intact(source / name) for name in names)
    for number, variation in enumerate(damage(files[names[1]], VARIATIONS, seed=2)):
        (tmp_path / "a.arrow").write_bytes(variation)
        assert not is_intact(tmp_path / "a.arrow"), number
    # One byte of a record was changed, and the job is continued.
    out = tmp_path / "out"
    options = PrepareOptions(
        chain / "tied", [chain / "data" / "train.json"], out, [chain / "grids"], shard_size=7
    )
    prepare(options)
    (out / "manifest.json").unlink()
    data = bytearray(files[names[1]])
    data[len(data) // 2] ^= 1
    (out / names[1]).write_bytes(data)
    times = {name: (out / name).stat().st_mtime_ns for name in names}
    prepare(options)
    assert {path.name: path.read_bytes() for path in out.glob("*.arrow")} == files
    assert [name for name in names if (out / name).stat().st_mtime_ns != times[name]] == [names[1]]
