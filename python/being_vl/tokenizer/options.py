"""Options of `being-vl vocab ...` and `being-vl encode`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from being_vl.errors import ConfigError
from being_vl.options import MAY_CHANGE, Options, check_minimum


@dataclass
class VocabularyOptions(Options):
    """Options of `being-vl vocab train`.

    Args:
        grids: Folders that `being-vl quantize` wrote, or .npy or .npz (key `grids`) files with an integer array
            (N, H, W); several are learned from together.
        out: The vocabulary file (JSON). Beside it come a report, `NAME.report.json`, and what the vocabulary follows
            from, `NAME.fingerprint.json`.
        num_merges: Merges to learn; fewer are learned when no candidate is left.
        merge_mode: `pair` merges a pair at every offset (the paper); `oriented` at one, and encodes losslessly.
        alpha: Weight of spatial consistency in P = F + alpha·S.
        sigma: Width of the Gaussian kernel of S, in cells.
        min_frequency: A pair that is adjacent less often is no candidate.
        codebook_size: Number of ids of the quantizer; needed for .npy and .npz, known for a folder of grids.
        held_out: Share of the grids, 0 to 1, that is not learned from but used to measure; drawn with `seed`.
        held_out_every: Hold out every n-th grid instead of a share.
        seed: Seed of the share that is held out.
        num_threads: Threads; all cores by default, fewer for few grids. The result does not depend on it.
        checkpoint_every: Merges after which what was learned so far is saved, as `NAME.partial.json`. The same command
            goes on from there, to the vocabulary of an uninterrupted training.
        overwrite: Replace a vocabulary that was made with other options or from other grids.
    """

    grids: list[Path] = field(metadata=MAY_CHANGE)
    out: Path = field(metadata=MAY_CHANGE)
    num_merges: int = 8192
    merge_mode: Literal["pair", "oriented"] = "pair"
    alpha: float = 0.3
    sigma: float = 1.0
    min_frequency: int = 2
    codebook_size: int | None = None
    held_out: float = 0.0
    held_out_every: int | None = None
    seed: int = 0
    num_threads: int | None = field(default=None, metadata=MAY_CHANGE)
    checkpoint_every: int = field(default=4096, metadata=MAY_CHANGE)
    overwrite: bool = field(default=False, metadata=MAY_CHANGE)

    def __post_init__(self) -> None:
        """Check the values that no other part checks."""
        super().__post_init__()
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"held_out: expected a share from 0 to below 1, found {self.held_out}")
        if self.held_out and self.held_out_every:
            raise ConfigError("give held_out or held_out_every, not both")
        minima = {"held_out_every": 2, "seed": 0, "checkpoint_every": 1, "codebook_size": 1, "num_threads": 1}
        for name, minimum in minima.items():
            check_minimum(name, getattr(self, name), minimum)


@dataclass
class EncodeOptions(Options):
    """Options of `being-vl encode`.

    Args:
        grids: Folder that `being-vl quantize` wrote.
        vocabulary: The vocabulary file.
        out: Folder that the tokens are written to. An interrupted job goes on from its last complete shard.
        num_threads: Threads; all cores by default. The result does not depend on it.
        engine: `local`, in this process or those of torchrun; `ray`, by actors on a Ray cluster (extra `ray`), of
            `num_threads` CPUs, one by default.
        overwrite: Replace tokens in `out` that are of another vocabulary or another folder of grids.
    """

    grids: Path
    vocabulary: Path = field(metadata=MAY_CHANGE)  # its content counts, not its name
    out: Path = field(metadata=MAY_CHANGE)
    num_threads: int | None = field(default=None, metadata=MAY_CHANGE)
    engine: Literal["local", "ray"] = field(default="local", metadata=MAY_CHANGE)
    overwrite: bool = field(default=False, metadata=MAY_CHANGE)

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        check_minimum("num_threads", self.num_threads, 1)


@dataclass
class VocabularyImportOptions(Options):
    """Options of `being-vl vocab import`.

    Args:
        vocabulary: The file that Being-VL-0.5 published: a pickled list of ((a, b), new_id).
        out: The vocabulary file (JSON).
        codebook_size: Number of ids of the quantizer; the first merge makes the token of this number.
        overwrite: Replace another vocabulary.
    """

    vocabulary: Path = field(metadata=MAY_CHANGE)
    out: Path = field(metadata=MAY_CHANGE)
    codebook_size: int = 8192
    overwrite: bool = field(default=False, metadata=MAY_CHANGE)

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        check_minimum("codebook_size", self.codebook_size, 1)


@dataclass
class VocabularyShowOptions(Options):
    """Options of `being-vl vocab show`.

    Args:
        vocabulary: The vocabulary file.
        merges: How many of the first and of the last merges are shown.
        token: The token that is drawn; by default the largest of at most 64 cells.
        grids: Where to look for the token, as for `vocab train`; it is drawn as it lies in the first grid that has
            it. Without them it can be drawn in oriented mode only, where its shape is fixed.
        format: `text`, or `json`.
    """

    vocabulary: Path
    merges: int = 5
    token: int | None = None
    grids: list[Path] = field(default_factory=list)
    format: Literal["text", "json"] = "text"

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        check_minimum("merges", self.merges, 0)


@dataclass
class MergeStatsOptions(Options):
    """Options of `being-vl vocab merge-stats`.

    Args:
        vocabulary: The vocabulary file.
        format: `table` and `json` have quantiles too, `csv` the merges alone.
    """

    vocabulary: Path
    format: Literal["table", "csv", "json"] = "table"


@dataclass
class VocabularyTruncateOptions(Options):
    """Options of `being-vl vocab truncate`.

    Args:
        vocabulary: The vocabulary file.
        merges: How many merges are kept, the first ones.
        out: The shorter vocabulary's file.
        overwrite: Replace another vocabulary.
    """

    vocabulary: Path = field(metadata=MAY_CHANGE)
    merges: int
    out: Path = field(metadata=MAY_CHANGE)
    overwrite: bool = field(default=False, metadata=MAY_CHANGE)
