"""Training a quantizer: it starts well, gets better, goes on after kill -9, and refuses what can't work."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from functools import partial
from itertools import chain
from operator import attrgetter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from being_vl.demo import shapesworld
from being_vl.errors import CheckpointError, ConfigError, FingerprintError, ImageError, OutputError
from being_vl.files import MANIFEST, write_manifest
from being_vl.quantizer.base import load_quantizer
from being_vl.quantizer.models.tiled import VQGAN, cut_tiles, decode_codes, encode_tiles, new_model, to_tensor
from being_vl.quantizer.training.codebook import Codebook
from being_vl.quantizer.training.crops import Crops
from being_vl.quantizer.training.measure import measure
from being_vl.quantizer.training.options import (
    AdversarialOptions,
    CheckpointOptions,
    CodebookOptions,
    LoggingOptions,
    NetworkOptions,
    PerceptualOptions,
    QuantizerTrainOptions,
)
from being_vl.quantizer.training.start import start_linear
from being_vl.quantizer.training.trainer import Trainer, train_quantizer
from helpers import tiny

pytestmark = pytest.mark.usefixtures("one_thread")

NO_DISCRIMINATOR = AdversarialOptions(weight=0.0)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A folder of small images and one of larger ones of various sizes."""
    folder = tmp_path_factory.mktemp("images")
    shapesworld.generate(folder / "shapes", 30, seed=3)
    (folder / "large").mkdir()
    for n in range(4):
        rng = np.random.default_rng(n)
        small_image = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
        small_image.resize((150 + 200 * n, 120), Image.Resampling.BICUBIC).save(folder / "large" / f"{n}.png")
    return [folder / "shapes" / "images", folder / "large"]


@pytest.fixture
def options(images: list[Path], tmp_path: Path) -> QuantizerTrainOptions:
    return QuantizerTrainOptions(
        images=images,
        out=tmp_path / "quantizer",
        network=NetworkOptions(width=32),
        codebook=CodebookOptions(size=64, dim=8),
        adversarial=AdversarialOptions(start=0.5),
        steps=24,
        batch_size=4,
        logging=LoggingOptions(every=1),
        checkpoint=CheckpointOptions(every=6),
        device="cpu",
    )


def flags(options: QuantizerTrainOptions, out: Path) -> list[str]:
    """The command's flags for the options of these tests."""
    names = (
        "network.width",
        "codebook.size",
        "codebook.dim",
        "adversarial.start",
        "steps",
        "batch_size",
        "logging.every",
        "checkpoint.every",
        "device",
    )
    values = [[f"--{name}", str(attrgetter(name)(options))] for name in names]
    return ["--images", *map(str, options.images), "--out", str(out), *chain.from_iterable(values)]


