"""Options of staged training; importable without torch."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from being_vl.data.options import RecordFile, SequenceOptions, check_record_files
from being_vl.errors import ConfigError
from being_vl.options import MAY_CHANGE, Options, check_minimum, check_share

OWN_FOLDERS = ("prepared", "checkpoints", "tensorboard", "wandb")
"""What a training's folder holds besides one folder per stage."""


@dataclass
class LoraOptions(Options):
    """Low-rank adapters, merged into the weights at the end of the stage.

    Args:
        rank: Of the two matrices whose product is added to a weight.
        alpha: The product is scaled by alpha / rank.
        dropout: Probability with which an input of the adapters is dropped.
        targets: Parts of the names of the linear layers that get one; all by default.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["*"])

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise ConfigError(
                f"lora: rank {self.rank}, alpha {self.alpha}, dropout {self.dropout}; expected at least 1, more than "
                "0, and a share in [0, 1)"
            )


@dataclass
class StageOptions(Options):
    """One stage of training.

    Args:
        name: Name of the stage, its output folder and its log entries: letters, digits, - and _.
        unfreeze: What trains besides the new visual rows: `0` nothing; a share such as `0.25` the first quarter of the
            decoder layers (rounded up), a whole number as many of the first ones; a list of parts of names, such as
            `[layers.0, layers.31.mlp, "layers.*.self_attn"]`, those parameters; `all` every parameter.
        text_rows: Whether the text rows of embedding and output head train; by default only with `unfreeze: all`.
        lora: Train adapters on the linear layers that `unfreeze` is about instead of these layers; the new rows train
            fully all the same.
        learning_rate: Peak learning rate of AdamW.
        new_rows_learning_rate: That of the new visual rows, if it is another.
        schedule: How the learning rate falls after the warm-up: as a cosine, linearly, or not at all.
        final: Share of the peak learning rate that a cosine or linear schedule ends at.
        mixture: Share of each key among the records that the model sees, on any positive scale. A key is a category, a
            source in it (`foundation/llava` for the records of a file `llava.json`), or `text_only`, all records
            without an image. Without a mixture, each category has a share as large as it is.
        mixture_end: Mixture at the end of the stage, if it changes; in between it changes linearly.
        mixture_by: Whether the shares are of `records` or of `tokens`.
        epochs: Passes over as many records, or tokens, as the keys of the mixture have.
        accumulation: Micro-batches per rank and optimizer step.
        batch_size: Rows per optimizer step over all ranks, in place of `micro_batch_size` × ranks × `accumulation`.
        warmup: Share of the steps in which the learning rate rises linearly.
        max_steps: Optimizer steps instead of `epochs`.
    """

    name: str
    unfreeze: int | float | Literal["all"] | list[str]
    learning_rate: float
    mixture: dict[str, float] = field(default_factory=dict)
    mixture_end: dict[str, float] | None = None
    mixture_by: Literal["records", "tokens"] = "records"
    text_rows: bool | None = None
    lora: LoraOptions | None = None
    new_rows_learning_rate: float | None = None
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final: float = 0.0
    epochs: float = 1.0
    accumulation: int = 1
    batch_size: int | None = None
    warmup: float = 0.03
    max_steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"\w[\w-]*", self.name) or self.name in OWN_FOLDERS:
            raise ConfigError(
                f"stage {self.name!r}: names its folder; expected letters, digits, - and _, and none of "
                + ", ".join(OWN_FOLDERS)
            )
        if (isinstance(self.unfreeze, float) and not 0 <= self.unfreeze <= 1) or (
            isinstance(self.unfreeze, int) and self.unfreeze < 0
        ):
            raise ConfigError(
                f"stage {self.name!r}: unfreeze is {self.unfreeze}; expected a share of 0.0 to 1.0, a number of "
                "layers, names, or all"
            )
        for name in ("accumulation", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"stage {self.name!r}: {name} is {value}; expected at least 1")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"stage {self.name!r}: warmup is {self.warmup}; expected a share in [0, 1)")
        if not 0 <= self.final <= 1:
            raise ConfigError(f"stage {self.name!r}: final is {self.final}; expected a share in [0, 1]")
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
class BatchOptions(Options):
    """How sequences become batches.

    Args:
        micro_batch_size: Rows per rank and forward pass: sequences, or packed rows.
        packing: Tokens of a row into which whole sequences are packed, without seeing each other; without it each
            sequence is a row of its own, padded.
        bpe_dropout: Probability with which a merge is skipped each time a record is read (BPE-dropout), so that an
            image comes as other tokens; a function of the seed and the record's place in the training.
    """

    section = "batches."

    # A resumed training has as many rows per step as before, however they are cut up.
    micro_batch_size: int = field(default=4, metadata=MAY_CHANGE)
    packing: int | None = None
    bpe_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_minimum("batches.micro_batch_size", self.micro_batch_size, 1)
        check_minimum("batches.packing", self.packing, 1)
        check_share("batches.bpe_dropout", self.bpe_dropout)


@dataclass
class OptimizerOptions(Options):
    """AdamW; its learning rates belong to the stages.

    Args:
        weight_decay: Decoupled weight decay.
        weight_decay_on: What it acts on: `all` that trains, or the weight `matrices` alone, without norms, biases,
            embedding and output head.
        betas: Decay rates of the two moments.
        gradient_clipping: Largest norm of the gradient of all parameters together.
    """

    weight_decay: float = 0.01
    weight_decay_on: Literal["all", "matrices"] = "all"
    betas: tuple[float, float] = (0.9, 0.999)
    gradient_clipping: float = 1.0


@dataclass
class PrecisionOptions(Options):
    """What a training computes in, and by which kernels.

    Args:
        dtype: `auto` is bf16 on a GPU and fp32 on a CPU.
        attention: Kernel of the attention; `auto` is FlashAttention 2 on a GPU in bf16 where flash-attn is installed,
            and PyTorch's SDPA elsewhere.
        liger: Use Liger's kernels for the layers, on a GPU; needs the extra `liger`.
    """

    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    attention: Literal["auto", "sdpa", "flash_attention_2", "eager"] = "auto"
    liger: bool = False


@dataclass
class CheckpointOptions(Options):
    """Checkpoints to resume from.

    Args:
        every: Optimizer steps between them.
        keep: Number of them that are kept.
    """

    section = "checkpoint."

    every: int = field(default=500, metadata=MAY_CHANGE)
    keep: int = field(default=2, metadata=MAY_CHANGE)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_minimum("checkpoint.every", self.every, 1)
        check_minimum("checkpoint.keep", self.keep, 1)


@dataclass
class SpikeOptions(Options):
    """Steps whose loss or gradient norm leaps up.

    Args:
        action: What is done about such a step: `warn`, `skip` it, or `stop` before it. The log names its records in
            any case. A step with a NaN or infinity is never taken.
        deviations: How many robust standard deviations above the median of the last 100 steps a leap is.
    """

    action: Literal["warn", "skip", "stop"] = field(default="warn", metadata=MAY_CHANGE)
    deviations: float = field(default=10.0, metadata=MAY_CHANGE)


@dataclass
class RetentionOptions(Options):
    """How much of its language a model keeps.

    Args:
        text: A file of text (UTF-8). The model's perplexity on it is measured before and after each stage.
        tolerance: Share by which a stage may raise that perplexity without a warning.
    """

    text: Path | None = field(default=None, metadata=MAY_CHANGE)
    tolerance: float = field(default=0.1, metadata=MAY_CHANGE)


@dataclass
class LoggingOptions(Options):
    """What is logged, and where to, besides `log.jsonl` and TensorBoard.

    Args:
        wandb: Project of Weights & Biases to log to as well; needs the extra `wandb`.
        peak_flops: Floating-point operations per second of a rank's device at best, for the log's MFU; known for
            common GPUs by their name.
    """

    wandb: str | None = field(default=None, metadata=MAY_CHANGE)
    peak_flops: float | None = field(default=None, metadata=MAY_CHANGE)


@dataclass
class TrainOptions(Options):
    """Options of `being-vl train`.

    Args:
        model: Folder of a model that `being-vl expand` made, or of any causal LM for training on text alone.
        records: Files of records as for `being-vl prepare`, with their categories, which are prepared in `out` first;
            or a folder that it wrote, as its own options have made it.
        out: Folder for one plain Hugging Face model per stage, logs, and checkpoints to resume from.
        grids: Folders that `being-vl quantize` wrote, all by one quantizer; needed when a record names an image.
        sequences: How records become sequences.
        lenient: Leave out and list records with faults, rather than stop.
        shard_size: Records per Arrow file.
        workers: Processes per rank that prepare records, and later read ahead; 0 for none but the rank itself.
        stages: The stages in order; the paper's three by default.
        order: Order of the mixtures, as in the paper's ablation: `progressive` as the stages name them, `reverse` the
            last stage's first, `random` all categories by their size in every stage.
        max_steps: Most optimizer steps of each stage, for a trial.
        batches: How sequences become batches.
        optimizer: AdamW's options.
        precision: What a training computes in, and by which kernels.
        zero: ZeRO stage of DeepSpeed.
        offload: `optimizer` keeps AdamW's state and the float32 weights in the CPU's memory and steps there; needs ZeRO
            1, 2 or 3.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        loss_chunk: Label tokens whose logits exist at once; more take memory, fewer a little time.
        checkpoint: Checkpoints to resume from.
        spikes: Steps whose loss or gradient norm leaps up.
        retention: How much of its language a model keeps.
        logging: What is logged, and where to.
        seed: Seed of the order of the records.
        overwrite: Replace what a training with other options made in `out`.
    """

    # Of the inputs their content counts, not where they lie.
    model: Path = field(metadata=MAY_CHANGE)
    records: list[RecordFile] = field(metadata=MAY_CHANGE)
    out: Path = field(metadata=MAY_CHANGE)
    grids: list[Path] = field(default_factory=list, metadata=MAY_CHANGE)
    sequences: SequenceOptions = field(default_factory=SequenceOptions)
    lenient: bool = False
    shard_size: int = field(default=10_000, metadata=MAY_CHANGE)
    workers: int = field(default=0, metadata=MAY_CHANGE)
    stages: list[StageOptions] = field(default_factory=paper_stages)
    order: Literal["progressive", "reverse", "random"] = "progressive"
    max_steps: int | None = None
    batches: BatchOptions = field(default_factory=BatchOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    precision: PrecisionOptions = field(default_factory=PrecisionOptions)
    zero: Literal[0, 1, 2, 3] = field(default=0, metadata=MAY_CHANGE)
    offload: Literal["none", "optimizer"] = field(default="none", metadata=MAY_CHANGE)
    gradient_checkpointing: bool = field(default=False, metadata=MAY_CHANGE)
    loss_chunk: int = 1024
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    spikes: SpikeOptions = field(default_factory=SpikeOptions)
    retention: RetentionOptions = field(default_factory=RetentionOptions)
    logging: LoggingOptions = field(default_factory=LoggingOptions)
    seed: int = 0
    overwrite: bool = field(default=False, metadata=MAY_CHANGE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.stages:
            raise ConfigError("stages: expected at least one")
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ConfigError(f"stages must have different names, got {names}")
        check_minimum("shard_size", self.shard_size, 1)
        check_minimum("workers", self.workers, 0)
        check_minimum("loss_chunk", self.loss_chunk, 1)
        check_record_files(self.records, self.sequences.categories)
        check_minimum("max_steps", self.max_steps, 1)
        if self.offload != "none" and self.zero == 0:
            raise ConfigError("offload needs ZeRO 1, 2 or 3: set zero, or offload to none")

    def stages_in_order(self) -> list[StageOptions]:
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
        tolerance: Share of records with faults, those without labels or images among them, above which the check
            fails.
    """

    ranks: int = 1
    show: int = 2
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ranks < 1 or self.show < 0 or not 0 <= self.tolerance <= 1:
            raise ConfigError(
                f"ranks {self.ranks}, show {self.show}, tolerance {self.tolerance}; expected at least 1, at "
                "least 0, and a share in [0, 1]"
            )
