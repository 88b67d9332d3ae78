"""`being-vl encode`: folders of grids to folders of tokens."""

import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from being_vl import VisualBPE
from being_vl.files import read_manifest, sha256
from being_vl.quantizer.job import quantize
from being_vl.quantizer.options import QuantizeOptions
from being_vl.shards.grids import GridStore
from helpers import tiny
from helpers.commands import being_vl, expect_refusal


@pytest.fixture(scope="module")
def grids(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 grids of several sizes in 5 files."""
    folder = tmp_path_factory.mktemp("encode") / "grids"
    quantizer = str(chain / "quantizer")
    quantize(QuantizeOptions(chain / "data" / "images", folder, quantizer, shard_size=5))
    return folder


def read_tokens(folder: Path) -> dict[str, list[int]]:
    tokens = {}
    for shard in read_manifest(folder, "tokens")["shards"]:
        assert sha256(folder / shard["file"]) == shard["sha256"]
        batch = pa.ipc.open_file(str(folder / shard["file"])).get_batch(0)
        assert (batch.num_rows, batch.schema.field("tokens").type.value_type) == (shard["grids"], pa.uint8())
        tokens |= zip(batch["key"].to_pylist(), batch["tokens"].to_pylist(), strict=True)
    return tokens


def test_tokens_are_those_of_the_vocabulary_and_a_second_run_keeps_whole_files(
    grids: Path, chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bpe, store = VisualBPE.load(chain / "vocabulary.json"), GridStore.open(grids)
    command = ("encode", grids, "--vocabulary", chain / "vocabulary.json", "--out", tmp_path / "tokens")
    assert being_vl(*command, "--num_threads", 1) == 0
    assert read_tokens(tmp_path / "tokens") == {key: bpe.encode(grid).tolist() for key, grid in store.items()}
    manifest = read_manifest(tmp_path / "tokens", "tokens")
    assert manifest["cells"] == sum(grid.size for grid in store.values()) > manifest["tokens"]
    assert manifest["quantizer"]["fingerprint"] == bpe.quantizer_fingerprint

    old_files = {path.name: path.read_bytes() for path in (tmp_path / "tokens").iterdir()}
    (tmp_path / "tokens" / "manifest.json").unlink()
    damaged_shard, other_shard = (
        tmp_path / "tokens" / "tokens-00001.arrow",
        tmp_path / "tokens" / "tokens-00002.arrow",
    )
    damaged_shard.write_bytes(damaged_shard.read_bytes()[:50])
    (tmp_path / "tokens" / "tokens-00009.arrow").touch()
    inode = other_shard.stat().st_ino
    assert being_vl(*command) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "tokens").iterdir()} == old_files
    assert other_shard.stat().st_ino == inode

    bpe.truncate(5).save(tmp_path / "fewer.json")
    command = ("encode", grids, "--vocabulary", tmp_path / "fewer.json", "--out", tmp_path / "tokens")
    assert "vocabulary.vocab_size was" in expect_refusal(capsys, being_vl(*command))
    assert {path.name: path.read_bytes() for path in (tmp_path / "tokens").iterdir()} == old_files
    assert being_vl(*command, "--overwrite") == 0
    shorter_bpe = VisualBPE.load(tmp_path / "fewer.json")
    assert read_tokens(tmp_path / "tokens") == {
        key: shorter_bpe.encode(grid).tolist() for key, grid in store.items()
    }


def test_the_processes_of_torchrun_share_the_work(grids: Path, chain: Path, tmp_path: Path) -> None:
    def run(rank: int, out: Path) -> None:
        os.environ.update(RANK=str(rank), WORLD_SIZE="2")
        words = ("encode", grids, "--vocabulary", chain / "vocabulary.json", "--out", out, "--num_threads", 1)
        assert being_vl(*words) == 0

    context = multiprocessing.get_context("fork")
    jobs = [context.Process(target=run, args=(rank, tmp_path / "shared")) for rank in (0, 1)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
        assert job.exitcode == 0
    words = ("encode", grids, "--vocabulary", chain / "vocabulary.json", "--out", tmp_path / "alone")
    assert being_vl(*words) == 0
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("shared", "alone")
    ]
    assert files[0] == files[1]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_ray_gives_the_same_files(grids: Path, chain: Path, tmp_path: Path) -> None:
    words = ("encode", grids, "--vocabulary", chain / "vocabulary.json", "--out")
    assert being_vl(*words, tmp_path / "ray", "--engine", "ray") == 0
    assert being_vl(*words, tmp_path / "local") == 0
    ray_files, files = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("ray", "local")
    )
    assert ray_files == files


def test_what_does_not_fit_is_refused(
    grids: Path, chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--vocabulary", chain / "vocabulary.json", "--out", tmp_path / "tokens")
    assert "no manifest.json" in expect_refusal(capsys, being_vl("encode", tmp_path / "nowhere", *flags))
    other_quantizer = tiny.quantizer(tmp_path / "other", codebook_size=64, seed=1, name="other")
    tiny.write_grids(tmp_path / "grids", {"a": np.zeros((2, 2), np.int64)}, other_quantizer)
    message = expect_refusal(capsys, being_vl("encode", tmp_path / "grids", *flags))
    assert "'tiny'" in message
    assert "'other'" in message
    content = json.loads((chain / "vocabulary.json").read_text())
    (tmp_path / "broken.json").write_text(json.dumps(content)[:-40])
    words = ("encode", grids, "--vocabulary", tmp_path / "broken.json", "--out", tmp_path / "tokens")
    assert "broken.json" in expect_refusal(capsys, being_vl(*words))
    assert not (tmp_path / "tokens").exists()
