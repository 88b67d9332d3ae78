"""`prepare` pairs each record with the grid of its own image, wherever images, records and grids lie."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from being_vl.data.options import PrepareOptions
from being_vl.data.prepare import find_grids
from being_vl.data.records import Records
from being_vl.data.sequences import SequenceBuilder
from being_vl.data.store import PreparedSequences
from being_vl.errors import FingerprintError, RecordError
from being_vl.files import read_manifest, sha256
from being_vl.quantizer.job import quantize
from being_vl.quantizer.options import QuantizeOptions
from being_vl.shards.grids import Grids
from helpers import tiny
from helpers.commands import being_vl, expect_refusal

COLOURS = {"red": (220, 20, 20), "blue": (20, 20, 220), "green": (20, 200, 20)}

Quantize = Callable[..., Path]


def png(colour: str) -> bytes:
    """An image of one colour; all have the same size in bytes."""
    file = io.BytesIO()
    Image.new("RGB", (32, 32), COLOURS[colour]).save(file, "PNG", compress_level=0)
    return file.getvalue()


def write_tar(path: Path, colour: str, count: int = 2) -> Path:
    """img2dataset's output: images with captions, which tell the colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for n in range(count):
            for suffix, data in (("jpg", png(colour)), ("txt", f"{colour:5}".encode())):
                member = tarfile.TarInfo(f"{n:09}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def write_table(path: Path, colour: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": png(colour), "path": "x.png"}, None, {"bytes": png(colour), "path": "x.png"}]
    captions = [{"image": image, "caption": colour} for image in images if image]
    pq.write_table(pa.Table.from_pylist(captions), path)
    return path


