"""`being-vl vocab train` refuses arrays, folders and options that it cannot use, and says why."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from being_vl.files import sha256
from being_vl.shards.arrow import shard_path
from being_vl.shards.grids import read_grids
from being_vl.tokenizer import corpus
from helpers.commands import FileCreator, expect_refusal
from helpers.photos import PHOTOS, PHOTOS_K
from helpers.vocabularies import folder_of_grids, make_grids, train


def array_writer(content: Any) -> Callable[[Path], None]:
    return lambda path: np.save(path, content)


def id_changer(**changes: Any) -> Callable[[Path], None]:
    """Grids of which one cell, in grid 40, row 2, column 3, holds something else."""

    def write(path: Path) -> None:
        grids = PHOTOS.astype(changes.get("dtype", np.int64))
        grids[40, 2, 3] = changes["value"]
        np.save(path, grids)

    return write


def write_pickle(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.array([FileCreator()], dtype=object), allow_pickle=True)


def write_ragged_array(path: Path) -> None:
    np.save(path, np.array([[1, 2], [3]], dtype=object), allow_pickle=True)


def archive(**arrays: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, **arrays)

    return write


PLACE = "grid 40, row 2, column 3"

ARRAY_FAULTS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "negative id": (id_changer(value=-1), [PLACE, "id -1", "expected 0 to 1023"]),
    "id of the codebook's size": (
        id_changer(value=PHOTOS_K, dtype=np.uint16),
        [PLACE, "id 1024", "expected 0 to 1023"],
    ),
    "huge id": (id_changer(value=2**64 - 1, dtype=np.uint64), [PLACE, str(2**64 - 1)]),
    "fraction": (id_changer(value=1.5, dtype=np.float32), [PLACE, "float32", "1.5"]),
    "NaN": (id_changer(value=np.nan, dtype=np.float64), [PLACE, "float64", "nan"]),
    "infinity": (id_changer(value=np.inf, dtype=np.float64), [PLACE, "inf"]),
    "whole floats": (array_writer(PHOTOS.astype(float)), ["grid 0, row 0, column 0", "float64"]),
    "bools": (array_writer(PHOTOS > 3), ["grid 0, row 0, column 0", "bool"]),
    "complex": (array_writer(PHOTOS + 1j), ["grid 0, row 0, column 0", "complex128"]),
    "text": (array_writer(np.full((2, 2, 2), "a")), ["<U1"]),
    "records": (array_writer(np.zeros((2, 2, 2), [("a", int)])), ["'a'"]),
    "one grid": (array_writer(PHOTOS[0]), ["shape (32, 32)", "(N, H, W)", "array[None]"]),
    "four dimensions": (array_writer(PHOTOS[None]), ["shape (1, 48, 32, 32)", "(N, H, W)"]),
    "number": (array_writer(7), ["shape ()"]),
    "no grid": (array_writer(PHOTOS[:0]), ["empty", "shape (0, 32, 32)"]),
    "no columns": (array_writer(PHOTOS[:, :, :0]), ["empty", "shape (48, 32, 0)"]),
    "ragged rows": (write_ragged_array, ["Python objects", "different lengths"]),
    "pickle": (write_pickle, ["Python objects"]),
    "plain pickle": (lambda path: path.write_bytes(pickle.dumps([[1]])), ["Python objects"]),
    "archive without grids": (archive(arr_0=PHOTOS, labels=PHOTOS), ["'arr_0', 'labels'", "named 'grids'"]),
    "empty archive": (archive(), ["nothing", "named 'grids'"]),
    "archive of objects": (archive(grids=np.array([[1, 2], [3]], dtype=object)), ["Python objects"]),
    "archive of one grid": (archive(grids=PHOTOS[0]), ["shape (32, 32)"]),
    "text file": (lambda path: path.write_text("no array"), ["expected"]),
    "empty file": (lambda path: path.touch(), ["cannot be read", "expected"]),
    "missing file": (lambda path: None, ["no such file"]),
    "folder without grids": (lambda path: path.mkdir(), ["manifest"]),
}


@pytest.mark.parametrize("name", ARRAY_FAULTS)
def test_bad_arrays(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(corpus, "BLOCK_CELLS", 5000)
    monkeypatch.chdir(tmp_path)
    write, words = ARRAY_FAULTS[name]
    write(tmp_path / "bad.npy")
    np.save("good.npy", PHOTOS)
    paths = [Path("bad.npy")] if name == "folder without grids" else [Path("good.npy"), Path("bad.npy")]
    line = expect_refusal(capsys, train(paths, Path("v.json")))
    assert all(word in line for word in ["bad.npy", *words])
    assert not Path("v.json").exists()
    assert not Path("executed").exists()


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_truncated_arrays(
    suffix: str, kept: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"cut.{suffix}"
    np.savez(path, grids=PHOTOS) if suffix == "npz" else np.save(path, PHOTOS)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    assert "cut.np" in expect_refusal(capsys, train(path, tmp_path / "v.json"))


def test_bad_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grids = make_grids()
    out = tmp_path / "v.json"
    first_folder = folder_of_grids(tmp_path / "good", grids)
    other_folder = folder_of_grids(tmp_path / "other", grids, name="vq2")
    line = expect_refusal(capsys, train([first_folder, other_folder], out, size=None))
    assert all(word in line for word in ("good", "other", "'vq'", "'vq2'"))
    assert "1024" in expect_refusal(capsys, train(first_folder, out, size=99))
    np.save(tmp_path / "array.npy", PHOTOS)
    assert "array.npy" in expect_refusal(capsys, train([first_folder, tmp_path / "array.npy"], out))

    line = expect_refusal(capsys, train([folder_of_grids(tmp_path / "none", [])], out, size=None))
    assert "none: no grid" in line

    grids[13][4, 5] = 4000
    line = expect_refusal(
        capsys, train([first_folder, folder_of_grids(tmp_path / "bad", grids)], out, size=None)
    )
    assert all(word in line for word in ("bad: grid 13, row 4, column 5", "id 4000"))
    shard = shard_path(first_folder, "grids", 1)
    batch = read_grids(shard)
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    columns["height"] = pa.array([9] * len(batch), pa.int32())
    with pa.ipc.new_file(str(tmp_path / "wrong.arrow"), batch.schema) as writer:
        writer.write_batch(pa.record_batch(columns, schema=batch.schema))
    shard_bytes = shard.read_bytes()
    shard.write_bytes((tmp_path / "wrong.arrow").read_bytes())
    assert f"{shard.name}: was changed" in expect_refusal(capsys, train(first_folder, out, size=None))
    manifest = json.loads((first_folder / "manifest.json").read_text())
    manifest["shards"][1]["sha256"] = sha256(shard)  # as if quantize had written it so
    (first_folder / "manifest.json").write_text(json.dumps(manifest))
    line = expect_refusal(capsys, train(first_folder, out, size=None))
    assert f"{shard.name}: grid 0 has 152 ids for 9x19 cells" in line
    shard.write_bytes(shard_bytes[: len(shard_bytes) // 2])
    assert shard.name in expect_refusal(capsys, train(first_folder, out, size=None))
    shard.unlink()
    assert shard.name in expect_refusal(capsys, train(first_folder, out, size=None))


@pytest.mark.parametrize(
    ("words", "name_in_error"),
    [
        (["--held_out", "1"], "held_out"),
        (["--held_out", "-0.1"], "held_out"),
        (["--held_out", "0.001"], "none of them"),
        (["--held_out", "0.999"], "all of them"),
        (["--held_out_every", "1"], "held_out_every"),
        (["--held_out_every", "49"], "none of them"),
        (["--held_out", "0.1", "--held_out_every", "3"], "not both"),
        (["--seed=-1"], "seed"),
        (["--checkpoint_every", "0"], "checkpoint_every"),
        (["--num_threads", "0"], "num_threads"),
        (["--num_merges=-1"], "num_merges"),
        (["--num_merges", str(2**40)], "num_merges"),
        (["--alpha=-1"], "alpha"),
        (["--sigma", "0"], "sigma"),
        (["--min_frequency", "0"], "min_frequency"),
        (["--codebook_size", "0"], "codebook_size"),
    ],
)
def test_bad_options(
    words: list[str], name_in_error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "grids.npy", PHOTOS)
    assert name_in_error in expect_refusal(capsys, train(tmp_path / "grids.npy", tmp_path / "v.json", *words))
    assert not (tmp_path / "v.json").exists()
