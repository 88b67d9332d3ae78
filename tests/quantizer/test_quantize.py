"""`being-vl quantize`: from image files of all kinds to grids on disk."""

import io
import json
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from being_vl.errors import ConfigError, FingerprintError, ImageError, ManifestError
from being_vl.files import read_manifest
from being_vl.images.decode import decode_image, fit_square, read_image
from being_vl.images.sources import find_images
from being_vl.quantizer.base import load_quantizer
from being_vl.quantizer.job import encode_batches, quantize
from being_vl.quantizer.loading import LoadedImage, load_images
from being_vl.quantizer.options import QuantizeOptions
from being_vl.shards.grids import GridStore
from helpers import tiny


@pytest.fixture(scope="module")
def quantizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantizer")
    tiny.quantizer(folder, codebook_size=64)
    return folder


def stripes(width: int = 32, height: int = 32, seed: int = 0) -> Image.Image:
    """An image with a different colour in each 8×8 tile."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(0, 256, (-(-height // 8), -(-width // 8), 3), np.uint8)
    return Image.fromarray(colours.repeat(8, 0).repeat(8, 1)[:height, :width])


def encode_image(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_images(path: Path, count: int) -> Path:
    for n in range(count):
        file = path / ("a" if n % 2 else "b/c") / f"{n:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        stripes(seed=n).save(file)
    return path


def options(images: Path, out: Path, quantizer: Path, **changes: object) -> QuantizeOptions:
    return QuantizeOptions(**({"images": images, "out": out, "quantizer": str(quantizer)} | changes))  # type: ignore[arg-type]


def test_grids_are_those_of_the_quantizer_under_the_images_relative_paths(
    quantizer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = write_images(tmp_path / "images", 7)
    with caplog.at_level("INFO", "being_vl"):
        store = quantize(options(images, tmp_path / "grids", quantizer, batch_size=3, shard_size=4))
    assert [message.partition(" images, 0 failed; ")[0] for message in caplog.messages] == [
        "quantized 4 of 7",
        "quantized 7 of 7",
        "images: 7 seen, 7 used, 0 left out",
    ]
    reference = load_quantizer(quantizer)
    assert list(store) == sorted(p.relative_to(images).as_posix() for p in images.rglob("*.png"))
    for key, grid in store.items():
        (expected,) = reference.encode([Image.open(images / key)])
        np.testing.assert_array_equal(grid, expected)
        assert grid.dtype == np.int64
    assert (store.quantizer_name, store.quantizer_fingerprint) == (reference.name, reference.fingerprint)
    assert store.codebook_size == 64
    assert "a/missing.png" not in store
    assert sorted(p.name for p in (tmp_path / "grids").iterdir()) == [
        "fingerprint.json",
        "grids-00000.arrow",
        "grids-00001.arrow",
        "left-out.jsonl",
        "manifest.json",
    ]


def test_batches_and_shards_change_no_grid(quantizer: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 9)
    stores = [
        quantize(
            options(images, tmp_path / f"{batch}-{shard}", quantizer, batch_size=batch, shard_size=shard)
        )
        for batch, shard in ((1, 2), (64, 4096), (4, 9))
    ]
    for key in stores[0]:
        for store in stores[1:]:
            np.testing.assert_array_equal(store[key], stores[0][key])


def test_the_next_batch_is_fetched_while_the_network_encodes_one(quantizer: Path, tmp_path: Path) -> None:
    reference, request = load_quantizer(quantizer), threading.Event()
    images = write_images(tmp_path / "images", 6)
    (images / "bad.png").write_bytes(b"no image")
    sources = find_images(images).sources
    image_batches = list(load_images(sources, reference.preprocessing, 2, 0))

    class WaitingQuantizer:
        def encode_prepared(self, pixel_arrays: list[torch.Tensor]) -> list[np.ndarray]:
            assert request.wait(60)
            return reference.encode_prepared(pixel_arrays)

    def batches() -> Iterator[list[LoadedImage]]:
        yield image_batches[0]
        request.set()
        yield from image_batches[1:]

    rows = list(encode_batches(batches(), WaitingQuantizer(), "cpu", []))  # type: ignore[arg-type]
    assert [image.key for image, _ in rows] == [source.key for source in sources]
    for image, grid in rows:
        (expected,) = reference.encode_prepared([image.pixels]) if image.pixels is not None else [None]
        np.testing.assert_array_equal(grid, expected)


def test_a_compiled_encoder_makes_the_same_grids(
    quantizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    backend = partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(
        torch,
        "compile",
        lambda *words, **options_of_call: calls.append(1) or backend(*words, **options_of_call),
    )
    images = write_images(tmp_path / "images", 5)
    plain_grids = quantize(options(images, tmp_path / "plain", quantizer))
    compiled_grids = quantize(options(images, tmp_path / "compiled", quantizer, compile=True))
    assert len(calls) == 1
    for key in plain_grids:
        np.testing.assert_array_equal(compiled_grids[key], plain_grids[key])


def test_unreadable_images_are_listed_with_the_reason(quantizer: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 3)
    content = (images / "a/01.png").read_bytes()
    (images / "cut.png").write_bytes(content[: len(content) // 2])
    (images / "text.jpg").write_text("no image")
    (images / "noise.gif").write_bytes(bytes(range(256)))
    store = quantize(options(images, tmp_path / "grids", quantizer, max_failed=0.5))
    assert len(store) == 3
    assert set(store.failures) == {"cut.png", "text.jpg", "noise.gif"}
    assert all(key in reason for key, reason in store.failures.items())
    assert "cannot identify" in store.failures["text.jpg"]
    assert read_manifest(tmp_path / "grids", "grids")["failures"] == store.failures


def test_too_many_unreadable_images_stop_the_job(quantizer: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 3)
    (images / "text.jpg").write_text("no image")
    with pytest.raises(ImageError, match=r"1 of 4 images.*max_failed = 0\.01.*text\.jpg"):
        quantize(options(images, tmp_path / "grids", quantizer))
    with pytest.raises(ManifestError, match="no manifest"):
        GridStore.open(tmp_path / "grids")


def test_no_readable_image_is_an_error_whatever_max_failed(quantizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(ImageError, match="1 of 1 images"):
        quantize(options(tmp_path, tmp_path / "grids", quantizer, max_failed=1.0))


def test_missing_and_empty_folders(quantizer: Path, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="nowhere: no such file or folder"):
        quantize(options(tmp_path / "nowhere", tmp_path / "grids", quantizer))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "notes.txt").write_text("Notes.")
    (tmp_path / "images" / ".hidden.png").touch()
    with pytest.raises(
        ImageError, match=r"images: no image found; images: 2 seen, .* \(1 not an image \(\.txt\), 1 hidden\)"
    ):
        quantize(options(tmp_path / "images", tmp_path / "grids", quantizer))


@pytest.mark.parametrize(
    "change", [{"max_failed": 1.5}, {"max_failed": -0.1}, {"batch_size": 0}, {"shard_size": 0}]
)
def test_options_are_checked(change: dict[str, float], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(change))}: expected"):
        options(tmp_path, tmp_path, tmp_path, **change)


def test_a_second_run_takes_over_whole_shards_of_unchanged_images(quantizer: Path, tmp_path: Path) -> None:
    images, out = write_images(tmp_path / "images", 8), tmp_path / "grids"
    job = options(images, out, quantizer, shard_size=4)
    old_grids = dict(quantize(job))
    first_shard, second_shard = out / "grids-00000.arrow", out / "grids-00001.arrow"
    inode = first_shard.stat().st_ino
    (out / "manifest.json").unlink()
    second_shard.write_bytes(second_shard.read_bytes()[:100])  # as after a kill in the middle, but worse
    (out / "grids-00002.arrow").touch()
    new_grids = quantize(job)
    assert first_shard.stat().st_ino == inode
    assert not (out / "grids-00002.arrow").exists()
    for key, grid in old_grids.items():
        np.testing.assert_array_equal(new_grids[key], grid)

    changed_key = next(iter(old_grids))
    stripes(seed=99).save(images / changed_key)
    assert not np.array_equal(quantize(job)[changed_key], old_grids[changed_key])
    assert first_shard.stat().st_ino != inode


def test_another_quantizer_is_refused_and_overwriting_takes_nothing_over(
    quantizer: Path, tmp_path: Path
) -> None:
    images, out = write_images(tmp_path / "images", 4), tmp_path / "grids"
    small_grids = quantize(options(images, out, quantizer))
    with pytest.raises(FingerprintError, match=r"quantizer\.fingerprint was '[0-9a-f]{12}', is"):
        quantize(options(images, out, Path(f"{quantizer}@64")))
    large_grids = quantize(options(images, out, Path(f"{quantizer}@64"), overwrite=True))
    assert {grid.shape for grid in small_grids.values()} == {(4, 4)}
    assert {grid.shape for grid in large_grids.values()} == {(8, 8)}
    assert small_grids.quantizer_fingerprint != large_grids.quantizer_fingerprint


def test_damaged_folders_of_grids_are_refused(quantizer: Path, tmp_path: Path) -> None:
    out = tmp_path / "grids"
    quantize(options(write_images(tmp_path / "images", 4), out, quantizer))
    shard, manifest = out / "grids-00000.arrow", json.loads((out / "manifest.json").read_text())

    for damage in (b"", shard.read_bytes()[:200]):
        copy = shutil.copytree(out, tmp_path / "copy", dirs_exist_ok=True)
        (copy / shard.name).write_bytes(damage)
        with pytest.raises(ManifestError, match="was changed after it had been written"):
            GridStore.open(copy)
    shard.unlink()
    with pytest.raises(ManifestError, match=r"grids-00000\.arrow"):
        GridStore.open(out)
    (out / "manifest.json").write_text(json.dumps(manifest | {"format": "being-vl/quantizer"}))
    with pytest.raises(ManifestError, match="expected 'being-vl/grids'"):
        GridStore.open(out)


def test_exif_orientation_is_applied() -> None:
    upright_stripes = stripes(48, 32)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter turn clockwise
    rotated_image = upright_stripes.transpose(Image.Transpose.ROTATE_90)
    assert rotated_image.size == (32, 48)
    upright_image = decode_image(encode_image(rotated_image, "PNG", exif=exif), "a.png")
    np.testing.assert_array_equal(np.asarray(upright_image), np.asarray(upright_stripes))


def test_transparency_is_composited_on_white() -> None:
    red_image = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    red_image.putpixel((1, 0), (0, 0, 0, 0))
    half_transparent_image = Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    assert [decode_image(encode_image(red_image, "PNG"), "").getpixel((x, 0)) for x in (0, 1)] == [
        (200, 0, 0),
        (255, 255, 255),
    ]
    assert decode_image(encode_image(half_transparent_image, "PNG"), "").getpixel((0, 0)) == (127, 127, 127)
    assert decode_image(encode_image(half_transparent_image.convert("LA"), "PNG"), "").getpixel((0, 0)) == (
        127,
        127,
        127,
    )


def test_palettes_with_and_without_transparency() -> None:
    palette = stripes().quantize(16)
    np.testing.assert_array_equal(
        np.asarray(decode_image(encode_image(palette, "PNG"), "")), np.asarray(palette.convert("RGB"))
    )
    transparent_image = decode_image(encode_image(palette, "PNG", transparency=palette.getpixel((0, 0))), "")
    assert transparent_image.getpixel((0, 0)) == (255, 255, 255)
    assert transparent_image.getpixel((31, 31)) == palette.convert("RGB").getpixel((31, 31))
    assert decode_image(encode_image(palette, "GIF"), "").mode == "RGB"


def test_grey_levels_of_1_8_and_16_bits() -> None:
    levels = np.array([[0, 257, 32768, 65535]], np.uint16)
    image_16_bit = decode_image(encode_image(Image.fromarray(levels), "PNG"), "")
    assert [image_16_bit.getpixel((x, 0)) for x in range(4)] == [(v, v, v) for v in (0, 1, 128, 255)]
    tiff = decode_image(encode_image(Image.fromarray(levels), "TIFF"), "")
    np.testing.assert_array_equal(np.asarray(tiff), np.asarray(image_16_bit))
    assert decode_image(encode_image(Image.new("L", (1, 1), 77), "PNG"), "").getpixel((0, 0)) == (77, 77, 77)
    assert decode_image(encode_image(Image.new("1", (1, 1), 1), "PNG"), "").getpixel((0, 0)) == (
        255,
        255,
        255,
    )


def test_cmyk_and_the_first_frame_of_an_animation() -> None:
    assert decode_image(encode_image(Image.new("CMYK", (8, 8)), "JPEG"), "").getpixel((0, 0)) == (
        255,
        255,
        255,
    )
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    film = encode_image(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(film, "").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_any_cut_or_changed_file_is_an_image_or_an_image_error(kind: str) -> None:
    content, rng = encode_image(stripes(), kind), np.random.default_rng(0)
    for _ in range(150):
        damaged_data = bytearray(content[: rng.integers(len(content) + 1)] if rng.integers(2) else content)
        for place in rng.integers(0, len(damaged_data), 3) if damaged_data else ():
            damaged_data[place] = rng.integers(256)
        try:
            outcome = decode_image(bytes(damaged_data), "x").mode
        except ImageError as error:
            outcome = str(error)
        assert outcome == "RGB" or outcome.startswith("x: cannot be decoded")


def test_read_image_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"gone\.png: cannot be read \(No such file"):
        read_image(tmp_path / "gone.png")


def test_fit_square_keeps_the_whole_image_and_its_proportions() -> None:
    square = np.asarray(fit_square(Image.new("RGB", (100, 50), "black"), 64))
    assert square.shape == (64, 64, 3)
    assert (square[16:48] == 0).all()
    assert (square[:16] == 255).all()
    assert (square[48:] == 255).all()
    square_image = stripes(64, 64)
    np.testing.assert_array_equal(np.asarray(fit_square(square_image, 64)), np.asarray(square_image))
    assert fit_square(Image.new("L", (1, 5000)), 64).size == (64, 64)
