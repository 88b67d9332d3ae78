"""AdamW over groups of parameters, their learning rates, and what DeepSpeed is told."""

import math
from typing import Any

import torch

from being_vl.errors import ConfigError
from being_vl.training.options import OptimizerOptions, StageOptions
from being_vl.training.split import TwoPartLM


def make_optimizer(
    model: TwoPartLM, stage: StageOptions, options: OptimizerOptions, is_offloaded: bool = False
) -> torch.optim.Optimizer:
    """AdamW over what trains, in groups named `new_rows` and `rest`, each with its `peak` learning rate.

    Where `weight_decay_on` spares some parameters, a name comes twice, with weight decay and without.

    Args:
        model: With `requires_grad` set.
        stage: Its learning rates.
        options: AdamW's.
        is_offloaded: Whether it steps in the host's memory, where there is a GPU.

    Raises:
        ConfigError: if DeepSpeed cannot build the AdamW that steps in the host's memory.
    """
    new_rows = {id(parameter) for parameter in model.visual_parameters()}
    text_rows = {id(model.embedding.text_rows), id(model.head.text_rows)}
    # Parameters of one name and weight decay make a group.
    groups: dict[tuple[str, float], list[torch.nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_matrix = parameter.dim() > 1 and id(parameter) not in new_rows | text_rows
            weight_decay = options.weight_decay if is_matrix or options.weight_decay_on == "all" else 0.0
            name = "new_rows" if id(parameter) in new_rows else "rest"
            groups.setdefault((name, weight_decay), []).append(parameter)
    peaks = {"rest": stage.learning_rate, "new_rows": stage.new_rows_learning_rate or stage.learning_rate}
    settings = [
        {"params": parameters, "name": name, "weight_decay": decay, "peak": peaks[name], "lr": peaks[name]}
        for (name, decay), parameters in groups.items()
    ]
    if is_offloaded and torch.cuda.is_available():
        from deepspeed.ops.adam import DeepSpeedCPUAdam  # compiled when first used

        try:
            return DeepSpeedCPUAdam(settings, betas=options.betas, adamw_mode=True)  # type: ignore[no-any-return]
        except Exception as error:  # whatever the compiler says
            raise ConfigError(
                f"offload: DeepSpeed cannot build its CPU Adam, which needs a C++ compiler and ninja: {error}"
            ) from error
    # Unless it is fused, it needs as much memory again as what it steps on.
    return torch.optim.AdamW(settings, betas=options.betas, fused=torch.cuda.is_available())


def learning_rate_factor(stage: StageOptions, step: int, steps: int) -> float:
    """Factor of the learning rates at a step counted from 0: linear to 1 in the warm-up, then as the schedule says."""
    warmup_steps = math.ceil(steps * stage.warmup)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    shapes = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}
    return stage.final + (1 - stage.final) * shapes[stage.schedule]


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
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


def make_deepspeed_config(
    zero: int,
    offload: str,
    dtype: torch.dtype,
    micro_batch_size: int,
    accumulation: int,
    gradient_clipping: float,
) -> dict[str, Any]:
    """The configuration of DeepSpeed for a stage.

    Args:
        zero: ZeRO stage.
        offload: `optimizer` or `none`.
        dtype: What the stage computes in, bf16 or float32.
        micro_batch_size: Rows per rank and forward pass.
        accumulation: Micro-batches per rank and step.
        gradient_clipping: Largest norm of the gradient of all parameters together.
    """
    zero_options: dict[str, Any] = {"stage": zero}
    if offload == "optimizer":
        zero_options["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": gradient_clipping,
        "bf16": {"enabled": dtype is torch.bfloat16},
        "zero_optimization": zero_options,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
