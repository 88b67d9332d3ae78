"""The model of a stage: from its folder to the device, with what the stage trains."""

from pathlib import Path
from typing import Any

import torch

from being_vl.layout import LAYOUT_FILE, VocabularyLayout
from being_vl.model.weights import load_causal_lm
from being_vl.options import StrPath
from being_vl.training.kernels import attention_kernel, set_activation_checkpointing, use_liger
from being_vl.training.options import PrecisionOptions, StageOptions
from being_vl.training.split import TwoPartLM
from being_vl.training.stages import add_adapters, freeze


def load_model(
    folder: StrPath,
    stage: StageOptions,
    precision: PrecisionOptions,
    loss_chunk: int,
    gradient_checkpointing: bool = False,
    seed: int = 0,
) -> tuple[TwoPartLM, str]:
    """Load the model that a stage starts from, with adapters and frozen parameters as the stage has them.

    Its weights are the files, mapped into memory, until `place_parameters` moves them.

    Args:
        folder: Of the model.
        stage: What trains.
        precision: By which kernels.
        loss_chunk: Label tokens whose logits exist at once.
        gradient_checkpointing: Whether activations are computed again in the backward pass.
        seed: Of the adapters.

    Returns:
        The model in training mode, and a table of what trains.
    """
    folder = Path(folder)
    lm = load_causal_lm(folder, "auto", attention_kernel(precision))
    if gradient_checkpointing:
        set_activation_checkpointing(lm, True)
    if precision.liger:
        use_liger(lm)
    return _prepare_stage(lm, folder, stage, loss_chunk, seed)


def load_model_without_weights(folder: StrPath, stage: StageOptions) -> tuple[TwoPartLM, str]:
    """`load_model` of a model whose parameters have shapes and hold nothing; its weights are not read."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        return _prepare_stage(lm, Path(folder), stage, loss_chunk=1)


def _prepare_stage(
    lm: Any, folder: Path, stage: StageOptions, loss_chunk: int, seed: int = 0
) -> tuple[TwoPartLM, str]:
    """Part text rows and new rows, add adapters, freeze what does not train."""
    # A plain model has text rows alone.
    is_expanded = (folder / LAYOUT_FILE).is_file()
    text_size = VocabularyLayout.load(folder).text_size if is_expanded else lm.config.vocab_size
    model = TwoPartLM(lm, text_size, loss_chunk)
    if stage.lora:
        torch.manual_seed(seed)
        add_adapters(model, stage)
    table = freeze(model, stage)
    model.train()
    return model, table


def place_parameters(model: TwoPartLM, dtype: torch.dtype, config: dict[str, Any]) -> None:
    """Bring the parameters to this rank's device, and under ZeRO-3 its part of each, in the dtype of the computation.

    One after the other, so that beside a GPU the host's memory never holds all of them.

    Args:
        model: Its parameters may be files that are mapped into memory.
        dtype: What the stage computes in.
        config: DeepSpeed's.
    """
    import deepspeed

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
    # DeepSpeed leaves the buffers of a partitioned model where they are.
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device, dtype, copy=True)
        if config["zero_optimization"]["stage"] == 3:
            deepspeed.zero.Init(torch.nn.ParameterList([parameter]), config_dict_or_path=config)
