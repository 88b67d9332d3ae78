"""Ranks on this machine: how many, and what they are started with."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from being_vl.launch import local
from being_vl.quantizer.options import QuantizeOptions
from being_vl.quantizer.training.options import QuantizerTrainOptions
from being_vl.recipes.recipe import Recipe, make_options
from being_vl.training.options import TrainOptions

Start = tuple[list[str], int, dict[str, str]]


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[Start]:
    """What would be started on a machine of three GPUs."""
    local_starts: list[Start] = []

    def start(words: list[str], ranks: int, environment: Mapping[str, str]) -> None:
        local_starts.append((words, ranks, dict(environment)))

    monkeypatch.setattr(local, "_run_ranks", start)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return local_starts


def test_every_gpu_has_a_rank(starts: list[Start], tmp_path: Path) -> None:
    options = QuantizeOptions("images", tmp_path / "grids")
    local.quantize_on_ranks(options)
    path = tmp_path / "grids.options.json"
    assert starts == [(["quantize", "--recipe", str(path)], 3, {})]
    assert make_options(QuantizeOptions, Recipe.find(path), {}) == options


def test_ranks_of_a_quantizer_share_its_batch_evenly(starts: list[Start], tmp_path: Path) -> None:
    options = QuantizerTrainOptions(["images"], tmp_path / "quantizer", batch_size=16)
    local.train_quantizer_on_ranks(options)
    path = tmp_path / "quantizer.options.json"
    assert starts == [(["quantizer", "train", "--recipe", str(path)], 2, {})]
    assert make_options(QuantizerTrainOptions, Recipe.find(path), {}) == options


@pytest.mark.parametrize(
    ("device", "ranks", "environment"),
    [
        ("auto", 3, {}),
        ("cpu", 1, {"CUDA_VISIBLE_DEVICES": ""}),
        ("cuda:2", 1, {"CUDA_VISIBLE_DEVICES": "2"}),
    ],
)
def test_a_training_sees_the_device_that_is_asked_for(
    device: str, ranks: int, environment: dict[str, str], starts: list[Start], tmp_path: Path
) -> None:
    options = TrainOptions("model", ["records.json"], tmp_path / "out")
    with pytest.raises(SystemExit):  # it has not finished
        local.train_on_ranks(options, device=device)
    path = tmp_path / "out" / "options.json"
    assert starts == [(["train", "--recipe", str(path)], ranks, environment)]
    assert make_options(TrainOptions, Recipe.find(path), {}) == options
