"""Bad input on the command line: one line on stderr that names the file and the record, and nothing is trained."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from being_vl import VisualBPE
from being_vl.cli import main
from being_vl.files import read_manifest, sha256
from being_vl.shards.arrow import shard_path, write_table
from being_vl.shards.grids import GridRow, GridStore, grid_columns
from helpers import tiny
from helpers.commands import being_vl, expect_refusal


def red_image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), "red").save(path)
    return path


def quantize(chain: Path, images: Path, out: Path) -> tuple[object, ...]:
    return "quantize", images, "--out", out, "--quantizer", chain / "quantizer"


def train(chain: Path, out: Path, **changes: object) -> list[object]:
    options = {
        "model": chain / "tied",
        "grids": chain / "grids",
        "records": chain / "data" / "train.json",
        "out": out,
    }
    return ["train", *(word for name, value in (options | changes).items() for word in (f"--{name}", value))]


def change_record(chain: Path, path: Path, number: int, **fields: Any) -> Path:
    """The chain's records with one of them changed; None removes a field."""
    records = json.loads((chain / "data" / "train.json").read_text())
    records[number] = {k: v for k, v in (records[number] | fields).items() if v is not None}
    path.write_text(json.dumps(records))
    return path


def test_empty_and_missing_folder(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing"):
        line = expect_refusal(capsys, being_vl(*quantize(chain, tmp_path / name, tmp_path / "grids")))
        assert str(tmp_path / name) in line
    assert not (tmp_path / "grids" / "manifest.json").exists()


def test_unreadable_images_are_listed_or_stop_the_job(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(9):
        red_image(tmp_path / "images" / f"{number}.png")
    content = (tmp_path / "images" / "0.png").read_bytes()
    (tmp_path / "images" / "sub").mkdir()
    (tmp_path / "images" / "sub" / "cut.png").write_bytes(content[: len(content) // 2])
    command = quantize(chain, tmp_path / "images", tmp_path / "grids")
    line = expect_refusal(capsys, being_vl(*command))
    assert "sub/cut.png" in line
    assert main([str(word) for word in (*command, "--max_failed", "0.1")]) == 0
    manifest = read_manifest(tmp_path / "grids", "grids")
    assert list(manifest["failures"]) == ["sub/cut.png"]
    assert manifest["failures"]["sub/cut.png"]
    assert len(GridStore.open(tmp_path / "grids")) == 9


def test_image_of_a_record_is_missing(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = change_record(chain, tmp_path / "r.json", 7, image="lost.png", id="seven")
    line = expect_refusal(capsys, being_vl(*train(chain, tmp_path / "out", records=records)))
    assert all(word in line for word in ("r.json", "lost.png", "record 7", "seven"))


@pytest.mark.parametrize("text", ["no json", '[{"id": 1}', '{"id": 1}', "[]", ""])
def test_records_that_are_no_records(
    text: str, chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.json").write_text(text)
    assert "r.json" in expect_refusal(
        capsys, being_vl(*train(chain, tmp_path / "out", records=tmp_path / "r.json"))
    )


def test_record_lacks_a_field(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = change_record(chain, tmp_path / "r.json", 3, conversations=None, id="three")
    line = expect_refusal(capsys, being_vl(*train(chain, tmp_path / "out", records=records)))
    assert all(word in line for word in ("r.json", "record 3", "three", "conversations"))


def test_record_without_labels(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    question_only = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": " "}]
    records = change_record(chain, tmp_path / "r.json", 4, conversations=question_only)
    line = expect_refusal(capsys, being_vl(*train(chain, tmp_path / "out", records=records)))
    assert "r.json" in line
    assert "record 4" in line


def test_record_too_long(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = expect_refusal(capsys, being_vl(*train(chain, tmp_path / "out", **{"sequences.max_length": 24})))
    assert "train.json" in line
    assert "24" in line


def test_ids_outside_the_codebook(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = GridStore.open(chain / "grids")
    grids = tmp_path / "grids"
    shutil.copytree(chain / "grids", grids)
    rows = [GridRow(key, store[key], (64, 64), "0" * 64) for key in store]
    rows[2].grid[1, 3] = store.codebook_size + 100
    shard = shard_path(grids, "grids", 0)
    write_table(shard, grid_columns(rows, 1 << 16), {})
    manifest = json.loads((grids / "manifest.json").read_text())
    manifest["shards"][0]["sha256"] = sha256(shard)  # as if quantize had written it so
    (grids / "manifest.json").write_text(json.dumps(manifest))
    line = expect_refusal(capsys, being_vl(*train(chain, tmp_path / "out", grids=grids)))
    assert rows[2].key in line
    assert str(store.codebook_size + 100) in line


def test_vocabulary_of_another_codebook(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.quantizer(tmp_path / "other", codebook_size=64, name="other", seed=5)
    line = expect_refusal(
        capsys,
        being_vl(
            *("expand", "--llm", chain / "llm", "--vocabulary", chain / "vocabulary.json"),
            *("--out", tmp_path / "model", "--quantizer", tmp_path / "other"),
        ),
    )
    assert "'other'" in line
    assert "'tiny'" in line
    assert not (tmp_path / "model").exists()


def test_llm_that_is_expanded_already(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = expect_refusal(
        capsys,
        being_vl(
            *("expand", "--llm", chain / "tied", "--vocabulary", chain / "vocabulary.json"),
            *("--out", tmp_path / "model", "--quantizer", chain / "quantizer"),
        ),
    )
    assert str(chain / "tied") in line
    assert "already expanded" in line


def test_damaged_vocabulary(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (chain / "vocabulary.json").read_text()
    (tmp_path / "cut.json").write_text(text[: len(text) // 2])
    line = expect_refusal(
        capsys,
        being_vl(
            *("expand", "--llm", chain / "llm", "--vocabulary", tmp_path / "cut.json"),
            *("--out", tmp_path / "model", "--quantizer", chain / "quantizer"),
        ),
    )
    assert "cut.json" in line


def test_generate_without_picture_or_model(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ("--prompt", "what is it?")
    line = expect_refusal(
        capsys, being_vl("generate", "--model", chain / "tied", "--image", tmp_path / "no.png", *ask)
    )
    assert "no.png" in line
    image = red_image(tmp_path / "red.png")
    assert "llm" in expect_refusal(
        capsys, being_vl("generate", "--model", chain / "llm", "--image", image, *ask)
    )


def test_vocabulary_is_what_it_was(chain: Path) -> None:
    """Guards the fixtures above: without the damage the file loads."""
    assert VisualBPE.load(chain / "vocabulary.json").num_merges == 40
