"""A stage's result as a plain Hugging Face folder."""

from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from being_vl.errors import CheckpointError
from being_vl.files import MANIFEST, TEMPORARY, list_files_below, to_jsonable, write_aside, write_manifest
from being_vl.model.expand import copy_companions
from being_vl.model.weights import load_causal_lm
from being_vl.options import StrPath
from being_vl.training.options import StageOptions
from being_vl.training.ranks import log_once
from being_vl.training.split import TwoPartLM

PROBE_IDS = 32
"""Ids, spread over text and new rows, on which the model that is written is compared with the one in the engine."""


def export_stage(
    engine: Any, model: TwoPartLM, stage: StageOptions, steps: int, source: StrPath, out: StrPath
) -> None:
    """Write the model of a stage as a plain Hugging Face folder, and check it by loading it; all ranks call it.

    Trained parameters are copied into the model that the stage started from, read again from disk: what was frozen
    stays bit-identical and keeps its dtype, even if the stage computed in bf16.

    Args:
        engine: DeepSpeed's, in which the model is.
        model: The model.
        stage: Its options, for the manifest.
        steps: Optimizer steps that were taken, for the manifest.
        source: Folder of the model that the stage started from.
        out: The folder to write.

    Raises:
        CheckpointError: if the model that was loaded gives other logits than the one that was trained.
    """
    source, out = Path(source), Path(out)
    # The logits that the written model must give.
    engine.eval()
    rows = model.lm.config.vocab_size
    ids = torch.arange(PROBE_IDS).mul(max(1, rows // PROBE_IDS)).clamp(max=rows - 1)[None]
    with torch.no_grad():
        logits = engine(input_ids=ids.to(engine.device)).cpu()
    parameters = _gather_parameters(model)
    # Rank 0 puts what trained into the model as it was, and compares before the folder gets its name.
    if dist.get_rank() == 0:
        result = load_causal_lm(source, "auto")
        model.merge_into(result, parameters)
        with write_aside(out, "stage") as folder:
            result.save_pretrained(folder)
            del result
            copy_companions(source, folder)
            fields = {"stage": to_jsonable(stage), "steps": steps, "trained": sorted(parameters)}
            fields["files"] = sorted({MANIFEST, *list_files_below(folder)})
            write_manifest(folder, "stage", fields)
            check_logits(folder, ids, logits)
        log_once(f"{stage.name}: saved to {out}")
    dist.barrier()


def _gather_parameters(model: TwoPartLM) -> dict[str, torch.Tensor]:
    """What trains, by its names in `model.lm`, in the host's memory of rank 0; nothing on the other ranks."""
    import deepspeed

    parameters = {}
    for name, parameter in model.lm.named_parameters():
        if parameter.requires_grad:
            # Under ZeRO-3 each rank has a part of it.
            with deepspeed.zero.GatheredParameters([parameter]):
                if dist.get_rank() == 0:
                    parameters[name] = parameter.detach().cpu().clone()
    return parameters


def check_logits(folder: StrPath, ids: torch.Tensor, logits: torch.Tensor) -> None:
    """Check that the model in a folder gives these logits, up to rounding.

    Args:
        folder: Of a causal LM.
        ids: (1, T) int64.
        logits: (T, V), in the dtype that they are computed in.

    Raises:
        CheckpointError: if it does not.
    """
    folder = Path(folder)
    with torch.no_grad():
        lm = load_causal_lm(folder, "auto")
        is_exact = lm.dtype is logits.dtype is torch.float32
        logits_now = lm.to(logits.dtype).eval()(input_ids=ids).logits[0]
    distance = (torch.dist(logits_now.float(), logits.float()) / logits.float().norm()).item()
    if not distance < (1e-3 if is_exact else 0.1):
        raise CheckpointError(
            f"{folder.name.removesuffix(TEMPORARY).removeprefix('.')}: the saved model gives logits that are "
            f"{distance:.1%} away from those of the trained one; it is not kept. Please report this"
        )
