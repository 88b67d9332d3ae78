"""`being-vl quantize` from all kinds of inputs, with images broken in all kinds of ways, and killed at any moment."""

import io
import json
import multiprocessing.process
import os
import re
import resource
import sys
import tarfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from PIL import Image

from being_vl.cli import main
from being_vl.errors import ImageError
from being_vl.files import read_manifest, sha256
from being_vl.images.sources import find_images
from being_vl.quantizer.job import quantize
from being_vl.quantizer.options import QuantizeOptions
from being_vl.shards.grids import GridStore
from helpers import tiny


@pytest.fixture(scope="module")
def quantizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("quantizer")
    tiny.quantizer(folder, codebook_size=64)
    return str(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Images by name."""
    images = {}
    for n in range(7):
        pixels = np.random.default_rng(n).integers(0, 256, (4, 4, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        images[f"{'ab'[n % 2]}/{n:03d}.png"] = encode_image(Image.fromarray(pixels), "PNG")
    return images


def encode_image(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def as_datasets(files: dict[str, bytes]) -> pa.Table:
    """A table with `datasets`' image column."""
    images = [{"bytes": data, "path": name} for name, data in files.items()]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    return pa.table({"image": pa.array(images, kind), "label": list(range(len(files)))})


def test_every_kind_of_input_gives_the_same_grids(
    files: dict[str, bytes], quantizer: str, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "images", files)
    names = list(files)
    (tmp_path / "list.txt").write_text("\n".join([*names, "", names[0]]))
    records = [{"image": names[:2]}, {"image": names[2]}, {"conversations": []}, {"image": names[3:]}]
    (tmp_path / "llava.json").write_text(json.dumps(records))
    write_tar(tmp_path / "tars" / "x" / "0.tar", {f"./{n}": files[n] for n in names[:4]} | {"0.json": b"{}"})
    write_tar(tmp_path / "tars" / "1.tar", {n: files[n] for n in names[4:]})
    table = as_datasets(files)
    pq.write_table(table, tmp_path / "train.parquet", row_group_size=3)
    pq.write_table(pa.table({"id": names, "jpg": list(files.values())}), tmp_path / "plain.parquet")
    (tmp_path / "dataset").mkdir()
    with pa.ipc.new_stream(tmp_path / "dataset" / "data-00000-of-00001.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    (tmp_path / "dataset" / "state.json").write_text("{}")

    def grids(images: Path, root: Path | None = None) -> GridStore:
        return quantize(QuantizeOptions(images, tmp_path / "grids" / images.name, quantizer, root=root))

    expected = grids(folder)
    assert list(expected) == sorted(names)
    rows = dict(enumerate(names))
    keys = {
        "list.txt": (folder, lambda key: key),
        "llava.json": (folder, lambda key: key),
        "tars": (None, lambda key: key.partition(".tar/")[2]),
        "train.parquet": (None, lambda key: rows[int(key.removeprefix("train.parquet/"))]),
        "plain.parquet": (None, lambda key: rows[int(key.removeprefix("plain.parquet/"))]),
        "dataset": (None, lambda key: rows[int(key.removeprefix("data-00000-of-00001.arrow/"))]),
    }
    for name, (root, key_of) in keys.items():
        store = grids(tmp_path / name, root)
        assert {key_of(key) for key in store} == set(names), name
        assert list(store) == sorted(store)
        for key, grid in store.items():
            np.testing.assert_array_equal(grid, expected[key_of(key)])
    assert {"x/0.tar/a/000.png", "1.tar/a/006.png"} <= set(GridStore.open(tmp_path / "grids" / "tars"))


def test_other_libraries_read_the_shards_and_the_manifest_has_their_checksums(
    files: dict[str, bytes], quantizer: str, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "images", files)
    store = quantize(QuantizeOptions(folder, tmp_path / "grids", quantizer, shard_size=3))
    entries = read_manifest(tmp_path / "grids", "grids")["shards"]
    assert [shard["grids"] for shard in entries] == [3, 3, 1]
    for shard in entries:
        assert sha256(tmp_path / "grids" / shard["file"]) == shard["sha256"]
        table = feather.read_table(tmp_path / "grids" / shard["file"])  # what pandas.read_feather calls
        assert table.schema.field("ids").type.value_type == pa.uint8()
        for row in table.to_pylist():
            ids = np.reshape(row["ids"], (row["height"], row["width"]))
            np.testing.assert_array_equal(ids, store[row["key"]])
            assert (row["source_width"], row["source_height"]) == (32, 32)


def test_damaged_inputs_are_named(files: dict[str, bytes], tmp_path: Path) -> None:
    tar_bytes = write_tar(tmp_path / "a.tar", files).read_bytes()
    (tmp_path / "a.tar").write_bytes(b"not a tar" * 200)
    with pytest.raises(ImageError, match=r"a\.tar: not a complete uncompressed tar file"):
        find_images(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(tar_bytes[:700])
    with pytest.raises(ImageError, match=r"a\.tar: not a complete uncompressed tar file"):
        find_images(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(tar_bytes)
    (source, *_) = find_images(tmp_path / "a.tar").sources
    (tmp_path / "a.tar").write_bytes(tar_bytes[:600])
    with pytest.raises(ImageError, match=r"a\.tar/a/000\.png: the tar file ends within it"):
        source.read()
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(ImageError, match=r"b\.parquet: not a complete table"):
        find_images(tmp_path / "b.parquet")
    pq.write_table(pa.table({"text": ["a"], "id": [1]}), tmp_path / "b.parquet")
    with pytest.raises(ImageError, match=r"b\.parquet: expected a column of images.*none in text, id"):
        find_images(tmp_path / "b.parquet")
    for content, reason in (
        ("[1]", "no image found; images: 1 seen, 0 used, 1 left out (1 malformed record)"),
        ("{", "line 1, column 2: not JSON"),
        (
            '[{"image": null}]',
            "no image found; images: 1 seen, 0 used, 1 left out (1 record without an image)",
        ),
    ):
        (tmp_path / "c.json").write_text(content)
        with pytest.raises(ImageError, match=rf"c\.json: {re.escape(reason)}"):
            find_images(tmp_path / "c.json")
    for data, reason in (b"\n", "no image found; images: 0 seen"), (b"a.png\0", "no text; expected a list"):
        (tmp_path / "d.txt").write_bytes(data)
        with pytest.raises(ImageError, match=rf"d\.txt: {reason}"):
            find_images(tmp_path / "d.txt")
    (tmp_path / "e.png").write_bytes(files["a/000.png"])
    with pytest.raises(
        ImageError, match=r"e\.png: expected a folder or a file that ends in \.txt, \.json, \.jsonl, \.tar"
    ):
        find_images(tmp_path / "e.png")


def make_bomb(side: int) -> bytes:
    """A PNG of `side`² black pixels, which takes a few hundred kilobytes."""
    Image.MAX_IMAGE_PIXELS, limit = None, Image.MAX_IMAGE_PIXELS
    try:
        return encode_image(Image.new("1", (side, side)), "PNG")
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def test_bad_images_are_converted_rightly_or_set_aside_with_a_reason(
    files: dict[str, bytes], quantizer: str, tmp_path: Path
) -> None:
    data = files["a/000.png"]
    image = Image.open(io.BytesIO(data)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    rotated_image = image.transpose(Image.Transpose.ROTATE_90)
    levels = np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64
    content_of_names = {
        "rgb.png": data,
        "wrong-extension.jpg": data,
        "rotated.png": encode_image(rotated_image, "PNG", exif=exif),
        "animated.gif": encode_image(
            image.quantize(64), "GIF", save_all=True, append_images=[Image.new("L", (32, 32))]
        ),
        "palette.png": encode_image(image.quantize(64), "PNG"),
        "transparent.png": encode_image(image.convert("RGBA"), "PNG"),
        "cmyk.tiff": encode_image(image.convert("CMYK"), "TIFF"),
        "16-bit.png": encode_image(Image.fromarray(levels), "PNG"),
        "one-pixel.png": encode_image(Image.new("RGB", (1, 1), (255, 0, 0)), "PNG"),
        "strip.png": encode_image(Image.new("RGB", (3000, 1), (255, 0, 0)), "PNG"),
    }
    reasons = {
        "truncated.png": (data[: len(data) // 2], "cannot be decoded"),
        "truncated.jpg": (encode_image(image, "JPEG")[:-200], "(?i:truncated)"),
        "zeros.jpg": (bytes(1000), "cannot identify"),
        "text.png": (b"<html>not found</html>", "cannot identify"),
        "bomb.png": (make_bomb(30_000), "900000000 pixels.* exceeds limit"),
        "float.tiff": (encode_image(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF"), "floating-point"),
        "32-bit.tiff": (encode_image(Image.fromarray(np.full((8, 8), 1 << 20, np.int32)), "TIFF"), "16 bits"),
    }
    folder = write_folder(
        tmp_path / "images", content_of_names | {name: content for name, (content, _) in reasons.items()}
    )
    (folder / "gone.png").symlink_to("nowhere")
    (folder / "empty.png").touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        store = quantize(QuantizeOptions(folder, tmp_path / "grids", quantizer, max_failed=0.5))
    assert set(store) == set(content_of_names)
    assert set(store.failures) == set(reasons)
    for name, (_, reason) in reasons.items():
        assert re.search(f"^{name}: .*{reason}", store.failures[name])
    lines = map(json.loads, (tmp_path / "grids" / "left-out.jsonl").read_text().splitlines())
    assert {line["name"]: line["reason"] for line in lines} == {
        "gone.png": "a link to nothing",
        "empty.png": "empty",
    }
    for image_name in ("wrong-extension.jpg", "rotated.png", "transparent.png"):
        np.testing.assert_array_equal(store[image_name], store["rgb.png"])
    for image_name in ("animated.gif", "palette.png"):
        assert (store[image_name] == store["rgb.png"]).mean() > 0.5
    black_grid = quantize_black(quantizer, tmp_path)
    for name in set(content_of_names) - {"16-bit.png"}:
        assert not np.array_equal(store[name], black_grid), name
    assert len(np.unique(store["16-bit.png"])) > 1


def quantize_black(quantizer: str, tmp_path: Path) -> np.ndarray:
    folder = write_folder(tmp_path / "black", {"a.png": encode_image(Image.new("RGB", (32, 32)), "PNG")})
    return quantize(QuantizeOptions(folder, tmp_path / "black-grids", quantizer))["a.png"]


def start(
    folder: Path,
    out: Path,
    quantizer: str,
    largest_file: int | None = None,
    environment: Mapping[str, str] = {},
) -> multiprocessing.process.BaseProcess:
    """The command in a process of its own; forked, since importing torch again takes seconds."""

    def run() -> None:
        os.environ.update(environment)
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file,) * 2)
        options = ["--out", str(out), "--quantizer", quantizer, "--shard_size", "5", "--max_failed", "0.5"]
        sys.exit(main(["quantize", str(folder), *options]))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def finish(process: multiprocessing.process.BaseProcess) -> int:
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*")}


def test_killed_at_random_moments_and_run_again_it_gives_the_same_files(
    files: dict[str, bytes], quantizer: str, tmp_path: Path
) -> None:
    image_files = {f"{n:04d}.png": data for n, data in enumerate(list(files.values()) * 80)}
    folder = write_folder(tmp_path / "images", image_files | {"0100.png": b"no image"})
    reference_folder, out = tmp_path / "undisturbed", tmp_path / "grids"
    assert finish(start(folder, reference_folder, quantizer)) == 0
    rng, max_shards = np.random.default_rng(0), 0
    for _ in range(4):
        job = start(folder, out, quantizer)
        min_shards = len(list(out.glob("*.arrow"))) + int(rng.integers(1, 20))
        while job.is_alive() and len(list(out.glob("*.arrow"))) < min_shards:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.01))
        inodes = {path.name: path.stat().st_ino for path in out.glob("*.arrow")}
        job.kill()
        finish(job)
        max_shards = max(max_shards, len(inodes))
    assert 0 < max_shards < len(image_files) // 5
    assert not (out / "manifest.json").exists()
    assert finish(start(folder, out, quantizer)) == 0
    assert all((out / name).stat().st_ino == inode for name, inode in inodes.items())
    assert read_files(out) == read_files(reference_folder)


def test_the_processes_of_torchrun_share_the_work_and_give_the_same_files(
    files: dict[str, bytes], quantizer: str, tmp_path: Path
) -> None:
    image_files = {f"{n:04d}.png": data for n, data in enumerate(list(files.values()) * 5)} | {
        "0003.png": b"no image"
    }
    folder = write_folder(tmp_path / "images", image_files)
    assert finish(start(folder, tmp_path / "alone", quantizer)) == 0
    jobs = []
    for rank in (0, 2, 1):
        environment = {"RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_RANK": str(rank)}
        jobs.append(start(folder, tmp_path / "shared", quantizer, environment=environment))
    assert [finish(job) for job in jobs] == [0, 0, 0]
    assert read_files(tmp_path / "shared") == read_files(tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_ray_gives_the_same_files(files: dict[str, bytes], quantizer: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images", files | {"z.png": b"no image"})
    options = {"shard_size": 3, "max_failed": 0.5, "workers": 0}
    quantize(QuantizeOptions(folder, tmp_path / "local", quantizer, **options))
    store = quantize(QuantizeOptions(folder, tmp_path / "ray", quantizer, engine="ray", **options))
    assert store is not None
    assert set(store.failures) == {"z.png"}
    assert read_files(tmp_path / "ray") == read_files(tmp_path / "local")


def test_a_bad_image_in_the_last_shard_does_not_stop_a_job_that_goes_on(
    files: dict[str, bytes], quantizer: str, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "images", files | {"z.png": b"no image"})
    job = QuantizeOptions(folder, tmp_path / "grids", quantizer, shard_size=1, max_failed=0.2)
    quantize(job)
    (tmp_path / "grids" / "grids-00007.arrow").unlink()
    store = quantize(job)
    assert store is not None
    assert set(store.failures) == {"z.png"}


def test_a_full_disk_stops_it_cleanly_and_finished_files_are_kept(
    files: dict[str, bytes], quantizer: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "images", files)
    assert finish(start(folder, tmp_path / "grids", quantizer, largest_file=1000)) == 2
    assert re.search(r"^being-vl: error: .*File too large$", capfd.readouterr().err, re.MULTILINE)
    assert [path.name for path in (tmp_path / "grids").iterdir()] == ["fingerprint.json"]
    assert finish(start(folder, tmp_path / "grids", quantizer)) == 0
    assert len(GridStore.open(tmp_path / "grids")) == 7
