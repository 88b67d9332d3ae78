"""What trains, by which kernels and at which rates, what is logged, and what is done about bad steps."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, get_args

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer, CohereConfig, GraniteConfig, get_scheduler

from being_vl.cli import main
from being_vl.errors import CheckpointError, ConfigError, ModelError
from being_vl.layout import VocabularyLayout
from being_vl.training.export import check_logits
from being_vl.training.log import read_log
from being_vl.training.metrics import Cost
from being_vl.training.optimizer import learning_rate_factor, make_optimizer, set_learning_rates
from being_vl.training.options import LoraOptions, OptimizerOptions, StageOptions, TrainOptions
from being_vl.training.split import TwoPartLM
from being_vl.training.stages import add_adapters, freeze
from helpers import tiny
from helpers.ranks import ENVIRONMENT, ForkedTraining, train_in_forks
from helpers.training import logged_steps, losses, weights, write_recipe

MIXTURE = {"foundation": 40, "perception": 30, "reasoning": 20, "instruction": 10}
BATCH = 4
LIGER = ["llama", "qwen3", "gemma2"]


def recipe(chain: Path, out: Path, stages: list[dict[str, Any]], ranks: int = 1, **changes: object) -> Path:
    """A recipe whose global batch is the same on any number of ranks."""
    defaults = {
        "learning_rate": 3e-3,
        "mixture": MIXTURE,
        "accumulation": BATCH // 2 // ranks,
        "max_steps": 2,
    }
    options = {
        **tiny.training_inputs(chain),
        "out": str(out),
        "batches": {"micro_batch_size": 2},
        "optimizer": {"weight_decay": 0.1},
        "stages": [defaults | {"name": f"stage{n}"} | stage for n, stage in enumerate(stages, start=1)],
    }
    return write_recipe(out.with_suffix(".yaml"), options, changes)


def split(folder: Path, text_size: int = 390, chunk: int = 1024) -> TwoPartLM:
    return TwoPartLM(
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager"), text_size, chunk
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", [*get_args(tiny.Family), "cohere", "granite"])
def test_losses_and_gradients_are_the_models_own(
    family: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks of three positions too, where the family scales its embeddings or logits, or caps them."""
    monkeypatch.setitem(tiny.CONFIGS, "cohere", CohereConfig)
    monkeypatch.setitem(tiny.CONFIGS, "granite", GraniteConfig)
    config_changes = {
        "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0},
        "cohere": {"logit_scale": 0.3},
    }
    config_changes |= {"gemma2": {"final_logit_softcapping": 2.0}}
    folder = tiny.llm(tmp_path / "llm", family, tied, layers=2, **config_changes.get(family, {}))  # type: ignore[arg-type]
    if family == "phi":
        with pytest.raises(ModelError, match="without bias"):
            split(folder)
        return
    original, model = AutoModelForCausalLM.from_pretrained(folder), split(folder, chunk=3)
    original.config._attn_implementation = "eager"
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, original.config.vocab_size, (2, 17), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.4, -100)
    reference_loss = original(input_ids=ids, labels=labels).loss
    reference_loss.backward()
    losses = model(input_ids=ids, labels=labels)
    losses.mean().backward()
    assert len(losses) == (labels[:, 1:] != -100).sum() > 10
    assert losses.mean().item() == pytest.approx(reference_loss.item(), rel=1e-6)
    target = AutoModelForCausalLM.from_pretrained(folder)
    model.merge_into(target, {name: p.grad for name, p in model.lm.named_parameters()})
    for name, parameter in original.named_parameters():
        torch.testing.assert_close(target.get_parameter(name).data, parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("liger_kernel"), reason="liger-kernel is not installed")
@pytest.mark.parametrize("interpreted", ["1", pytest.param("0", marks=pytest.mark.gpu)])
def test_ligers_kernels_compute_the_same(tmp_path: Path, interpreted: str) -> None:
    """Those of norms and MLPs, forward and backward, in Triton's interpreter and on a GPU."""
    words = [sys.executable, str(Path(__file__).parents[1] / "helpers" / "liger.py"), str(tmp_path), *LIGER]
    environment = os.environ | ENVIRONMENT | {"TRITON_INTERPRET": interpreted}
    process = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-4000:]
    assert {*LIGER} <= {*process.stdout.split()}


