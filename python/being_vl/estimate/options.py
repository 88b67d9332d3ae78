"""Options of `being-vl plan`; importable without torch."""

from dataclasses import dataclass, field
from pathlib import Path

from being_vl.errors import ConfigError
from being_vl.options import Options, check_minimum


@dataclass
class PlanOptions(Options):
    """Options of `being-vl plan`.

    Args:
        recipe: Recipe of a training or of a run: a file, or the name of a shipped one.
        gpus: The GPUs, such as `8x80GB`, or `4x8x80GB` for four nodes of eight.
        shape: Model to plan with, where the recipe's does not exist yet: a folder, a config.json, or the name of a
            shipped one, such as `Llama-3.1-8B`.
        new_rows: Rows that expanding it adds; by default what the recipe says.
        records: Number of records of each category, where the recipe's do not exist yet.
        mean_length: Their tokens, on average.
        label_share: Share of the tokens that carry loss.
        mfu: Share of the GPUs' peak that training reaches; the log of a training has it.
        tflops: Peak of one GPU in 10¹² floating-point operations per second, dense bf16; an A100 has 312, an H100 989.
        overrides: Flags of the training that override the recipe; behind `--` on the command line.
    """

    recipe: Path
    gpus: str = "8x80GB"
    shape: str | None = None
    new_rows: int | None = None
    records: dict[str, int] = field(default_factory=dict)
    mean_length: int = 512
    label_share: float = 0.25
    mfu: float = 0.4
    tflops: float = 312.0
    overrides: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("label_share", "mfu"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name}: expected a share above 0, at most 1, found {getattr(self, name)}")
        check_minimum("mean_length", self.mean_length, 1)
        for category, number in self.records.items():
            check_minimum(f"records.{category}", number, 0)
        if self.tflops <= 0:
            raise ConfigError(f"tflops: expected a positive number, found {self.tflops}")
