"""Training a quantizer: it starts well, gets better, goes on after kill -9, and refuses what can't work."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from being_vl.demo import shapesworld
from being_vl.errors import CheckpointError, ConfigError, ImageError
from being_vl.quantize.base import load_quantizer
from being_vl.quantize.options import QuantizerTrainOptions
from being_vl.quantize.training import Trainer, edge_loss, start_linear, train_quantizer
from being_vl.quantize.vqgan import VQGAN, cut_tiles, decode_codes, encode_tiles, new_model, to_tensor


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums of floats depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A folder of small pictures and one of larger ones of various sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    shapesworld.generate(folder / "shapes", 30, seed=3)
    (folder / "large").mkdir()
    for n in range(4):
        rng = np.random.default_rng(n)
        coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
        coarse.resize((150 + 200 * n, 120), Image.Resampling.BICUBIC).save(folder / "large" / f"{n}.png")
    return [folder / "shapes" / "images", folder / "large"]


@pytest.fixture
def options(pictures: list[Path], tmp_path: Path) -> QuantizerTrainOptions:
    return QuantizerTrainOptions(
        images=pictures,
        out=tmp_path / "quantizer",
        codebook_size=64,
        code_dim=8,
        width=32,
        steps=24,
        batch_size=4,
        adversarial_start=0.5,
        log_every=1,
        checkpoint_every=6,
    )


def log_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_training_makes_a_quantizer_and_a_log(options: QuantizerTrainOptions) -> None:
    train_quantizer(options)
    quantizer = load_quantizer(options.out)
    assert (quantizer.name, quantizer.codebook_size) == ("custom", 64)
    assert quantizer.encode([Image.new("RGB", (100, 70))])[0].shape == (8, 8)
    log = log_of(options.out)
    assert [entry["step"] for entry in log] == list(range(1, 25))
    assert ["discriminator" in entry for entry in log] == [False] * 12 + [True] * 12
    assert [entry["step"] for entry in log if "psnr" in entry] == [6, 12, 18, 24]
    assert set(log[-1]["psnr"]) == {str(folder) for folder in options.images}
    assert 0 < log[-1]["codes_used"] <= 1
    inode = (options.out / "manifest.json").stat().st_ino
    train_quantizer(options)
    assert (options.out / "manifest.json").stat().st_ino == inode, "a finished training was done again"


def test_training_makes_reconstructions_better(options: QuantizerTrainOptions) -> None:
    options = replace(options, steps=80, adversarial=0.0)
    trainer = Trainer(options)
    psnr = []
    while trainer.done < 40:
        trainer.step()
        if trainer.done in (1, 40):
            psnr.append(np.mean(list(trainer.measure()["psnr"].values())))
    assert psnr[1] > psnr[0] + 0.5 > 15


def test_kill_9_and_the_same_command_give_the_same_losses(options: QuantizerTrainOptions) -> None:
    whole = replace(options, out=options.out.with_name("whole"))
    train_quantizer(whole)
    arguments = ["--images", *map(str, options.images), "--out", str(options.out)]
    for name in ("codebook_size", "code_dim", "width", "steps", "batch_size", "adversarial_start"):
        arguments += [f"--{name}", str(getattr(options, name))]
    arguments += ["--log_every", "1", "--checkpoint_every", "6"]
    command = [sys.executable, "-c", "import sys; from being_vl.cli import main; sys.exit(main())"]
    process = subprocess.Popen(
        [*command, "quantizer", "train", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
    )
    log = options.out / "log.jsonl"
    while process.poll() is None and not (log.is_file() and len(log.read_text().splitlines()) >= 9):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    _, said = process.communicate()
    assert process.returncode == -signal.SIGKILL, said.decode()
    assert not (options.out / "manifest.json").exists()
    with log.open("a") as file:
        file.write('{"step": 9')  # as if killed while it wrote

    train_quantizer(options)
    assert log.read_bytes() == (whole.out / "log.jsonl").read_bytes()
    assert load_quantizer(options.out).fingerprint == load_quantizer(whole.out).fingerprint


def test_a_checkpoint_of_other_options_is_refused(options: QuantizerTrainOptions) -> None:
    train_quantizer(replace(options, steps=2, checkpoint_every=1))
    (options.out / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: is of a training with other options"):
        train_quantizer(replace(options, steps=2, checkpoint_every=1, seed=1))
    (options.out / "checkpoint.pt").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: cannot be read"):
        train_quantizer(replace(options, steps=2, checkpoint_every=1))


def test_folders_are_checked(options: QuantizerTrainOptions, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such folder"):
        train_quantizer(replace(options, images=[tmp_path / "nowhere"]))
    (tmp_path / "one").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "one" / "a.png")
    with pytest.raises(ConfigError, match="has one image; expected at least 2"):
        train_quantizer(replace(options, images=[tmp_path / "one"]))
    (tmp_path / "one" / "b.png").write_text("no image")
    with pytest.raises(ImageError, match=r"b\.png: cannot be decoded"):
        train_quantizer(replace(options, images=[tmp_path / "one"]))


@pytest.mark.parametrize(
    "change",
    [
        {"images": []},
        {"size": 60},
        {"width": 48},
        {"code_dim": 11},
        {"codebook_size": 0},
        {"batch_size": 0},
        {"batch_size": 3},
    ],
)
def test_options_are_checked(options: QuantizerTrainOptions, change: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(change))}: expected"):
        replace(options, **change)


def test_the_start_is_the_principal_components() -> None:
    """With as many codes as a tile's content has dimensions, a new model gives back what it was started on."""
    rng = np.random.default_rng(0)
    basis, mean = rng.normal(size=(10, 192)), rng.normal(size=192) * 0.2
    tiles = torch.from_numpy(rng.normal(size=(500, 10)) @ basis * 0.1 + mean).float()
    torch.manual_seed(0)
    model = new_model(16, code_dim=16, tile=8, width=96)
    start_linear(model, tiles)
    with torch.no_grad():
        latents = encode_tiles(model, tiles[:, :, None, None])
        assert latents.square().mean() == pytest.approx(1, rel=0.1)
        pixels = decode_codes(model, latents[:64].reshape(1, 8, 8, 16))
        back = cut_tiles(model, pixels).flatten(1)
    error = (back - tiles[:64]).square().mean() / (tiles[:64] - tiles.mean(0)).square().mean()
    assert error < 0.03


def test_edge_loss_sees_edges_and_no_constant_shift() -> None:
    flat, edge = torch.full((1, 3, 16, 16), 0.3), torch.zeros(1, 3, 16, 16)
    edge[..., 8:] = 1
    assert edge_loss(flat) == 0
    assert edge_loss(edge) > 0.05


def test_tiles_and_pixels_are_inverse_of_each_other() -> None:
    model = new_model(16, code_dim=4, tile=8, width=32)
    rng = np.random.default_rng(0)
    pixels = to_tensor(rng.integers(0, 256, (2, 24, 16, 3), np.uint8))
    tiles = cut_tiles(model, pixels)
    assert tiles.shape == (2 * 3 * 2, 192, 1, 1)
    top_right = tiles[1].reshape(3, 8, 8)
    torch.testing.assert_close(top_right, pixels[0, :, :8, 8:])
    assert VQGAN(model, "x", 64).downsample == 8