def write_json(path: Path, name: str, colour: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([{"image": name, "caption": colour}]))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a quantizer and an expanded model."""
    folder = tmp_path_factory.mktemp("model")
    tiny.expanded(folder, [f"{n}.png" for n in range(20)])
    return folder


@pytest.fixture
def quantized(model: Path, tmp_path: Path) -> Quantize:
    def run(images: Path, name: str) -> Path:
        out = tmp_path / "grids" / name
        quantize(QuantizeOptions(images, out, str(model / "quantizer"), workers=0))
        return out

    return run


def flags(model: Path, out: Path, records: list[Path], grids: list[Path]) -> list[object]:
    paths = ["prepare", "--model", model / "model", "--out", out, "--records", *records]
    return [*paths, "--grids", *grids, "--shard_size", 1]


def check_pairs(model: Path, out: Path, grids: list[Path]) -> int:
    """Make sure that each caption stands behind the image of its colour, with and without BPE-dropout."""
    from being_vl.quantizer.base import load_quantizer

    quantizer = load_quantizer(model / "quantizer")
    pixels = [Image.open(io.BytesIO(png(colour))) for colour in COLOURS]
    expected = dict(zip(COLOURS, quantizer.encode(pixels), strict=True))
    assert len({grid.tobytes() for grid in expected.values()}) == 3
    builder = SequenceBuilder.from_model(model / "model", find_grids(out, grids), 256)
    assert builder.grids is not None
    sequences = PreparedSequences(out, builder)
    count = 0
    for group, lengths in sequences.lengths.items():
        for index in range(len(lengths)):
            sequence = sequences.get(group, index, 0)
            (image,) = sequence.images
            text = builder.tokenizer.decode(sequence.ids[image.stop + 1 :])
            (colour,) = (name for name in COLOURS if name in text)
            np.testing.assert_array_equal(builder.grids[image.key], expected[colour])
            again = builder.reencode(sequence, 0.0, 1)
            np.testing.assert_array_equal(again.ids, sequence.ids)
            count += 1
    return count


@pytest.mark.parametrize("kind", ["tar", "parquet", "json"])
def test_files_of_the_same_name_in_two_folders(
    kind: str, model: Path, quantized: Quantize, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders, paths = [tmp_path / "data" / name for name in ("cc3m", "sbu")], []
    for folder, colour in zip(folders, ("red", "blue"), strict=True):
        if kind == "json":
            path = write_json(folder / "00000.json", "images/0.png", colour)
            (folder / "images").mkdir()
            (folder / "images" / "0.png").write_bytes(png(colour))
        else:
            path = (write_tar if kind == "tar" else write_table)(folder / f"00000.{kind}", colour)
        paths.append(path)
    count = len(Records(paths))

    # Only one quantized: the other's records are faults.
    cc3m = quantized(folders[0], "cc3m")
    line = expect_refusal(capsys, being_vl(*flags(model, tmp_path / "a", paths, [cc3m])))
    assert f"{count // 2} of {count} records have faults" in line
    assert str(paths[1]) in line
    assert being_vl(*flags(model, tmp_path / "a", paths, [cc3m]), "--lenient") == 0
    assert check_pairs(model, tmp_path / "a", [cc3m]) == count // 2

    # Both, apart, in any order; and together.
    both = [cc3m, quantized(folders[1], "sbu")]
    for grids in (both, both[::-1], [quantized(tmp_path / "data", "together")]):
        assert being_vl(*flags(model, tmp_path / "b", paths, grids), "--overwrite") == 0
        assert check_pairs(model, tmp_path / "b", grids) == count


@pytest.mark.parametrize("write", [write_tar, write_table])
def test_data_that_have_moved(
    write: Callable[[Path, str], Path],
    model: Path,
    quantized: Quantize,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    suffix = "tar" if write is write_tar else "parquet"
    path = write(tmp_path / "old" / f"00000.{suffix}", "red")
    grids = quantized(path.parent, "grids")
    shutil.move(path.parent, tmp_path / "new")
    path = tmp_path / "new" / path.name
    assert being_vl(*flags(model, tmp_path / "out", [path], [grids])) == 0
    assert check_pairs(model, tmp_path / "out", []) == len(Records(path))
    write(path, "green")
    line = expect_refusal(capsys, being_vl(*flags(model, tmp_path / "b", [path], [grids])))
    assert "holds another image" in line


def test_a_name_in_a_json_file_that_could_mean_two_images(
    model: Path, quantized: Quantize, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, colour in (("coco", "red"), ("llava", "blue")):
        (tmp_path / folder / "train").mkdir(parents=True)
        (tmp_path / folder / "train" / "0.png").write_bytes(png(colour))
    path = write_json(tmp_path / "llava" / "records.json", "train/0.png", "blue")
    coco, llava = quantized(tmp_path / "coco", "coco"), quantized(tmp_path / "llava", "llava")
    line = expect_refusal(capsys, being_vl(*flags(model, tmp_path / "a", [path], [coco])))
    assert "ambiguous image" in line
    assert str(tmp_path / "llava" / "train" / "0.png") in line
    assert str(tmp_path / "coco" / "train" / "0.png") in line
    # With the grids of both, the name means the image beside the records.
    assert being_vl(*flags(model, tmp_path / "b", [path], [coco, llava])) == 0
    assert check_pairs(model, tmp_path / "b", [llava, coco]) == 1
    # From another place nothing says which of the two is meant.
    path = write_json(tmp_path / "elsewhere" / "records.json", "train/0.png", "blue")
    line = expect_refusal(capsys, being_vl(*flags(model, tmp_path / "c", [path], [coco, llava])))
    assert "ambiguous image" in line


def test_a_member_of_a_tar_that_names_its_image(model: Path, quantized: Quantize, tmp_path: Path) -> None:
    for folder, colour in (("a", "red"), ("b", "green")):
        (tmp_path / folder).mkdir()
        record = json.dumps({"image": "00453/0000.png", "caption": colour}).encode()
        with tarfile.open(tmp_path / folder / "00453.tar", "w") as tar:
            for name, data in (("00453/0000.png", png(colour)), ("00453/0000.json", record)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    paths = [tmp_path / folder / "00453.tar" for folder in "ab"]
    grids = [quantized(path.parent, path.parent.name) for path in paths]
    assert being_vl(*flags(model, tmp_path / "out", paths, grids)) == 0
    assert check_pairs(model, tmp_path / "out", grids) == 2


def test_grids_of_prepared_sequences(model: Path, quantized: Quantize, tmp_path: Path) -> None:
    paths = [write_tar(tmp_path / name / "0.tar", colour) for name, colour in (("x", "red"), ("y", "blue"))]
    grids = [quantized(path.parent, path.parent.name) for path in paths]
    out = tmp_path / "out"
    assert being_vl(*flags(model, out, paths, grids)) == 0
    manifest = read_manifest(out, "sequences")
    assert manifest["grids"] == [str(folder) for folder in grids]
    assert manifest["grids_sha256"] == sorted(sha256(folder / "manifest.json") for folder in grids)
    times = [path.stat().st_mtime_ns for path in sorted(out.glob("*.arrow"))]
    assert being_vl(*flags(model, out, paths, grids[::-1])) == 0
    assert [path.stat().st_mtime_ns for path in sorted(out.glob("*.arrow"))] == times
    assert find_grids(out) == find_grids(out, grids) == grids
    assert find_grids(out, grids[::-1]) == grids[::-1]
    for others in (grids[:1], [*grids, *grids]):
        with pytest.raises(FingerprintError, match="was made from other grids"):
            find_grids(out, others)
    shutil.rmtree(grids[1])
    assert find_grids(out) == []


def test_one_folder_of_grids_or_several(model: Path, quantized: Quantize, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x" / "0.tar", "red")
    folder = quantized(path.parent, "x")
    builders = [
        SequenceBuilder.from_model(model / "model", grids)
        for grids in (folder, str(folder), [folder], Grids.open(folder), Grids.open([folder]).stores[0])
    ]
    first, *others = [builder.build(list(Records(path))) for builder in builders]
    for sequences in others:
        assert [sequence.ids.tolist() for sequence in sequences] == [s.ids.tolist() for s in first]
        assert [sequence.images for sequence in sequences] == [s.images for s in first]
    assert SequenceBuilder.from_model(model / "model", []).grids is None
    options = PrepareOptions(model / "model", [path], tmp_path / "out", str(folder))  # type: ignore[arg-type]
    assert options.grids == [folder]
    with pytest.raises(RecordError, match="--grids"):
        SequenceBuilder.from_model(model / "model").build(list(Records(path)))
