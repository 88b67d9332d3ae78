"""Options of staged training; importable without torch."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from being_vl.errors import ConfigError


@dataclass
class StageOptions:
    """One stage of training.

    Args:
        name: Name of the stage, its output folder and its log entries.
        unfreeze: What trains besides the new visual rows: `0` nothing, a share such as `0.25` the first quarter
            of the decoder layers (rounded up), `all` every parameter.
        learning_rate: Peak learning rate of AdamW.
        mixture: Share of each key among the records that the model sees, on any positive scale. A key is a category, a
            source in it (`foundation/llava` for the records of a file `llava.json`), or `text_only`, all records
            without an image. Without a mixture, each category has a share as large as it is.
        mixture_end: Mixture at the end of the stage, if it changes; in between it changes linearly.
        mixture_by: Whether the shares are of `records` or of `tokens`.
        epochs: As many records, or tokens, as the keys of the mixture have, so many times.
        accumulation: Micro-batches per rank and optimizer step.
        batch_size: Rows per optimizer step over all ranks, in place of `micro_batch_size` × ranks × `accumulation`.
        warmup: Share of the steps in which the learning rate rises linearly; it then falls as a cosine to 0.
        max_steps: Optimizer steps instead of `epochs`.
    """

    name: str
    unfreeze: float | Literal["all"]
    learning_rate: float
    mixture: dict[str, float] = field(default_factory=dict)
    mixture_end: dict[str, float] | None = None
    mixture_by: Literal["records", "tokens"] = "records"
    epochs: float = 1.0
    accumulation: int = 1
    batch_size: int | None = None
    warmup: float = 0.03
    max_steps: int | None = None

    def __post_init__(self) -> None:
        if self.unfreeze != "all" and not 0 <= self.unfreeze <= 1:
            raise ConfigError(f"stage {self.name!r}: unfreeze is {self.unfreeze}; expected 0 to 1, or all")
        for name in ("accumulation", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"stage {self.name!r}: {name} is {value}; expected at least 1")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"stage {self.name!r}: warmup is {self.warmup}; expected a share in [0, 1)")
        if self.epochs <= 0 or (self.max_steps is not None and self.max_steps < 1):
            raise ConfigError(f"stage {self.name!r}: epochs and max_steps must be positive")


def paper_stages() -> list[StageOptions]:
    """The three stages of Being-VL-0.5 (arXiv 2506.23639, section 4 and its table of hyperparameters)."""

    def mixture(foundation: int, perception: int, reasoning: int, instruction: int) -> dict[str, float]:
        return {
            "foundation": foundation,
            "perception": perception,
            "reasoning": reasoning,
            "instruction": instruction,
        }

    return [
        StageOptions("stage1", 0.0, 1e-3, mixture(80, 20, 0, 0), epochs=2, accumulation=2),
        StageOptions("stage2", 0.25, 3e-5, mixture(40, 30, 20, 10), epochs=3, accumulation=4),
        StageOptions("stage3", "all", 5e-5, mixture(15, 15, 30, 40), epochs=3, accumulation=4),
    ]


@dataclass
class TrainOptions:
    """Options of `being-vl train`.

    Args:
        model: Folder of a model that `being-vl expand` made, or of any causal LM for training on text alone.
        records: Files of records: LLaVA JSON, JSON lines, WebDataset, Parquet, Arrow.
        out: Folder for one plain Hugging Face checkpoint per stage, logs, and checkpoints to resume from.
        grids: Folder that `being-vl quantize` wrote; needed when a record names an image.
        stages: The stages in order; the paper's three by default.
        order: Order of the mixtures, as in the paper's ablation: `progressive` as the stages name them, `reverse` the
            last stage's first, `random` all categories by their size in every stage.
        zero: ZeRO stage of DeepSpeed.
        dtype: `auto` is bf16 on a GPU and fp32 on a CPU.
        micro_batch_size: Rows per rank and forward pass: records, or packed rows.
        packing: Tokens of a row into which whole records are packed, without seeing each other; without it each record
            is a row of its own, padded.
        workers: Processes per rank that read ahead; 0 reads between the steps.
        max_length: Longest sequence in tokens, at most the model's context; a longer record is an error unless
            `drop_too_long`.
        drop_too_long: Leave out and count records that are longer than `max_length`.
        lenient: Leave out and list bad records, rather than stop.
        default_category: Category of the records that name none.
        weight_decay: AdamW's decoupled weight decay, on every trained parameter.
        betas: AdamW's moment decay rates.
        gradient_clipping: Largest global gradient norm.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        seed: Seed of the order of the records.
        save_every: Optimizer steps between checkpoints to resume from.
        keep: Number of such checkpoints kept.
    """

    model: Path
    records: list[Path]
    out: Path
    grids: Path | None = None
    stages: list[StageOptions] = field(default_factory=paper_stages)
    order: Literal["progressive", "reverse", "random"] = "progressive"
    zero: Literal[0, 1, 2, 3] = 0
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    micro_batch_size: int = 4
    packing: int | None = None
    workers: int = 0
    max_length: int = 2048
    drop_too_long: bool = False
    lenient: bool = False
    default_category: str = "foundation"
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    gradient_clipping: float = 1.0
    gradient_checkpointing: bool = False
    seed: int = 0
    save_every: int = 500
    keep: int = 2

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ConfigError(f"stages must have different names, got {names}")
        for name in ("micro_batch_size", "save_every", "keep", "packing"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.workers < 0:
            raise ConfigError(f"workers is {self.workers}; expected at least 0")

    def in_order(self) -> list[StageOptions]:
        """The stages with their mixtures in the order asked for."""
        if self.order == "progressive":
            return self.stages
        if self.order == "random":
            return [replace(stage, mixture={}, mixture_end=None) for stage in self.stages]
        mixtures = [(stage.mixture, stage.mixture_end) for stage in reversed(self.stages)]
        return [
            replace(stage, mixture=start if end is None else end, mixture_end=None if end is None else start)
            for stage, (start, end) in zip(self.stages, mixtures, strict=True)
        ]


@dataclass
class CheckOptions(TrainOptions):
    """Options of `being-vl check`: those of the training, and

    Args:
        ranks: Number of processes that the training will have.
        show: Records of each category to show.
        tolerated: Share of bad records, those without labels or images among them, above which the check fails.
    """

    ranks: int = 1
    show: int = 2
    tolerated: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ranks < 1 or self.show < 0 or not 0 <= self.tolerated <= 1:
            raise ConfigError(
                f"ranks {self.ranks}, show {self.show}, tolerated {self.tolerated}; expected at least 1, at "
                "least 0, and a share in [0, 1]"
            )
