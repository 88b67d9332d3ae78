"""Options of `being-vl quantizer train`; importable without torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from being_vl.errors import ConfigError
from being_vl.options import MAY_CHANGE, Options, check_minimum, check_share

MAX_CODEBOOK_SIZE = 1 << 20
"""As for visual BPE."""


@dataclass
class NetworkOptions(Options):
    """Size of encoder and decoder.

    Args:
        tile: Side of the tile that one id stands for, in pixels.
        width: Channels inside encoder and decoder, a multiple of 32.
        layers: Residual blocks of encoder and of decoder beyond three.
    """

    section = "network."

    tile: int = 8
    width: int = 96
    layers: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        check_minimum("network.tile", self.tile, 1)
        check_minimum("network.layers", self.layers, 0)
        if self.width < 32 or self.width % 32:
            raise ConfigError(f"network.width: expected a positive multiple of 32, found {self.width}")


@dataclass
class CodebookOptions(Options):
    """The codes, and how they move.

    Args:
        size: Number of ids.
        dim: Length of a code, at most a third of the networks' width.
        update: Codes are moving averages of their latents (`ema`), or learn by gradients.
        reserved_share: Share of the codes that are placed on the first folder's images alone; the others start away
            from them. It keeps those images at few and steady ids.
        commitment: Weight of the loss that pulls latents to their codes.
        ema_decay: Decay of the moving averages of codes and of their use.
        dead_threshold: A code that is used less than this often per batch, on average, is placed again.
    """

    section = "codebook."

    size: int = 1024
    dim: int = 16
    update: Literal["ema", "gradient"] = "ema"
    reserved_share: float = 0.0
    commitment: float = 0.25
    ema_decay: float = 0.99
    dead_threshold: float = 0.03

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        check_minimum("codebook.size", self.size, 1)
        check_minimum("codebook.dim", self.dim, 1)
        if self.size > MAX_CODEBOOK_SIZE:
            raise ConfigError(
                f"codebook.size: expected at most {MAX_CODEBOOK_SIZE}, as visual BPE does, found {self.size}"
            )
        if not 0 <= self.reserved_share < 1:
            raise ConfigError(
                f"codebook.reserved_share: expected a share, 0 to less than 1, found {self.reserved_share}"
            )


@dataclass
class PerceptualOptions(Options):
    """The perceptual loss: LPIPS with `vgg`; else the differences between neighbouring pixels at two scales.

    Args:
        weight: Its weight in the reconstruction loss.
        vgg: File with torchvision's weights of VGG16, `.pth` or `.safetensors`.
        lpips: File with LPIPS's weights for VGG16's features, which otherwise weigh the same.
    """

    weight: float = 1.0
    vgg: Path | None = None
    lpips: Path | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        if self.lpips is not None and self.vgg is None:
            raise ConfigError(
                "perceptual.lpips: expected `perceptual.vgg` as well, whose features these are the weights of"
            )


@dataclass
class AdversarialOptions(Options):
    """The discriminator.

    Args:
        weight: Weight of its loss for the decoder, relative to the reconstruction loss; 0 for no discriminator.
        start: Share of the steps after which it joins.
    """

    section = "adversarial."

    weight: float = 0.1
    start: float = 0.6


@dataclass
class CheckpointOptions(Options):
    """When the training's state is saved.

    Args:
        every: Steps per checkpoint and held-out measurement.
    """

    section = "checkpoint."

    every: int = field(default=500, metadata=MAY_CHANGE)

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        check_minimum("checkpoint.every", self.every, 1)


@dataclass
class LoggingOptions(Options):
    """What is logged.

    Args:
        every: Steps per line of the log.
    """

    section = "logging."

    every: int = field(default=50, metadata=MAY_CHANGE)

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        check_minimum("logging.every", self.every, 1)


@dataclass
class QuantizerTrainOptions(Options):
    """Train a quantizer on folders of images.

    Args:
        images: Folders of images, searched with their subfolders; they take turns, and one may be listed several times.
        out: Folder for the quantizer, its log and its checkpoint. The same command goes on from the last checkpoint.
        held_out_images: Folders to measure the quantizer on; if there are none, a part of each of `images` is kept for
            that.
        name: The quantizer's name, kept in its manifest and in all grids made with it.
        size: Side of the images that the quantizer will encode, in pixels.
        crop: Side of the training crops, in pixels; `size` if it is not given. Smaller images are not enlarged.
        network: Size of encoder and decoder.
        codebook: The codes, and how they move.
        perceptual: The perceptual loss.
        adversarial: The discriminator.
        steps: Optimizer steps.
        batch_size: Crops per step, a multiple of the number of folders; under torchrun of all processes together.
        learning_rate: Peak of the cosine schedule, for both networks.
        encoder_share: Share of the steps in which encoder and codebook learn; then they stand still and the decoder
            alone learns. The longer they move, the better are the reconstructions, and the more ids does one thing
            get, since they come to tell its shades apart.
        seed: Seed of weights, crops and codes.
        precision: Precision of the networks while they are trained: `float32` or `bfloat16` (by autocast).
        compile: Compile the networks, by torch.compile.
        checkpoint: When the training's state is saved.
        logging: What is logged.
        device: Where to train: `auto` is a GPU where there is one; `cpu`, `cuda`, `cuda:1`, …
        workers: Processes that read and cut images ahead of the networks.
        overwrite: Replace what a training with other options or images left in `out`.
    """

    images: list[Path]
    out: Path = field(metadata=MAY_CHANGE)
    held_out_images: list[Path] = field(default_factory=list)
    name: str = "custom"
    size: int = 64
    crop: int | None = None
    network: NetworkOptions = field(default_factory=NetworkOptions)
    codebook: CodebookOptions = field(default_factory=CodebookOptions)
    perceptual: PerceptualOptions = field(default_factory=PerceptualOptions)
    adversarial: AdversarialOptions = field(default_factory=AdversarialOptions)
    steps: int = 4000
    batch_size: int = 16
    learning_rate: float = 1e-3
    encoder_share: float = 0.5
    seed: int = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    logging: LoggingOptions = field(default_factory=LoggingOptions)
    device: str = field(default="auto", metadata=MAY_CHANGE)
    workers: int = field(default=0, metadata=MAY_CHANGE)
    overwrite: bool = field(default=False, metadata=MAY_CHANGE)

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        if not self.images:
            raise ConfigError("images: expected at least one folder of images, found none")
        check_minimum("steps", self.steps, 1)
        check_minimum("batch_size", self.batch_size, 1)
        check_minimum("workers", self.workers, 0)
        check_share("encoder_share", self.encoder_share)
        check_share("adversarial.start", self.adversarial.start)
        if self.codebook.reserved_share and len(set(self.images)) < 2:
            raise ConfigError("codebook.reserved_share: expected at least two folders of images, found one")
        if self.codebook.dim > self.network.width // 3:
            raise ConfigError(
                f"codebook.dim: expected at most a third of network.width, {self.network.width // 3}, found "
                f"{self.codebook.dim}"
            )
        if self.batch_size % len(self.images):
            raise ConfigError(
                f"batch_size: expected a multiple of the number of folders, {len(self.images)}, found "
                f"{self.batch_size}"
            )
        for name, side in (("size", self.size), ("crop", self.crop_size)):
            if side < 1 or side % self.network.tile:
                raise ConfigError(
                    f"{name}: expected a positive multiple of the tile's {self.network.tile} pixels, found {side}"
                )

    @property
    def crop_size(self) -> int:
        """Side of the training crops, in pixels."""
        return self.size if self.crop is None else self.crop