def read_entries(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_training_makes_a_quantizer_and_a_log(options: QuantizerTrainOptions) -> None:
    train_quantizer(options)
    quantizer = load_quantizer(options.out)
    assert (quantizer.name, quantizer.codebook_size) == ("custom", 64)
    assert quantizer.encode([Image.new("RGB", (100, 70))])[0].shape == (8, 8)
    log = read_entries(options.out)
    assert [entry["step"] for entry in log] == list(range(1, 25))
    assert ["discriminator" in entry for entry in log] == [False] * 12 + [True] * 12
    assert [entry["step"] for entry in log if "psnr" in entry] == [6, 12, 18, 24]
    assert set(log[-1]["psnr"]) == set(log[-1]["ssim"]) == {str(folder) for folder in options.images}
    assert all(0 < value < 1 for value in log[-1]["ssim"].values())
    assert 0 < log[-1]["codes_used"] <= 1
    sheets = options.out / "reconstructions"
    assert [path.name for path in sorted(sheets.iterdir())] == [f"{n:07d}.png" for n in (6, 12, 18, 24)]
    board = EventAccumulator(str(options.out / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("psnr/large")] == [6, 12, 18, 24]
    png = board.Images("reconstructions")[-1].encoded_image_string
    with Image.open(io.BytesIO(png)) as image, Image.open(sheets / "0000024.png") as file:
        assert np.array_equal(np.asarray(image), np.asarray(file))
    inode = (options.out / "manifest.json").stat().st_ino
    train_quantizer(options)
    assert (options.out / "manifest.json").stat().st_ino == inode, "a finished training was done again"


def test_training_makes_reconstructions_better(options: QuantizerTrainOptions) -> None:
    options = replace(options, steps=80, adversarial=NO_DISCRIMINATOR)
    trainer = Trainer(options)
    psnr = []
    while trainer.step < 40:
        trainer.train_step()
        if trainer.step in (1, 40):
            psnr.append(np.mean(list(measure(trainer.autoencoder, trainer.crops).psnr.values())))
    assert psnr[1] > psnr[0] + 0.5 > 15


def test_a_codebook_that_learns_by_gradients(options: QuantizerTrainOptions) -> None:
    codebook = replace(options.codebook, update="gradient")
    trainer = Trainer(replace(options, codebook=codebook, steps=80, adversarial=NO_DISCRIMINATOR))
    trainer.train_step()
    start_codes = trainer.codebook.weight.clone()
    start_psnr = np.mean(list(measure(trainer.autoencoder, trainer.crops).psnr.values()))
    while trainer.step < 40:
        trainer.train_step()
    movement = (trainer.codebook.weight - start_codes).abs().amax(1)
    assert (movement > 0).all()
    assert np.mean(list(measure(trainer.autoencoder, trainer.crops).psnr.values())) > start_psnr + 0.5
    final_codes = trainer.codebook.weight.clone()
    trainer.train_step()
    assert torch.equal(trainer.codebook.weight, final_codes)


def test_unused_codes_are_placed_anew(options: QuantizerTrainOptions) -> None:
    """Nothing is near to half of the codes, until they are put where the tiles are."""
    codebook = replace(options.codebook, ema_decay=0.8, dead_threshold=0.2)
    options = replace(options, codebook=codebook, encoder_share=1.0, adversarial=NO_DISCRIMINATOR)
    trainer = Trainer(replace(options, steps=200))
    trainer.train_step()
    trainer.codebook.weight[::2] += 100
    trainer.codebook.sums.copy_(trainer.codebook.weight * trainer.codebook.counts[:, None])
    while trainer.step < 40:
        trainer.train_step()
    assert trainer.codebook.weight.abs().max() < 50


def test_reserved_codes_are_the_first_folders() -> None:
    """Latents that the codes are placed on get a code of their own kind, where the kinds overlap as well."""
    rng = torch.Generator().manual_seed(0)
    first_folder = torch.randn(400, 3, generator=rng)
    other_folder = torch.randn(2000, 3, generator=rng) * 2 + torch.tensor([1.0, 0, 0])
    codebook = Codebook(torch.zeros(64, 3), ema_decay=0.99, dead_threshold=0.03)
    codebook.place([first_folder, other_folder], 16, rng)
    assert codebook.find_nearest_codes(first_folder).max() < 16
    counts = torch.bincount(codebook.find_nearest_codes(other_folder), minlength=64)
    assert counts[:16].sum() < 0.7 * len(other_folder)
    assert (counts[16:] > 0).all()
    errors = [
        (x - codebook.weight[codebook.find_nearest_codes(x)]).square().sum(1).mean()
        for x in (first_folder, other_folder)
    ]
    assert max(errors) < 3
    codebook.place([first_folder, other_folder], 0, rng)
    assert codebook.find_nearest_codes(first_folder).max() >= 16


def test_bfloat16_loses_about_the_same(options: QuantizerTrainOptions) -> None:
    losses = []
    for precision in ("float32", "bfloat16"):
        trainer = Trainer(replace(options, adversarial=AdversarialOptions(start=0.0), precision=precision))
        losses.append([trainer.train_step()["loss"] for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert losses[0] != losses[1]


def test_compiled_networks_lose_the_same(
    options: QuantizerTrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced and differentiated as for the default backend, which would take minutes to make C++ of it."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    losses = []
    for compile_networks in (False, True):
        trainer = Trainer(
            replace(options, adversarial=AdversarialOptions(start=0.0), compile=compile_networks)
        )
        losses.append([trainer.train_step()["loss"] for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.slow
def test_two_processes_lose_as_one(options: QuantizerTrainOptions) -> None:
    """Both halves of the training: moving and settled, with the discriminator, and codes that are placed again."""
    options_of_one = replace(options, codebook=replace(options.codebook, ema_decay=0.9, dead_threshold=0.5))
    train_quantizer(options_of_one)
    out = options.out.with_name("shared")
    arguments = [*flags(options, out), "--codebook.ema_decay", "0.9", "--codebook.dead_threshold", "0.5"]
    arguments += ["--workers", "1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run(
        [*torchrun, "-m", "being_vl", "quantizer", "train", *arguments],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    log_of_one, log_of_two = read_entries(options_of_one.out), read_entries(out)
    assert len(log_of_one) == len(log_of_two) == options.steps
    for a, b in zip(log_of_one, log_of_two, strict=True):
        assert set(a) == set(b)
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-2 if a["step"] > 8 else 1e-4), a["step"]
    assert log_of_two[-1]["psnr"] == pytest.approx(log_of_one[-1]["psnr"], abs=0.1)


def test_a_batch_that_processes_cannot_share_evenly(options: QuantizerTrainOptions) -> None:
    with pytest.raises(ConfigError, match="batch_size: 4 cannot be shared evenly by 3 processes"):
        Trainer(options, rank=0, ranks=3)


def test_crops_do_not_depend_on_who_makes_them(images: list[Path]) -> None:
    crops = Crops(images, [], 64, 8, seed=5)
    (batch,) = crops.draw_step((1, 7), range(4), 4)
    parts = [
        part_batch
        for numbers in (range(2), range(2, 4))
        for part_batch in crops.draw_step((1, 7), numbers, 4)
    ]
    assert torch.equal(torch.cat([part.pixels for part in parts]), batch.pixels)
    assert torch.equal(torch.cat([part.chances for part in parts]), batch.chances)


def test_crops_are_flipped_every_other_time_and_not_enlarged(tmp_path: Path) -> None:
    """Of images that grow lighter to the right, in the size that they have."""
    ramp = np.tile(np.linspace(0, 255, 40).astype(np.uint8)[None, :, None], (40, 1, 3))
    for n in range(2):
        Image.fromarray(ramp).save(tmp_path / f"{n}.png")
    crops = Crops([tmp_path], [], 128, 8, seed=0)
    drawn_crops = torch.stack([crops.draw(0, np.random.default_rng(n)) for n in range(60)])
    assert drawn_crops.shape == (60, 3, 40, 40)
    is_flipped = drawn_crops[..., 0].mean((1, 2)) > drawn_crops[..., -1].mean((1, 2))
    assert 15 < int(is_flipped.sum()) < 45


def test_crops_come_from_tars_and_tables_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With a caption, a hidden member, and rows without an image among them."""
    file = io.BytesIO()
    Image.new("RGB", (40, 40), (255, 0, 0)).save(file, "PNG")
    data = file.getvalue()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (("1.png", data), ("1.txt", b"A."), ("._1.png", b"Mac"), ("2.bin", data)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    pq.write_table(pa.table({"image": [data, None, None, data]}), tmp_path / "b.parquet")
    with caplog.at_level("INFO", "being_vl"):
        crops = Crops([tmp_path], [], 64, 8, seed=0)
    (line,) = caplog.messages
    assert line.startswith(f"{tmp_path}: images: 8 seen, 6 used, 2 left out (")
    for n in range(30):
        pixels = crops.draw(0, np.random.default_rng(n))
        assert pixels.shape == (3, 40, 40)
        assert pixels[0].mean() > 0.9
    (images,) = crops.held_out_images.values()
    assert len(list(crops.middle_squares([*images, *crops.training_images[0]]))) == 4


def test_held_out_folders_are_measured_and_all_others_trained_on(
    options: QuantizerTrainOptions, images: list[Path]
) -> None:
    trainer = Trainer(replace(options, images=images[:1], held_out_images=images[1:]))
    assert len(trainer.crops.training_images[0]) == 30
    trainer.train_step()
    assert set(measure(trainer.autoencoder, trainer.crops).psnr) == {str(images[1])}


def test_kill_9_and_the_same_command_give_the_same_losses(options: QuantizerTrainOptions) -> None:
    full_run = replace(options, out=options.out.with_name("whole"))
    train_quantizer(full_run)
    command = [sys.executable, "-c", "import sys; from being_vl.cli import main; sys.exit(main())"]
    process = subprocess.Popen(
        [*command, "quantizer", "train", *flags(options, options.out)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
    )
    log = options.out / "log.jsonl"
    while process.poll() is None and not (log.is_file() and len(log.read_text().splitlines()) >= 9):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    _, output = process.communicate()
    assert process.returncode == -signal.SIGKILL, output.decode()
    assert not (options.out / "manifest.json").exists()
    with log.open("a") as file:
        file.write('{"step": 9')  # as if killed while it wrote

    train_quantizer(options)
    assert log.read_bytes() == (full_run.out / "log.jsonl").read_bytes()
    assert load_quantizer(options.out).fingerprint == load_quantizer(full_run.out).fingerprint


def test_an_output_of_other_options_is_refused_and_replaced_on_demand(options: QuantizerTrainOptions) -> None:
    """Finished or not; what does not decide the weights may change, and foreign files stay."""
    short_run = replace(options, steps=2, checkpoint=CheckpointOptions(every=1))
    other_run = replace(short_run, seed=1)
    train_quantizer(short_run)
    (options.out / "notes.txt").write_text("mine")
    with pytest.raises(FingerprintError, match=r"quantizer: was made with other options.*seed was 0, is 1"):
        train_quantizer(other_run)
    (options.out / "manifest.json").unlink()
    with pytest.raises(FingerprintError, match="seed was 0, is 1"):
        train_quantizer(other_run)
    train_quantizer(
        replace(short_run, logging=LoggingOptions(every=2), checkpoint=CheckpointOptions(every=2))
    )
    first_fingerprint = load_quantizer(options.out).fingerprint
    train_quantizer(replace(other_run, overwrite=True))
    assert load_quantizer(options.out).fingerprint != first_fingerprint
    assert [entry["step"] for entry in read_entries(options.out)] == [1, 2]
    assert (options.out / "notes.txt").read_text() == "mine"


def test_other_images_are_other_inputs(options: QuantizerTrainOptions, tmp_path: Path) -> None:
    shutil.copytree(options.images[1], tmp_path / "images")
    short_run = replace(options, images=[tmp_path / "images"], steps=1)
    train_quantizer(short_run)
    (tmp_path / "images" / "3.png").unlink()
    with pytest.raises(FingerprintError, match=r"quantizer: was made with other.*files\."):
        train_quantizer(short_run)
    train_quantizer(replace(short_run, overwrite=True))


def test_what_another_job_made_is_never_replaced(options: QuantizerTrainOptions) -> None:
    """Neither a quantizer from elsewhere nor the output of another kind of job."""
    tiny.quantizer(options.out)
    contents = {path: path.read_bytes() for path in options.out.iterdir()}
    with pytest.raises(FingerprintError, match="holds a quantizer that no training here made"):
        train_quantizer(replace(options, overwrite=True))
    (options.out / "fingerprint.json").write_text('{"kind": "grids"}')
    with pytest.raises(OutputError, match=r"of another kind of job \(grids, quantizer\)"):
        train_quantizer(replace(options, overwrite=True))
    write_manifest(options.out, "grids", {})
    with pytest.raises(OutputError, match=r"of another kind of job \(grids\)"):
        train_quantizer(replace(options, overwrite=True))
    assert all(path.read_bytes() == content for path, content in contents.items() if path.name != MANIFEST)


def test_a_damaged_checkpoint_is_refused(options: QuantizerTrainOptions) -> None:
    train_quantizer(replace(options, steps=2))
    (options.out / "manifest.json").unlink()
    (options.out / "checkpoint.pt").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: cannot be read"):
        train_quantizer(replace(options, steps=2))


def test_paths_are_strings_or_path_likes(options: QuantizerTrainOptions, tmp_path: Path) -> None:
    class PathLike:
        def __fspath__(self) -> str:
            return str(tmp_path / "q")

    strings = replace(options, images=list(map(str, options.images)), out=str(options.out))
    assert (strings.images, strings.out) == (options.images, options.out)
    train_quantizer(replace(strings, out=PathLike(), steps=1))
    quantizer = load_quantizer(PathLike())
    quantizer.save_pretrained(str(tmp_path / "again"))
    assert load_quantizer(str(tmp_path / "again")).fingerprint == quantizer.fingerprint


def test_folders_are_checked(options: QuantizerTrainOptions, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such file or folder"):
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
        {"batch_size": 0},
        {"batch_size": 3},
        {"crop": 60},
        {"encoder_share": 1.5},
    ],
)
def test_options_are_checked(options: QuantizerTrainOptions, change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(change))}: expected"):
        replace(options, **change)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("network", "width", 48),
        ("network", "layers", -1),
        ("codebook", "dim", 11),
        ("codebook", "size", 0),
        ("codebook", "size", 2**20 + 1),
        ("codebook", "reserved_share", 1.0),
        ("adversarial", "start", -0.1),
        ("perceptual", "lpips", Path("heads.pth")),
        ("checkpoint", "every", 0),
        ("logging", "every", 0),
    ],
)
def test_nested_options_are_checked(
    options: QuantizerTrainOptions, name: str, field: str, value: object
) -> None:
    with pytest.raises(ConfigError, match=rf"{name}\.{field}: expected"):
        replace(options, **{name: replace(getattr(options, name), **{field: value})})


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
        decoded_tiles = cut_tiles(model, pixels).flatten(1)
    error = (decoded_tiles - tiles[:64]).square().mean() / (tiles[:64] - tiles.mean(0)).square().mean()
    assert error < 0.03


def test_tiles_and_pixels_are_inverse_of_each_other() -> None:
    model = new_model(16, code_dim=4, tile=8, width=32)
    rng = np.random.default_rng(0)
    pixels = to_tensor(rng.integers(0, 256, (2, 24, 16, 3), np.uint8))
    tiles = cut_tiles(model, pixels)
    assert tiles.shape == (2 * 3 * 2, 192, 1, 1)
    top_right = tiles[1].reshape(3, 8, 8)
    torch.testing.assert_close(top_right, pixels[0, :, :8, 8:])
    assert VQGAN(model, "x", 64).downsample == 8


def test_training_with_the_perceptual_loss(options: QuantizerTrainOptions, vgg: tuple[Path, Path]) -> None:
    perceptual = PerceptualOptions(vgg=vgg[0], lpips=vgg[1])
    options = replace(options, perceptual=perceptual, adversarial=NO_DISCRIMINATOR)
    trainer = Trainer(replace(options, batch_size=2))
    assert trainer.train_step()["perceptual"] > 0
