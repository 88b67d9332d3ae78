"""What is said about a bad step, whatever its records are called; training itself is in the engine's tests."""

from types import SimpleNamespace

import pytest
import torch

from being_vl.errors import TrainingError
from being_vl.training.options import SpikeOptions
from being_vl.training.spikes import SpikeGuard


def make_guard(action: str) -> SpikeGuard:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    return SpikeGuard(SimpleNamespace(), optimizer, SpikeOptions(action), [])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("count", "rest"),
    [(1, ""), (3, ""), (4, " and 1 more, see log.jsonl"), (32, " and 29 more, see log.jsonl")],
)
@pytest.mark.parametrize("name", ["a.json: record {}", "/data/" + "long/" * 1000 + "{}", "line\n\x1b[2J{}"])
def test_three_records_are_named_and_the_others_counted(
    name: str, count: int, rest: str, caplog: pytest.LogCaptureFixture
) -> None:
    records = [name.format(number) for number in range(count)]
    entry = {"step": 7, "trouble": "loss is nan", "skipped": True, "records": records}
    make_guard("warn").report("stage1", entry)
    (line,) = caplog.messages
    assert line.startswith("stage1 step 7: loss is nan; records: ")
    assert line.endswith(f"{rest}; the step was skipped")
    assert line.count("; ") == 1 + min(count, 3)
    assert len(line) < 800
    assert line.isprintable()
    with pytest.raises(TrainingError) as raised:
        make_guard("stop").report("stage1", entry)
    assert f"{rest}. The step was not taken" in str(raised.value)
