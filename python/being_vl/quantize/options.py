"""Options of `being-vl quantize`, `quantizer train` and `grids`; importable without torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from being_vl.errors import ConfigError
from being_vl.options import MAY_CHANGE, Options, check_minimum, check_share

LARGEST_CODEBOOK = 1 << 20


@dataclass
class QuantizeOptions(Options):
    """Turn images into a folder of grids.

    Args:
        images: A folder that is searched, with its subfolders, for images or else for tar, Parquet and Arrow files; or
            one such file, a list of image files (.txt), or LLaVA JSON (.json).
        out: Folder that the grids are written to. An interrupted job goes on from its last complete shard.
        quantizer: `builtin`, a folder or file of weights, or a hub name such as `zawnpn/being-vq-8k`; `NAME@SIZE` makes
            images SIZE×SIZE pixels instead of the quantizer's own size, `NAME@SIZE:aspect` about as many pixels in
            each image's own proportions. `:bfloat16` at the end computes in that: faster on a GPU, and some other ids.
        batch_size: Images that are decoded and encoded at a time; no influence on the grids.
        shard_size: Images per Arrow file.
        max_failed: Share of images, 0 to 1, that may be unreadable before the job stops.
        device: Where the quantizer runs: `auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1`, …
        root: Folder that names in a list or in LLaVA JSON are relative to; the file's own by default.
        workers: Processes that read and decode images ahead of the quantizer; with 0 it waits for each batch.
        engine: `local`, in this process or those of torchrun; `ray`, by actors on a Ray cluster (extra `ray`).
        compile: Compile the encoder, by torch.compile: takes a while at the start, and is faster on a GPU.
        overwrite: Replace grids in `out` that are of another quantizer, other images or another `shard_size`.
    """

    images: Path
    out: Path = field(metadata=MAY_CHANGE)
    quantizer: str = field(default="builtin", metadata=MAY_CHANGE)  # its fingerprint counts, not its name
    batch_size: int = field(default=64, metadata=MAY_CHANGE)
    shard_size: int = 4096
    max_failed: float = field(default=0.01, metadata=MAY_CHANGE)
    device: str = field(default="auto", metadata=MAY_CHANGE)
    root: Path | None = None
    workers: int = field(default=2, metadata=MAY_CHANGE)
    engine: Literal["local", "ray"] = field(default="local", metadata=MAY_CHANGE)
    compile: bool = field(default=False, metadata=MAY_CHANGE)
    overwrite: bool = field(default=False, metadata=MAY_CHANGE)

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        check_minimum("batch_size", self.batch_size, 1)
        check_minimum("shard_size", self.shard_size, 1)
        check_minimum("workers", self.workers, 0)
        check_share("max_failed", self.max_failed)


@dataclass
class GridsInfoOptions(Options):
    """Options of `being-vl grids info`.

    Args:
        grids: Folder that `being-vl quantize` wrote.
        top: How many of the most frequent ids are shown.
        format: `text`, or `json`, which has the counts of all ids as well.
    """

    grids: Path
    top: int = 5
    format: Literal["text", "json"] = "text"

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        check_minimum("top", self.top, 0)


@dataclass
class GridsVerifyOptions(Options):
    """Options of `being-vl grids verify`.

    Args:
        grids: Folder that `being-vl quantize` wrote.
    """

    grids: Path


@dataclass
class GridsDecodeOptions(Options):
    """Options of `being-vl grids decode`.

    Args:
        grids: Folder that `being-vl quantize` wrote.
        out: The PNG.
        quantizer: The quantizer that made the grids, named as it was then.
        key: Which grids to decode.
        count: How many to take, evenly, where no key is given.
        side: Longer side of an image, in pixels; larger ones are reduced.
        device: Where the quantizer runs: `auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1`, …
    """

    grids: Path
    out: Path
    quantizer: str = "builtin"
    key: list[str] = field(default_factory=list)
    count: int = 16
    side: int = 256
    device: str = "auto"

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        check_minimum("count", self.count, 1)
        check_minimum("side", self.side, 1)


@dataclass
class QuantizerTrainOptions:
    """Train a small VQ-GAN whose encoder sees one tile (8×8 pixels by default) at a time.

    Args:
        images: Folders of images. Each gives the same share of every batch, so a folder named twice counts
            twice.
        held_out: Folders of images that are measured; without them 5 % of each of the others, never trained on.
        out: Folder for the quantizer, `log.jsonl` and the checkpoint. A run that was interrupted goes on from
            its last checkpoint.
        name: The quantizer's name, kept in its manifest and in all grids made with it.
        size: Side of the images that the quantizer will encode, in pixels.
        crop: Side of the training crops, in pixels; `size` if it is not given. Smaller images are not enlarged.
        codebook_size: Number of ids.
        reserved: Share of the codes that are placed on the first folder's images alone, away from which the others
            start: keeps those images at few and steady ids.
        codebook: Codes are moving averages of their latents (`ema`), or learn by gradients.
        code_dim: Length of a code.
        tile: Side of the tile that one id stands for, in pixels.
        width: Channels inside encoder and decoder, a multiple of 32.
        layers: Residual blocks of encoder and of decoder beyond three.
        steps: Optimiser steps.
        batch_size: Crops per step, a multiple of the number of folders; under torchrun of all processes together.
        learning_rate: Peak of the cosine schedule, for both networks.
        commitment: Weight of the loss that pulls latents to their codes.
        perceptual: Weight of the perceptual loss: LPIPS with `vgg`; else, in its place, the differences between
            neighbouring pixels at two scales.
        vgg: File with torchvision's weights of VGG16, `.pth` or `.safetensors`.
        lpips: File with LPIPS's weights for VGG16's features, which otherwise weigh the same.
        adversarial: Weight of the discriminator's opinion, relative to the reconstruction loss; 0 for none.
        adversarial_start: Share of the steps after which the discriminator joins.
        settle: Share of the steps after which encoder and codebook stand still and the decoder alone learns. The
            longer they move, the better are the reconstructions, and the more ids does one thing get, since
            they come to tell its shades apart.
        decay: Of the moving averages that are the codebook.
        dead: A code that is used less than this often per batch, on average, is placed anew.
        seed: Of weights, crops and codes.
        log_every: Steps per line of the log.
        checkpoint_every: Steps per checkpoint and held-out measurement.
        device: Where to train: `cpu` or `cuda`.
        precision: Of the networks while they are trained: `float32` or `bfloat16` (by autocast).
        compile: Compile the networks, by torch.compile.
        workers: Processes that read and cut images ahead of the networks.
    """

    images: list[Path]
    out: Path
    held_out: list[Path] = field(default_factory=list)
    name: str = "custom"
    size: int = 64
    crop: int | None = None
    codebook_size: int = 1024
    reserved: float = 0.0
    codebook: Literal["ema", "gradient"] = "ema"
    code_dim: int = 16
    tile: int = 8
    width: int = 96
    layers: int = 0
    steps: int = 4000
    batch_size: int = 16
    learning_rate: float = 1e-3
    commitment: float = 0.25
    perceptual: float = 1.0
    vgg: Path | None = None
    lpips: Path | None = None
    adversarial: float = 0.1
    adversarial_start: float = 0.6
    settle: float = 0.5
    decay: float = 0.99
    dead: float = 0.03
    seed: int = 0
    log_every: int = 50
    checkpoint_every: int = 500
    device: str = "cpu"
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    workers: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        if not self.images:
            raise ConfigError("images: expected at least one folder of images, got none")
        for name in ("codebook_size", "code_dim", "tile", "steps", "batch_size", "log_every"):
            _at_least(name, getattr(self, name), 1)
        _at_least("checkpoint_every", self.checkpoint_every, 1)
        _at_least("layers", self.layers, 0)
        _at_least("workers", self.workers, 0)
        if self.codebook_size > LARGEST_CODEBOOK:
            raise ConfigError(
                f"codebook_size: expected at most {LARGEST_CODEBOOK}, as visual BPE does, got {self.codebook_size}"
            )
        if not 0 <= self.reserved < 1:
            raise ConfigError(f"reserved: expected a share from 0 to less than 1, got {self.reserved}")
        if self.reserved and len(set(self.images)) < 2:
            raise ConfigError("reserved: expected at least two folders of images, got one")
        if self.lpips is not None and self.vgg is None:
            raise ConfigError("lpips: expected `vgg` as well, whose features these are the weights of")
        if self.width < 32 or self.width % 32:
            raise ConfigError(f"width: expected a positive multiple of 32, got {self.width}")
        if self.code_dim > self.width // 3:
            raise ConfigError(
                f"code_dim: expected at most width / 3 = {self.width // 3}, got {self.code_dim}"
            )
        if self.batch_size % len(self.images):
            raise ConfigError(
                f"batch_size: expected a multiple of the number of folders, {len(self.images)}, got {self.batch_size}"
            )
        for name, side in (("size", self.size), ("crop", self.crop or self.size)):
            if side < 1 or side % self.tile:
                raise ConfigError(
                    f"{name}: expected a positive multiple of the tile's {self.tile} pixels, got {side}"
                )


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name}: expected at least {least}, got {value}")
