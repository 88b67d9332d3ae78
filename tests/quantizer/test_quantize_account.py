"""What `being-vl quantize` says and stores of everything that it came upon, in the first run and in later ones."""

import io
import json
import logging
import os
import signal
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from being_vl.account import Account
from being_vl.cli import main
from being_vl.errors import ImageError
from being_vl.files import read_manifest
from being_vl.quantizer.base import load_quantizer
from being_vl.quantizer.job import quantize
from being_vl.quantizer.loading import load_image, load_images
from being_vl.quantizer.options import QuantizeOptions
from being_vl.shards.grids import GridStore
from helpers import tiny


@pytest.fixture(scope="module")
def quantizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("quantizer")
    tiny.quantizer(folder, codebook_size=64)
    return str(folder)


def image(level: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (level, 0, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight images that can be read, two that cannot, and four other files."""
    folder = tmp_path / "images"
    folder.mkdir()
    for n in range(8):
        (folder / f"{n}.png").write_bytes(image(n))
    for name in ("bad.png", "worse.jpg"):
        (folder / name).write_text("no image")
    for name in ("a.txt", "b.txt", ".hidden.png", "c.tar.gz"):
        (folder / name).write_bytes(b"\x1f\x8b" if name.endswith("gz") else b"1")
    return folder


ACCOUNT = (
    "images: 14 seen, 8 used, 6 left out (2 not an image (.txt), 2 cannot be decoded, 1 compressed (decompress it), "
    "1 hidden)"
)


def run(options: QuantizeOptions, caplog: pytest.LogCaptureFixture) -> tuple[GridStore, list[str]]:
    caplog.clear()
    with caplog.at_level(logging.INFO, "being_vl"):
        store = quantize(options)
    assert store is not None
    return store, caplog.messages


def counts(line: str) -> tuple[str, set[str]]:
    head, _, tail = line.partition(" (")
    return head, set(tail.removesuffix(")").split(", "))


def test_the_last_line_accounts_for_everything_and_so_do_the_files(
    folder: Path, quantizer: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "grids"
    store, lines = run(
        QuantizeOptions(folder, out, quantizer, max_failed=0.5, shard_size=3, workers=0), caplog
    )
    assert counts(lines[-1]) == counts(ACCOUNT)
    assert lines[-2].startswith("2 images cannot be read; first: bad.png: cannot be decoded (")
    manifest = read_manifest(out, "grids")
    assert manifest["root"] == str(folder)
    assert Account.from_json(manifest["account"]).describe() == lines[-1]
    left_out = [json.loads(line) for line in (out / "left-out.jsonl").read_text().splitlines()]
    assert left_out == [
        {"name": ".hidden.png", "reason": "hidden"},
        {"name": "c.tar.gz", "reason": "compressed (decompress it)"},
    ]
    assert set(store.failures) == {"bad.png", "worse.jpg"}


def test_later_runs_say_the_same(
    folder: Path, quantizer: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One that was stopped for its failures and goes on with a higher limit, and one that finds all finished."""
    out = tmp_path / "grids"
    with pytest.raises(ImageError, match=r"at least 2 of 10 images.*first: bad\.png: cannot be decoded"):
        quantize(QuantizeOptions(folder, out, quantizer, max_failed=0.05, workers=0))
    options = QuantizeOptions(folder, out, quantizer, max_failed=0.5, workers=0)
    _, first_lines = run(options, caplog)
    _, second_lines = run(options, caplog)
    assert second_lines == [f"{out}: finished before, kept", *first_lines[-2:]]
    with pytest.raises(ImageError, match="at least 2 of 10 images"):
        quantize(QuantizeOptions(folder, out, quantizer, max_failed=0.1, workers=0))


def test_progress_tells_what_was_there_before(
    folder: Path, quantizer: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = QuantizeOptions(folder, tmp_path / "grids", quantizer, max_failed=0.5, shard_size=2, workers=0)
    run(options, caplog)
    (tmp_path / "grids/grids-00001.arrow").unlink()
    (tmp_path / "grids/grids-00003.arrow").unlink()
    _, lines = run(options, caplog)
    progress = [line.partition(" images a second")[0].rpartition("; ")[0] for line in lines[:2]]
    assert progress == [f"quantized {n} of 4 images, 6 in other shards, 0 failed" for n in (2, 4)]


def test_rows_without_an_image_are_left_out_and_fail_nothing(
    quantizer: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = [image(n) if n % 2 else None for n in range(6)]
    pq.write_table(pa.table({"image": images}), tmp_path / "t.parquet")
    options = QuantizeOptions(
        tmp_path / "t.parquet", tmp_path / "grids", quantizer, max_failed=0.0, workers=0
    )
    store, lines = run(options, caplog)
    assert list(store) == ["t.parquet/1", "t.parquet/3", "t.parquet/5"]
    assert lines[-1] == "images: 6 seen, 3 used, 3 left out (3 row without an image)"
    left_out = [
        json.loads(line)["name"] for line in (tmp_path / "grids/left-out.jsonl").read_text().splitlines()
    ]
    assert left_out == ["t.parquet/0", "t.parquet/2", "t.parquet/4"]
    pq.write_table(pa.table({"image": pa.array([None] * 3, pa.binary())}), tmp_path / "empty.parquet")
    with pytest.raises(ImageError, match="none of its 3 rows has an image"):
        quantize(QuantizeOptions(tmp_path / "empty.parquet", tmp_path / "empty", quantizer, workers=0))


def test_a_second_run_sees_changed_and_added_files_of_a_list(
    folder: Path, quantizer: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "list.txt").write_text("0.png\n1.png\ngone.png\n")
    options = QuantizeOptions(folder / "list.txt", tmp_path / "grids", quantizer, max_failed=0.5, workers=0)
    store, lines = run(options, caplog)
    assert lines[-1] == "images: 3 seen, 2 used, 1 left out (1 cannot be read)"
    old_grid = store["1.png"]
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "1.png")
    (folder / "gone.png").write_bytes(image(200))
    store, lines = run(options, caplog)
    assert lines[-1] == "images: 3 seen, 3 used, 0 left out"
    assert set(store) == {"0.png", "1.png", "gone.png"}
    assert not np.array_equal(store["1.png"], old_grid)


def test_grids_of_an_updated_tar_are_right_and_verified(
    quantizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for level in (0, 200):  # the second time as `tar -r` does
        with tarfile.open(tmp_path / "a.tar", "a") as tar:
            member = tarfile.TarInfo("1.png")
            member.size = len(image(level))
            tar.addfile(member, io.BytesIO(image(level)))
    store = quantize(QuantizeOptions(tmp_path / "a.tar", tmp_path / "grids", quantizer, workers=0))
    assert store is not None
    assert list(store) == ["a.tar/1.png"]
    (expected,) = load_quantizer(quantizer).encode([Image.open(io.BytesIO(image(200)))])
    np.testing.assert_array_equal(store["a.tar/1.png"], expected)
    assert main(["grids", "verify", str(tmp_path / "grids")]) == 0
    assert "1 grids" in capsys.readouterr().out


@dataclass
class Source:
    """An image that cannot be read, in a way of its own."""

    key: str
    fault: Any
    place: str = ""
    size: int = 0
    fingerprint: tuple[Any, ...] = ()

    def read(self) -> bytes:
        if isinstance(self.fault, bytes):
            return self.fault
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise self.fault


@pytest.mark.parametrize(
    ("fault", "reason", "kind"),
    [
        (OSError(5, "Input/output error"), r"cannot be read \(Input/output error\)", "cannot be read"),
        (ValueError("embedded null byte"), "ValueError: embedded null byte", "cannot be read"),
        (MemoryError(), r"cannot be read \(not enough memory\)", "cannot be read"),
        (pa.ArrowInvalid("broken" * 10_000), "ArrowInvalid: broken.*…", "cannot be read"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer", "cannot be read"),
        (b"<html>" * 1000, "cannot be decoded", "cannot be decoded"),
    ],
)
def test_whatever_is_wrong_with_an_image_is_its_reason(
    fault: Any, reason: str, kind: str, quantizer: str
) -> None:
    key = "a\0b\x1b[31m" * 100 + ".png"
    loaded = load_image(Source(key, fault), load_quantizer(quantizer).preprocessing)
    assert loaded.pixels is None
    assert (loaded.key, loaded.kind) == (key, kind)
    assert loaded.reason.isprintable()
    assert len(loaded.reason) < 800
    assert loaded.reason.startswith("a\\x00b")
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(loaded.reason)


def test_the_end_of_a_process_names_the_image_that_it_read(quantizer: str) -> None:
    sources = [Source(f"{n}.png", "kill" if n == 5 else image(n)) for n in range(8)]
    batches = load_images(sources, load_quantizer(quantizer).preprocessing, 2, 2)
    with pytest.raises(
        ImageError, match=r"^(\d\.png, )?5\.png(, \d\.png)?: the process that read it has ended"
    ):
        list(batches)
