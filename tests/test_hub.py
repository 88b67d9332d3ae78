"""Datasets of the hub, from a cache that is made here, and `datasets.Dataset` objects, where files are taken."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from being_vl import GridStore, PrepareOptions, QuantizeOptions, RecordFile, Records, prepare, quantize
from being_vl.cli import main
from being_vl.errors import ConfigError, ImageError, RecordError
from being_vl.files import sha256
from being_vl.hub import is_hub_name, local_path, to_path
from being_vl.images.record_files import find_record_files
from being_vl.images.sources import find_images
from being_vl.training.fingerprint import hash_inputs
from helpers import tiny

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "It."}]
COLOURS = ("red", "green", "blue")


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(buffer, "PNG")
    return buffer.getvalue()


def table_of_images(colours: tuple[str, ...]) -> pa.Table:
    images = [{"bytes": png(colour), "path": f"{colour}.png"} for colour in colours]
    return pa.table({"image": images, "conversations": [TURNS] * len(colours)})


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with a dataset, without the hub: two tables, and a list of records that names images."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    files = {"README.md": b"# Shapes", "images/a.png": png("red"), "images/b.png": png("blue")}
    records = [{"image": f"images/{name}.png", "conversations": TURNS} for name in "ab"]
    files["llava.json"] = json.dumps(records).encode()
    for part in range(2):
        buffer = io.BytesIO()
        pq.write_table(table_of_images(COLOURS[part : part + 2]), buffer)
        files[f"data/train-0000{part}.parquet"] = buffer.getvalue()
    repository = cache / "datasets--owner--shapes"
    for revision, commit in (("main", "1" * 40), ("v2", "2" * 40)):
        for number, (name, content) in enumerate(files.items()):
            blob = repository / "blobs" / f"{number:040d}"
            blob.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(content)
            link = repository / "snapshots" / commit / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    return repository


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    module.disable_progress_bars()
    return module


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("hf://datasets/owner/shapes", "1" * 40),
        ("hf://datasets/owner/shapes/", "1" * 40),
        ("hf://datasets/owner/shapes@v2", "2" * 40),
        ("hf://datasets/owner/shapes@" + "2" * 40, "2" * 40),
        ("hf://datasets/owner/shapes/data", "1" * 40 + "/data"),
        ("hf://datasets/owner/shapes@v2/data/train-00001.parquet", "2" * 40 + "/data/train-00001.parquet"),
    ],
)
def test_a_name_on_the_hub_is_a_folder_or_file_of_its_cache(hub: Path, name: str, place: str) -> None:
    assert local_path(name) == local_path(Path(name)) == hub / "snapshots" / place
    assert is_hub_name(name)
    assert is_hub_name(Path(name))


def test_images_and_records_of_the_hub_have_the_same_keys(hub: Path, tmp_path: Path) -> None:
    folder = tiny.expanded(tmp_path / "llm", ["any.png"], family="llama", template=tiny.LLAMA3, layers=1)[0]
    for name, count in (("data", 4), ("llava.json", 2)):
        source = f"hf://datasets/owner/shapes/{name}"
        out = tmp_path / name
        grids = quantize(QuantizeOptions(source, out / "grids", str(folder / "quantizer"), workers=0))
        assert grids is not None
        assert len(grids) == count
        prepare(PrepareOptions(folder, [source], out / "prepared", grids=[out / "grids"]))
        assert json.loads((out / "prepared" / "manifest.json").read_text())["records"] == count


def test_commands_take_names_on_the_hub(hub: Path, tmp_path: Path) -> None:
    name = "hf://datasets/owner/shapes/data"
    assert main(["quantize", name, "--out", str(tmp_path / "grids"), "--workers", "0"]) == 0
    assert len(GridStore.open(tmp_path / "grids")) == 4
    tables = [hub / "snapshots" / ("1" * 40) / "data" / f"train-0000{part}.parquet" for part in range(2)]
    hashes = hash_inputs(tmp_path, [RecordFile(name)], [])["records_sha256"]
    assert hashes == [sha256(table) for table in tables]


def test_names_that_the_hub_has_not_are_named(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, reason in {
        "hf://datasets/owner/gone": "owner/gone: cannot be downloaded .*cannot be reached",
        "hf://datasets/owner/shapes@v9": "cannot be downloaded",
        "hf://datasets/owner/shapes/validation": "holds no validation",
        "hf://datasets/shapes": "expected hf://datasets/OWNER/NAME",
        "hf://models/owner/shapes": "hf://models/owner/shapes: expected hf://datasets/OWNER/NAME",
        "hf://": "expected hf://datasets/OWNER/NAME",
        "hf://datasets/owner/shapes/../other": "expected hf://datasets/OWNER/NAME",
        "hf://datasets/ow ner/shapes": "cannot be downloaded",
    }.items():
        with pytest.raises(ConfigError, match=reason) as fault:
            local_path(name)
        assert "\n" not in str(fault.value)
        with pytest.raises(ConfigError):
            find_images(name)
        with pytest.raises(ConfigError):
            Records(name)
    # A mistyped path is not looked up on the hub.
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ImageError, match=r"owner/shapes: no such file or folder; .* hf://datasets/OWNER/NAME"
    ):
        find_images("owner/shapes")
    with pytest.raises(RecordError, match="owner/shapes: no such file"):
        Records("owner/shapes")


def test_a_folder_of_records_is_its_files_in_order_without_bystanders(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    records = json.dumps([{"messages": []}])
    contents = {
        "b/1.json": "\ufeff [\n" + records[1:],
        "b/0.jsonl": '{"messages": []}\n',
        "a.json": records,
        "a.parquet": "PAR1",
        "z/0.tar": "tar",
        "z/0.parquet": "img2dataset",
        "z/0_stats.json": "{}",
        "cache-0123.arrow": "cache",
        "data-0.arrow": "ARROW1",
        "dataset_info.json": "{}",
        "state.json": "{}",
        "README.md": "# Notes",
        "._a.json": records,
        ".hidden/c.json": records,
        "images/a.png": "png",
        "empty.jsonl": "",
    }
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    names = [str(path.relative_to(folder)) for path in find_record_files(folder)]
    assert names == ["a.json", "a.parquet", "b/0.jsonl", "b/1.json", "data-0.arrow", "z/0.tar"]
    assert find_record_files(folder / "README.md") == [folder / "README.md"]  # a file is taken as it is
    (folder / "z" / "manifest.json").write_text('{"format": "being-vl/sequences"}')
    assert len(find_record_files(folder)) == 5
    with pytest.raises(RecordError, match="z: the output of a job of being-vl; expected files of records"):
        find_record_files(folder / "z")
    shutil.copytree(folder / "images", tmp_path / "images")
    with pytest.raises(
        RecordError, match=r"images: no file of records found in the folder; .*1 no records \(\.png\)"
    ):
        Records(tmp_path / "images")


def make_dataset(datasets: Any, colours: tuple[str, ...] = COLOURS) -> Any:
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "conversations": [{"from": datasets.Value("string"), "value": datasets.Value("string")}],
        }
    )
    images = [Image.new("RGB", (16, 16), colour) for colour in colours]
    return datasets.Dataset.from_dict(
        {"image": images, "conversations": [TURNS] * len(colours)}, features=features
    )


def test_a_dataset_is_quantized_and_prepared_as_a_folder_is(datasets: Any, tmp_path: Path) -> None:
    folder = tiny.expanded(tmp_path / "llm", ["any.png"], family="llama", template=tiny.LLAMA3, layers=1)[0]
    quantizer = str(folder / "quantizer")
    dataset = make_dataset(datasets)
    # All of it, some of its rows in another order, and some that a filter leaves.
    for number, part in enumerate(
        (dataset, dataset.select([2, 0]), dataset.filter(lambda _, i: i > 0, with_indices=True))
    ):
        out = tmp_path / str(number)
        grids = quantize(QuantizeOptions(images=part, out=out / "grids", quantizer=quantizer, workers=0))
        assert grids is not None
        assert len(grids) == len(part)
        for grid, row in zip(grids.values(), part, strict=True):
            (expected_grid,) = tiny_quantizer(quantizer).encode([row["image"]])
            np.testing.assert_array_equal(grid, expected_grid)
        assert len(Records(part)) == len(part)
        prepare(PrepareOptions(folder, records=[part], out=out / "prepared", grids=[out / "grids"]))
        assert json.loads((out / "prepared" / "manifest.json").read_text())["records"] == len(part)
        # A second time, on the same rows: nothing is written again.
        (path,) = (tmp_path / "cache" / "being_vl").glob(f"{to_path(part).name}/*")
        time = path.stat().st_mtime_ns
        assert QuantizeOptions(images=part, out=out / "grids").images == to_path(part)
        assert path.stat().st_mtime_ns == time
    assert len(list((tmp_path / "cache" / "being_vl").iterdir())) == 3


def tiny_quantizer(path: str) -> Any:
    from being_vl import load_quantizer

    return load_quantizer(path, "cpu")


def test_records_may_be_a_dataset_without_a_list_around_it(datasets: Any, tmp_path: Path) -> None:
    options = PrepareOptions("model", records=make_dataset(datasets), out=tmp_path / "out")
    assert len(options.records) == 1


def test_images_that_a_dataset_only_names_are_its_own_and_not_taken_when_stale(
    datasets: Any, tmp_path: Path
) -> None:
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        (tmp_path / name).write_bytes(png(colour))
    paths = [str(tmp_path / name) for name in ("a.png", "b.png")]
    dataset = datasets.Dataset.from_dict({"image": paths, "pages": [[paths[1]], paths]})
    dataset = dataset.cast_column("image", datasets.Image()).cast_column(
        "pages", datasets.List(datasets.Image())
    )
    folder = to_path(dataset)
    sources = find_images(folder, column="image").sources
    assert [source.read() for source in sources] == [png("red"), png("blue")]
    assert to_path(dataset) == folder
    (tmp_path / "b.png").write_bytes(png("green") + b" ")
    assert to_path(dataset) != folder
    (tmp_path / "a.png").unlink()
    with pytest.raises(ConfigError, match=r"images: a Dataset that cannot be written .*a\.png"):
        QuantizeOptions(images=dataset, out=tmp_path / "grids")


def test_what_is_no_single_dataset_is_refused_by_name(datasets: Any, tmp_path: Path) -> None:
    dataset = make_dataset(datasets)
    splits = datasets.DatasetDict({"train": dataset, "test": dataset})
    for value, reason in (
        (splits, "a DatasetDict of the splits train, test; expected one of them"),
        (dataset.to_iterable_dataset(), "an IterableDataset; expected a Dataset"),
        (dataset.with_transform(lambda rows: rows), "with a transform"),
        (dataset.select([]), "without rows"),
        (7, "of the type int; expected a path or a datasets.Dataset"),
    ):
        with pytest.raises(ConfigError, match=f"images: .*{reason}"):
            QuantizeOptions(images=value, out=tmp_path / "grids")
        if value != 7:
            with pytest.raises(ConfigError, match=reason):
                Records(value)
            with pytest.raises(ConfigError, match=f"path: .*{reason}"):
                PrepareOptions("model", records=[value], out=tmp_path / "out")
