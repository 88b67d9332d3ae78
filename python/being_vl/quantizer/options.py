"""Options of `being-vl quantize` and `grids`; importable without torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from being_vl.options import MAY_CHANGE, Options, check_minimum, check_share


@dataclass
class QuantizeOptions(Options):
    """Turn images into a folder of grids.

    Args:
        images: A folder that is searched, with its subfolders, for images and for tar, Parquet and Arrow files; or one
            such file, a list of files (.txt), or records (.json, .jsonl); or a dataset of the Hugging Face hub as
            `hf://datasets/OWNER/NAME/FOLDER`.
        out: Folder that the grids are written to. An interrupted job goes on from its last complete shard.
        quantizer: `builtin`, a folder or file of weights, or a hub name such as `zawnpn/being-vq-8k`; `NAME@SIZE` makes
            images SIZE×SIZE pixels instead of the quantizer's own size, `NAME@SIZE:aspect` about as many pixels in
            each image's own proportions. `:bfloat16` at the end computes in that: faster on a GPU, and some other ids.
        batch_size: Images that are decoded and encoded at a time; no influence on the grids.
        shard_size: Images per Arrow file.
        max_failed: Share of images, 0 to 1, that may be unreadable before the job stops.
        device: Where the quantizer runs: `auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1`, …
        root: Folder that keys, and names in lists and records, are relative to; by default the folder of images, or
            that of the file.
        column: Column of tables that holds the images; needed where several could.
        allow_outside: Read files outside the root that lists, records or tables name.
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
    column: str | None = None
    allow_outside: bool = field(
        default=False, metadata=MAY_CHANGE
    )  # the shards tell which images are in them
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
