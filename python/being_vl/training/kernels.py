"""What a stage computes in, and by which kernels."""

import logging
import os
import sys
from typing import Any

import torch

from being_vl.errors import ConfigError
from being_vl.extras import install_hint
from being_vl.training.options import PrecisionOptions

log = logging.getLogger(__name__)


def compute_dtype(options: PrecisionOptions) -> torch.dtype:
    """What weights and activations are computed in."""
    if options.dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return torch.bfloat16 if options.dtype == "bf16" else torch.float32


def attention_kernel(options: PrecisionOptions) -> str | None:
    """The attention's kernel, as transformers names it; None leaves the choice to transformers: SDPA where it can."""
    if options.attention != "auto":
        return options.attention
    from transformers.utils import is_flash_attn_2_available

    can_flash = compute_dtype(options) is torch.bfloat16 and is_flash_attn_2_available()
    return "flash_attention_2" if can_flash else None


def set_activation_checkpointing(lm: Any, is_on: bool) -> None:
    """Have a model's layers compute their activations again in the backward pass, or no longer."""
    # Transformers has called it one and then the other.
    prefix = "activation" if hasattr(lm, "activation_checkpointing_enable") else "gradient"
    if is_on:
        getattr(lm, f"{prefix}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(lm, f"{prefix}_checkpointing_disable")()


def use_liger(lm: Any) -> None:
    """Exchange the norms and MLPs of a model for Liger's kernels, or say why not; the loss is in chunks anyway.

    `TRITON_INTERPRET=1` runs them on a CPU, slowly, to see what they compute.

    Raises:
        ConfigError: if Liger is not installed.
    """
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        log.warning("liger: its kernels need a GPU, so PyTorch's are used")
        return
    try:
        from liger_kernel.transformers.monkey_patch import (
            MODEL_TYPE_TO_APPLY_LIGER_FN,
            _apply_liger_kernel_to_instance,
        )
    except ImportError as error:
        raise ConfigError(f"precision.liger: {install_hint('liger_kernel')}") from error
    if lm.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        log.warning("liger: has no kernels for %s, so PyTorch's are used", lm.config.model_type)
        return
    # It also exchanges the classes of all models to come, among them those that a saved stage is checked with; these
    # are put back.
    namespace = vars(sys.modules[type(lm).__module__])
    classes = dict(namespace)
    _apply_liger_kernel_to_instance(
        model=lm, rope=False, cross_entropy=False, fused_linear_cross_entropy=False
    )
    namespace.update(classes)
