"""AdamW over groups of parameters, their learning rates, and what DeepSpeed is told."""

import math
from typing import Any

import torch

from being_vl.errors import ConfigError
from being_vl.train.kernels import compute_dtype
from being_vl.train.options import StageOptions, TrainOptions
from being_vl.train.split import TrainedLM


def make_optimizer(model: TrainedLM, options: TrainOptions, stage: StageOptions) -> torch.optim.Optimizer:
    """AdamW over what trains, in groups named `new_rows` and `rest`, each with its `peak` learning rate.

    Where `weight_decay_on` spares some parameters, a name comes twice, with decay and without.
    """
    adamw = options.optimizer
    new_rows = {id(parameter) for parameter in model.visual_parameters()}
    text_rows = {id(model.embedding.text), id(model.head.text)}
    groups: dict[tuple[str, float], list[torch.nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_matrix = parameter.dim() > 1 and id(parameter) not in new_rows | text_rows
            decay = adamw.weight_decay if is_matrix or adamw.weight_decay_on == "all" else 0.0
            name = "new_rows" if id(parameter) in new_rows else "rest"
            groups.setdefault((name, decay), []).append(parameter)
    peaks = {"rest": stage.learning_rate, "new_rows": stage.new_rows_learning_rate or stage.learning_rate}
    settings = [
        {"params": parameters, "name": name, "weight_decay": decay, "peak": peaks[name], "lr": peaks[name]}
        for (name, decay), parameters in groups.items()
    ]
    if options.offload == "optimizer" and torch.cuda.is_available():
        from deepspeed.ops.adam import DeepSpeedCPUAdam  # compiled when first used

        try:
            return DeepSpeedCPUAdam(settings, betas=adamw.betas, adamw_mode=True)  # type: ignore[no-any-return]
        except Exception as error:  # whatever the compiler says
            raise ConfigError(
                f"offload: DeepSpeed cannot build its CPU Adam, which needs a C++ compiler and ninja: {error}"
            ) from error
    # Else it would need as much memory again as what it steps on.
    return torch.optim.AdamW(settings, betas=adamw.betas, fused=torch.cuda.is_available())


def factor(stage: StageOptions, step: int, steps: int) -> float:
    """Factor of the learning rates at a step counted from 0: linear to 1 in the warm-up, then as the schedule says."""
    rising = math.ceil(steps * stage.warmup)
    if step < rising:
        return (step + 1) / rising
    past = (step - rising) / max(1, steps - rising)
    fallen = {"cosine": 0.5 * (1 + math.cos(math.pi * past)), "linear": 1 - past, "constant": 1.0}
    return stage.final + (1 - stage.final) * fallen[stage.schedule]


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Set every group's learning rate for the next step; returns them for the log.

    `learning_rate` is that of all but the new rows; where these train alone, it is theirs.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    new_rows = rates.get("new_rows")
    return {
        "learning_rate": rates.get("rest", new_rows),
        **({} if new_rows is None else {"new_rows_learning_rate": new_rows}),
    }


def deepspeed_config(options: TrainOptions, accumulation: int) -> dict[str, Any]:
    """The configuration of DeepSpeed for a stage with so many micro-batches per rank and step."""
    zero: dict[str, Any] = {"stage": options.zero}
    if options.offload == "optimizer":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": options.batches.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": options.optimizer.gradient_clipping,
        "bf16": {"enabled": compute_dtype(options.precision) is torch.bfloat16},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
