"""Recipes of short trainings on the chain of the tests, and what the trainings have left."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM

from being_vl.training.log import read_log
from helpers import tiny

BATCH = 8
"""Rows of an optimizer step, on any number of ranks."""

MIXTURES = [
    {"foundation": 80, "perception": 20},
    {"foundation": 40, "perception": 30, "reasoning": 20, "instruction": 10},
    {"foundation": 15, "perception": 15, "reasoning": 30, "instruction": 40},
]


def write_recipe(path: Path, options: Mapping[str, Any], changes: Mapping[str, Any]) -> Path:
    """Write options and what changes in them; of nested options, only those that `changes` names change."""
    options_of_recipe = {
        name: value | changes.get(name, {}) if isinstance(value, dict) else changes.get(name, value)
        for name, value in options.items()
    }
    path.write_text(yaml.safe_dump({**changes, **options_of_recipe}))
    return path


def recipe(
    chain: Path,
    out: Path,
    ranks: int = 1,
    tied: bool = True,
    steps: tuple[int, ...] = (4, 4, 4),
    **changes: object,
) -> Path:
    """A recipe of three short stages whose global batch is the same on any number of ranks."""
    stages = [
        {
            "name": f"stage{index + 1}",
            "unfreeze": unfreeze,
            "learning_rate": 3e-3,
            "max_steps": steps[index],
            "accumulation": BATCH // 2 // ranks,
            "mixture": MIXTURES[index],
        }
        for index, unfreeze in enumerate([0.0, 0.25, "all"])
    ]
    options = {
        **tiny.training_inputs(chain),
        "model": str(chain / ("tied" if tied else "untied")),
        "out": str(out),
        "batches": {"micro_batch_size": 2},
        "optimizer": {"weight_decay": 0.1},
        "stages": stages,
    }
    return write_recipe(out.with_suffix(".yaml"), options, changes)


def logged_steps(out: Path) -> list[dict[str, Any]]:
    """The log's entries of optimizer steps."""
    return [entry for entry in read_log(out / "log.jsonl") if "loss" in entry]


def losses(out: Path) -> list[float]:
    """The loss of each optimizer step."""
    return [entry["loss"] for entry in logged_steps(out)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The parameters of a model."""
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()
