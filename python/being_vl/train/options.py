"""Options of staged training; importable without torch."""

from dataclasses import dataclass, field
from typing import Literal

from being_vl.data.options import PrepareOptions
from being_vl.errors import ConfigError


@dataclass
class StageOptions:
    """One stage of training.

    Args:
        name: Name of the stage, its output folder and its log entries.
        unfreeze: What trains besides the new visual rows: `0` nothing, a share such as `0.25` the first quarter
            of the decoder layers (rounded up), `all` every parameter.
        learning_rate: Peak learning rate of AdamW.
        epochs: Passes over the records of the categories in `mixture`, counted in records.
        accumulation: Micro-batches per rank and optimizer step.
        mixture: Share of each category among the records that the model sees; any positive scale.
        warmup: Share of the steps in which the learning rate rises linearly; it then falls as a cosine to 0.
        max_steps: Optimizer steps instead of `epochs`.
    """

    name: str
    unfreeze: float | Literal["all"]
    learning_rate: float
    mixture: dict[str, float]
    epochs: float = 1.0
    accumulation: int = 1
    warmup: float = 0.03
    max_steps: int | None = None

    def __post_init__(self) -> None:
        if self.unfreeze != "all" and not 0 <= self.unfreeze <= 1:
            raise ConfigError(f"stage {self.name!r}: unfreeze is {self.unfreeze}; expected 0 to 1, or all")
        if self.accumulation < 1:
            raise ConfigError(
                f"stage {self.name!r}: accumulation is {self.accumulation}; expected at least 1"
            )
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
class TrainOptions(PrepareOptions):
    """Options of `being-vl train`: those of `being-vl prepare`, and

    Args:
        records: Files of records as for `being-vl prepare`, which are prepared in `out` first; or a folder that it
            wrote, as its own options have made it.
        out: Folder for one plain Hugging Face checkpoint per stage, logs, and checkpoints to resume from.
        stages: The stages in order; the paper's three by default.
        zero: ZeRO stage of DeepSpeed.
        dtype: `auto` is bf16 on a GPU and fp32 on a CPU.
        micro_batch_size: Records per rank and forward pass.
        weight_decay: AdamW's decoupled weight decay, on every trained parameter.
        betas: AdamW's moment decay rates.
        gradient_clipping: Largest global gradient norm.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        seed: Seed of the order of the records.
        save_every: Optimizer steps between checkpoints to resume from.
        keep: Number of such checkpoints kept.
    """

    stages: list[StageOptions] = field(default_factory=paper_stages)
    zero: Literal[0, 1, 2, 3] = 0
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    micro_batch_size: int = 4
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    gradient_clipping: float = 1.0
    gradient_checkpointing: bool = False
    seed: int = 0
    save_every: int = 500
    keep: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ConfigError(f"stages must have different names, got {names}")
        for name in ("micro_batch_size", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1")


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