STAGES = [
    {"unfreeze": 0, "new_rows_learning_rate": 1e-3, "max_steps": 3, "schedule": "linear", "final": 0.1},
    {"unfreeze": ["layers.3.mlp", "norm"], "schedule": "constant"},
    {"unfreeze": 2},
    {"unfreeze": "all", "text_rows": False, "new_rows_learning_rate": 1e-3},  # as Being-VL-0's first
    {"unfreeze": 0.5, "lora": {"rank": 2, "alpha": 64}},
]


def options_of_all(chain: Path) -> dict[str, Any]:
    text = chain / "held-out.txt"
    text.write_text((chain / "data" / "text.json").read_text()[:6000])
    return {
        "optimizer": {"weight_decay_on": "matrices"},
        "retention": {"text": str(text), "tolerance": 1e-6},
        "sequences": {"max_length": 300},
    }


@pytest.fixture(scope="module")
def reference(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One stage of each kind, on one rank without ZeRO; `output` beside it is what it printed."""
    out = tmp_path_factory.mktemp("reference") / "run"
    changes = {"precision": {"liger": True}, "logging": {"wandb": "test", "peak_flops": 1e9}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        path = recipe(chain, out, STAGES, **options_of_all(chain) | changes)
        forked_training = ForkedTraining(path)
        out.with_name("output").write_text(forked_training.finish())
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "ranks", "checkpointing"), [(2, 1, False), (3, 2, True)])
def test_zero_offload_and_chunks_do_not_change_the_losses(
    zero: int, ranks: int, checkpointing: bool, chain: Path, reference: Path, tmp_path: Path
) -> None:
    changes = options_of_all(chain) | {"offload": "optimizer", "loss_chunk": 3, "zero": zero}
    changes |= {"gradient_checkpointing": checkpointing}
    out = tmp_path / "run"
    train_in_forks(recipe(chain, out, STAGES, ranks, **changes), ranks)
    for entry, reference_entry in zip(
        read_log(out / "log.jsonl"), read_log(reference / "log.jsonl"), strict=True
    ):
        for key in ("loss", "gradient_norm", "text_perplexity"):
            assert entry.get(key, 0) == pytest.approx(reference_entry.get(key, 0), rel=1e-4), (
                entry["stage"],
                entry["step"],
            )
        for name, loss in entry.get("losses", {}).items():
            assert loss == pytest.approx(reference_entry["losses"][name], rel=1e-4)
    assert_what_trains(chain, out)


def assert_what_trains(chain: Path, out: Path) -> None:
    text = VocabularyLayout.load(chain / "tied").text_size
    folders = [chain / "tied", *(out / f"stage{n}" for n in range(1, 6))]
    old_weights, *stage_weights = (weights(folder) for folder in folders)
    names_of_stages = []
    for new_weights in stage_weights:
        assert new_weights.keys() == old_weights.keys()
        moved_names = {name for name in new_weights if not torch.equal(new_weights[name], old_weights[name])}
        rows = "model.embed_tokens.weight"
        assert rows in moved_names
        assert torch.equal(new_weights[rows][:text], old_weights[rows][:text])
        names_of_stages.append(
            {name.removeprefix("model.") for name in moved_names} - {"embed_tokens.weight", "lm_head.weight"}
        )
        older_weights, old_weights = old_weights, new_weights
    names = {name.removeprefix("model.") for name in old_weights} - {"embed_tokens.weight", "lm_head.weight"}
    assert names_of_stages[0] == set()
    assert names_of_stages[1] == {name for name in names if name.startswith("layers.3.mlp.")} | {
        "norm.weight"
    }
    assert names_of_stages[2] == {name for name in names if name.startswith(("layers.0.", "layers.1."))}
    assert names_of_stages[3] == names
    assert names_of_stages[4] == {name for name in names_of_stages[2] if "norm" not in name}
    for name in names_of_stages[4]:
        change = old_weights[f"model.{name}"] - older_weights[f"model.{name}"]
        assert torch.linalg.matrix_rank(change, rtol=1e-3) <= 2, name


def test_stages_train_what_they_say(chain: Path, reference: Path) -> None:
    assert_what_trains(chain, reference)


def test_log_of_a_step(chain: Path, reference: Path) -> None:
    output = reference.with_name("output").read_text()
    assert "liger: its kernels need a GPU" in output
    assert "adapters" in output
    entries = logged_steps(reference)
    first = entries[0]
    assert set(first["losses"]) == {name for name, share in first["mixture"].items() if share} | {"text"}
    assert first["losses"]["text"] == pytest.approx(first["loss"])
    assert not any(entry["skipped"] or "trouble" in entry for entry in entries)
    assert all(entry["mfu"] > 0 and entry["memory"] > 2**20 for entry in entries)
    rates = [(entry["learning_rate"], entry["new_rows_learning_rate"]) for entry in entries]
    assert [rate for rate, _ in rates[:3]] == pytest.approx([1e-3, 1e-3, 5.5e-4])
    assert rates[3:5] == [(3e-3, 3e-3)] * 2
    assert rates[7] == pytest.approx((3e-3, 1e-3))
    assert list(reference.glob("wandb/offline-run-*/*.wandb"))


def test_perplexity_of_a_text(chain: Path, reference: Path) -> None:
    """As transformers gives it, before and after each stage; and a warning where it rises."""
    probes = {
        (entry["stage"], entry["step"]): entry["text_perplexity"]
        for entry in read_log(reference / "log.jsonl")
        if "text_perplexity" in entry
    }
    assert list(probes) == [(f"stage{n}", s) for n, last in enumerate([3, 2, 2, 2, 2], 1) for s in (0, last)]
    tokenizer = AutoTokenizer.from_pretrained(chain / "tied")
    text = (chain / "held-out.txt").read_text()
    ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    for folder, stage_and_step in ((chain / "tied", ("stage1", 0)), (reference / "stage1", ("stage1", 3))):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            sums = [
                (model(input_ids=w[None], labels=w[None]).loss.double() * (len(w) - 1), len(w) - 1)
                for w in ids.split(300)
            ]
        mean = sum(s for s, _ in sums) / sum(n for _, n in sums)
        assert probes[stage_and_step] == pytest.approx(mean.exp().item(), rel=1e-5)
    output = reference.with_name("output").read_text()
    for number in range(1, 6):
        (first_perplexity, last_perplexity) = (
            value for (stage, _), value in probes.items() if stage == f"stage{number}"
        )
        assert (f"stage{number}: the perplexity of" in output) == (
            last_perplexity > first_perplexity * (1 + 1e-6)
        )


def test_saved_model_is_compared_with_the_trained_one(chain: Path) -> None:
    ids = torch.arange(8)[None]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(chain / "tied")(ids).logits[0]
    check_logits(chain / "tied", ids, logits)
    with pytest.raises(CheckpointError, match="logits that are"):
        check_logits(chain / "tied", ids, logits + 0.01 * torch.randn_like(logits))


def test_a_model_stored_in_bf16_trains_in_float32(chain: Path, tmp_path: Path) -> None:
    """As most LLMs are stored, and as a CPU computes."""
    model = tmp_path / "model"
    shutil.copytree(chain / "tied", model)
    AutoModelForCausalLM.from_pretrained(model, dtype="bfloat16").save_pretrained(model)
    train_in_forks(
        recipe(chain, tmp_path / "run", [{"unfreeze": "all", "learning_rate": 1e-2}], model=str(model))
    )
    model_of_stage = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "stage1", dtype="auto")
    assert {parameter.dtype for parameter in model_of_stage.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("stage", [StageOptions("a", 0, 1e-3, {}), StageOptions("b", "all", 1e-3, {})])
def test_cost_is_what_torch_counts(stage: StageOptions, tmp_path: Path) -> None:
    model = split(tiny.llm(tmp_path / "llm", tied=False, layers=2))
    freeze(model, stage)
    ids = torch.randint(0, 390, (2, 24))
    labels = ids.clone()
    labels[:, :10] = -100
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=labels).sum().backward()
    cost = Cost.from_model(model)
    assert cost is not None
    assert cost.flops([24, 24], 2 * 14) == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_optimizer_has_groups(tmp_path: Path) -> None:
    """Decay on matrices alone, two learning rates, and every trained parameter once."""
    model = split(tiny.llm(tmp_path / "llm", tied=False, layers=2))
    stage = StageOptions("one", "all", 1e-3, {}, new_rows_learning_rate=5e-3)
    freeze(model, stage)
    optimizer = make_optimizer(model, stage, OptimizerOptions(0.1, "matrices"))
    assert set_learning_rates(optimizer, 0.5) == {"learning_rate": 5e-4, "new_rows_learning_rate": 2.5e-3}
    settings = [(id(p), g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]]
    new_rows = {id(model.embedding.new_rows), id(model.head.new_rows)}
    rows_without_decay = new_rows | {id(model.embedding.text_rows), id(model.head.text_rows)}
    expected_settings = [
        (
            id(p),
            2.5e-3 if id(p) in new_rows else 5e-4,
            0.0 if p.dim() == 1 or id(p) in rows_without_decay else 0.1,
        )
        for p in model.parameters()
    ]
    assert sorted(settings) == sorted(expected_settings)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedules_are_those_of_transformers(schedule: str) -> None:
    stage = StageOptions("one", 0, 1.0, {}, schedule=schedule, warmup=0.1)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    torch_schedule = get_scheduler(name, optimizer, num_warmup_steps=4, num_training_steps=40)
    for step in range(40):
        if step >= 4:
            assert learning_rate_factor(stage, step, 40) == pytest.approx(torch_schedule.get_last_lr()[0])
        optimizer.step()
        torch_schedule.step()
    assert [learning_rate_factor(stage, step, 40) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate_factor(StageOptions("one", 0, 1.0, {}, final=0.1), 10**6, 10**6) == pytest.approx(
        0.1
    )


@pytest.fixture
def poison(chain: Path, tmp_path: Path) -> tuple[Path, Path, str]:
    """A model and records, one of which gives NaN: its text has a token that no other has, with a NaN in its row."""
    model = AutoModelForCausalLM.from_pretrained(chain / "untied")
    tokenizer = AutoTokenizer.from_pretrained(chain / "untied")
    token = tokenizer("§", add_special_tokens=False).input_ids[-1]
    assert token % (model.config.vocab_size // 32), "the saved model is checked on multiples of this"
    model.get_input_embeddings().weight.data[token, 0] = math.nan
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    for file in (chain / "untied").iterdir():
        if not (folder / file.name).exists() and file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    records = json.loads((chain / "data" / "train.json").read_text())[:12]
    records[5]["conversations"][0]["value"] += " §"
    path = tmp_path / "records.json"
    path.write_text(json.dumps(records))
    return folder, path, f"{path}: record 5"


@pytest.mark.slow
def test_nan_never_reaches_the_weights(
    poison: tuple[Path, Path, str], chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under every ZeRO stage, in float32 and bf16: the step is left out, its records are named, and all goes on."""
    model, records, place = poison
    changes = {"model": str(model), "records": [str(records)]}
    stages = [{"unfreeze": 1, "max_steps": 6, "mixture": dict.fromkeys(MIXTURE, 1)}]
    losses_of_runs = {}
    for zero, ranks, dtype in [
        (0, 1, "fp32"),
        (1, 1, "fp32"),
        (2, 2, "fp32"),
        (3, 1, "fp32"),
        (0, 1, "bf16"),
        (2, 1, "bf16"),
    ]:
        out = tmp_path / f"{zero}{ranks}{dtype}"
        output = train_in_forks(
            recipe(chain, out, stages, ranks, zero=zero, precision={"dtype": dtype}, **changes), ranks
        )
        entries = logged_steps(out)
        skipped_entries = [entry for entry in entries if entry["skipped"]]
        assert 0 < len(skipped_entries) < 6
        assert all(any(place in location for location in entry["records"]) for entry in skipped_entries)
        assert all(math.isnan(entry["loss"]) == entry["skipped"] for entry in entries)
        assert "loss is nan" in output
        name = "model.layers.0.mlp.up_proj.weight"
        weight = weights(out / "stage1")[name]
        assert weight.isfinite().all()
        assert not torch.equal(weight, weights(model)[name])
        losses_of_runs[zero, dtype] = torch.tensor(losses(out))
    for (_, dtype), values in losses_of_runs.items():
        torch.testing.assert_close(
            values, losses_of_runs[0, "fp32"], rtol=1e-5 if dtype == "fp32" else 0.02, atol=0, equal_nan=True
        )
    path = recipe(chain, tmp_path / "stop", stages, spikes={"action": "stop"}, **changes)
    assert main(["train", "--recipe", str(path)]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("being-vl: error: stage1 step ")
    assert "loss is nan" in line
    assert place in line
    assert not (tmp_path / "stop" / "stage1").exists()


@pytest.mark.slow
def test_leaps_are_skipped_the_same_way_when_resumed(chain: Path, tmp_path: Path) -> None:
    """By the definition as it is written down; a threshold this low takes ordinary steps for leaps."""
    baseline, out = tmp_path / "whole", tmp_path / "killed"
    stages = [{"unfreeze": "all", "max_steps": 50, "learning_rate": 1e-6}]
    changes = {"spikes": {"action": "skip", "deviations": 1.5}, "checkpoint": {"every": 5}}
    train_in_forks(recipe(chain, baseline, stages, **changes))
    history: list[dict[str, Any]] = []
    for entry in logged_steps(baseline):
        leap = False
        for key in ("loss", "gradient_norm") if len(history) >= 20 else ():
            logs = [math.log(first_perplexity[key]) for first_perplexity in history]
            spread = 1.4826 * median(abs(value - median(logs)) for value in logs)
            leap |= math.log(entry[key]) - median(logs) > 1.5 * max(spread, 0.01)
        assert entry["skipped"] == leap, entry["step"]
        assert ("records" in entry) == leap
        if not leap:
            history.append(entry)
    assert 1 < len(logged_steps(baseline)) - len(history) < 20
    path = recipe(chain, out, stages, **changes)
    training = ForkedTraining(path)
    while len(read_log(out / "log.jsonl")) < 33:
        assert not training.has_ended(), training.output.read_text()
    training.kill()
    output = train_in_forks(path)
    assert re.search(r"resumed after step \d+", output)
    assert [(e["loss"], e["skipped"]) for e in logged_steps(out)] == [
        (e["loss"], e["skipped"]) for e in logged_steps(baseline)
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unfreeze": ["layer.3"]}, "parameters are called"),
        ({"unfreeze": 5}, "has 2 layers"),
        ({"unfreeze": 1, "lora": LoraOptions(targets=["nothing"])}, "no linear layer"),
    ],
)
def test_stages_that_ask_for_what_is_not_there(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = split(tiny.llm(tmp_path / "llm", layers=2))
    stage = StageOptions("one", learning_rate=1.0, mixture={}, **changes)
    with pytest.raises(ConfigError, match=message):
        add_adapters(model, stage) if stage.lora else freeze(model, stage)


def test_adapters_of_a_model_without_new_rows_train_alone(tmp_path: Path) -> None:
    model = split(tiny.llm(tmp_path / "llm", layers=2), text_size=10**6)
    stage = StageOptions("one", 1, 1e-3, lora=LoraOptions(rank=2))
    add_adapters(model, stage)
    freeze(model, stage)
    assert all(".lora_" in name for name, p in model.named_parameters() if p.requires_grad)


def test_wrong_options() -> None:
    for fields in ({"unfreeze": 1.5}, {"unfreeze": -1}, {"final": 2.0}):
        with pytest.raises(ConfigError, match=next(iter(fields))):
            StageOptions(**{"name": "one", "unfreeze": 0, "learning_rate": 1.0, "mixture": {}} | fields)
    for name in ("../out", "a/b", "checkpoints"):
        with pytest.raises(ConfigError, match="names its folder"):
            StageOptions(name, 0, 1.0)
    with pytest.raises(ConfigError, match="at least one"):
        TrainOptions(Path("m"), [Path("r")], Path("o"), stages=[])
    with pytest.raises(ConfigError, match="rank: expected at least 1, found 0"):
        LoraOptions(rank=0)
    with pytest.raises(ConfigError, match="offload needs ZeRO"):
        TrainOptions(Path("m"), [Path("r")], Path("o"), offload="optimizer")
