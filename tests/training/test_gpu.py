"""What only a GPU shows: `pytest -m gpu`. All other tests do not see it, so that they are the same everywhere."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from being_vl.cli import main
from being_vl.model.assistant import Assistant
from being_vl.quantizer.job import quantize
from being_vl.quantizer.options import QuantizeOptions
from being_vl.shards.grids import GridStore
from being_vl.training.log import read_log
from helpers.ranks import train_by_command
from helpers.training import losses, recipe

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def cpu_losses(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of a training that sees no GPU."""
    out = tmp_path_factory.mktemp("reference") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        train_by_command(recipe(chain, out))
    return losses(out)


@pytest.mark.parametrize(
    "changes", [{"zero": 0}, {"zero": 1}, {"zero": 3}, {"zero": 2, "offload": "optimizer"}]
)
def test_losses_are_those_of_a_cpu(
    changes: dict[str, object], chain: Path, cpu_losses: list[float], tmp_path: Path
) -> None:
    assert (
        main(
            [
                "train",
                "--recipe",
                str(recipe(chain, tmp_path / "run", precision={"dtype": "fp32"}, **changes)),
            ]
        )
        == 0
    )
    assert losses(tmp_path / "run") == pytest.approx(cpu_losses, rel=1e-4)


def test_bf16_is_close(chain: Path, cpu_losses: list[float], tmp_path: Path) -> None:
    assert main(["train", "--recipe", str(recipe(chain, tmp_path / "run", zero=2))]) == 0
    assert losses(tmp_path / "run") == pytest.approx(cpu_losses, rel=0.02)


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_stopped_and_resumed_run_has_the_same_losses(zero: int, chain: Path, tmp_path: Path) -> None:
    """Up to the order in which a GPU adds up."""
    changes = {"steps": (2, 30, 2), "zero": zero}
    assert main(["train", "--recipe", str(recipe(chain, tmp_path / "whole", **changes))]) == 0
    path, log = recipe(chain, tmp_path / "stopped", **changes), tmp_path / "stopped" / "log.jsonl"

    def stop() -> None:
        while not log.exists() or len(log.read_bytes().splitlines()) < 6:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    with pytest.raises(SystemExit):
        main(["train", "--recipe", str(path)])
    thread.join()
    assert 6 <= len(read_log(log)) < 30
    assert main(["train", "--recipe", str(path)]) == 0
    assert losses(tmp_path / "stopped") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


def test_ids_are_those_of_a_cpu(chain: Path, tmp_path: Path) -> None:
    """Except pixels between two codes."""
    grids = []
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        images, quantizer = chain / "data" / "images", str(chain / "quantizer")
        quantize(QuantizeOptions(images=images, out=out, quantizer=quantizer, device=device))
        store = GridStore.open(out)
        grids.append(np.stack([store[key] for key in sorted(store)]))
    assert (grids[0] == grids[1]).mean() > 0.99


def test_answers_are_those_of_a_cpu(chain: Path) -> None:
    record = json.loads((chain / "data" / "train.json").read_text())[0]
    image = Image.open(chain / "data" / "images" / record["image"])
    answers = [
        Assistant.load(chain / "tied", device).answer(["What is it?"], [[image]], max_new_tokens=8)
        for device in ("cpu", "cuda")
    ]
    assert answers[0] == answers[1]
