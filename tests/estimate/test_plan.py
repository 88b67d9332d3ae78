"""`being-vl plan` against what engines really hold; the shipped recipes, each planned and tried out small."""

import gc
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from being_vl.estimate.memory import States, estimate_memory, measure_activations, saved_bytes
from being_vl.estimate.shapes import build_model, find_shape, without_memory
from being_vl.files import to_jsonable
from being_vl.model.expand import expand
from being_vl.model.options import ExpandOptions
from being_vl.recipes.recipe import FOLDER, Recipe
from being_vl.training.kernels import compute_dtype, set_activation_checkpointing
from being_vl.training.log import read_log
from being_vl.training.options import BatchOptions, PrecisionOptions, StageOptions, TrainOptions
from being_vl.training.split import TwoPartLM
from being_vl.training.stages import freeze
from helpers import tiny
from helpers.commands import being_vl, expect_refusal
from helpers.ranks import FORKS, free_port, train_in_forks

STAGES = [
    StageOptions("rows", 0.0, 1e-3, {"foundation": 1}, max_steps=1, accumulation=2),
    StageOptions("half", 0.5, 1e-3, {"foundation": 1}, max_steps=1, accumulation=2),
    StageOptions("all", "all", 1e-3, {"foundation": 1}, max_steps=1, accumulation=2),
]
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


@pytest.fixture(scope="module")
def model(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An expanded model, large enough for a plan's rounding and a batch's own bytes not to matter."""
    folder = tmp_path_factory.mktemp("plan")
    llm = tiny.llm(folder / "llm", tied=False, hidden=128)
    expand(ExpandOptions(str(llm), chain / "vocabulary.json", folder / "model", str(chain / "quantizer")))
    return folder / "model"


def options(model: Path, **changes: Any) -> TrainOptions:
    return TrainOptions(model, [Path("none.json")], Path("none"), stages=STAGES, **changes)


def list_storages() -> dict[int, torch.UntypedStorage]:
    """Every storage that a tensor of this process has; as long as it is held, no other one gets its address."""
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
    return {storage._cdata: storage for storage in storages}


def engine_bytes(rank: int, ranks: int, port: str, model: Path, cases: list[Any], results: Any) -> None:
    """On one of several ranks: for each case the most that an engine's tensors take, between backward and step."""
    gc.freeze()
    environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ.update(
        environment | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu"}
    )
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    from being_vl.training.loading import load_model, place_parameters
    from being_vl.training.optimizer import make_deepspeed_config, make_optimizer

    torch.set_num_threads(1)
    __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo")
    ids = torch.ones(1, 8, dtype=torch.int64)
    for stage, changes in cases:
        training = options(model, batches=BatchOptions(1), **changes)
        old_storages = list_storages()
        dtype = compute_dtype(training.precision)
        model_of_stage, _ = load_model(model, stage, training.precision, training.loss_chunk)
        config = make_deepspeed_config(
            training.zero, "none", dtype, 1, stage.accumulation, training.optimizer.gradient_clipping
        )
        optimizer = make_optimizer(model_of_stage, stage, training.optimizer)
        place_parameters(model_of_stage, dtype, config)
        engine, *_ = deepspeed.initialize(model=model_of_stage, optimizer=optimizer, config=config)
        max_bytes = 0
        for _ in range(2 * stage.accumulation):
            engine.backward(engine(input_ids=ids, labels=ids, attention_mask=ids).sum())
            torch.distributed.barrier()
            time.sleep(0.1)  # until gloo's threads have let go of what they sent
            gc.collect()
            new_storages = list_storages()
            # The buffer for gradients to send is a constant of DeepSpeed's, and on a CPU never touched.
            sizes = [storage.nbytes() for key, storage in new_storages.items() if key not in old_storages]
            max_bytes = max(max_bytes, sum(size for size in sizes if size < 10**9))
            del new_storages
            engine.step()
        results.put((rank, stage.name, changes, max_bytes))
        engine.destroy()
        del engine, model_of_stage
        gc.collect()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_gradients_and_optimizer_are_those_of_the_engine(model: Path, ranks: int) -> None:
    cases = [
        (STAGES[1], {"zero": zero, "precision": PrecisionOptions(dtype)})
        for zero in range(4)
        for dtype in ("fp32", "bf16")
    ]
    cases += [(stage, {"zero": 2, "precision": PrecisionOptions("bf16")}) for stage in (STAGES[0], STAGES[2])]
    results = FORKS.Queue()
    arguments = ranks, free_port(), model, cases, results
    processes = [FORKS.Process(target=engine_bytes, args=(rank, *arguments)) for rank in range(ranks)]
    for process in processes:
        process.start()
    measurements = [results.get(timeout=200) for _ in range(len(cases) * ranks)]
    for process in processes:
        process.join()
    shape = find_shape(model, None)
    for rank, name, changes, measurement in measurements:
        training = options(model, batches=BatchOptions(1), **changes)
        dtype = torch.float32 if training.precision.dtype == "fp32" else torch.bfloat16
        with without_memory():
            model_of_stage = build_model(shape, training, dtype)
            freeze(model_of_stage, next(stage for stage in STAGES if stage.name == name))
            memory, _ = estimate_memory(
                States.from_model(model_of_stage),
                measure_activations(model_of_stage, 8, 7),
                training,
                ranks,
                dtype,
            )
        states = memory.weights + memory.gradients + memory.optimizer
        assert states == pytest.approx(measurement, rel=0.1), (rank, name, changes, memory)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_activations_are_those_of_a_real_forward_pass(
    tmp_path: Path, family: tiny.Family, checkpointing: bool
) -> None:
    """Of the same model with weights, on real tensors."""
    llm = tiny.llm(tmp_path / "llm", family, hidden=64, layers=6)
    training = options(llm, batches=BatchOptions(3), loss_chunk=16, gradient_checkpointing=checkpointing)
    shape = find_shape(llm, 40)
    rows, length, label_tokens = 3, 96, 40
    for stage in STAGES[1:]:
        with without_memory():
            fake_model = build_model(shape, training, torch.float32)
            freeze(fake_model, stage)
            activations = measure_activations(fake_model, length, label_tokens)
        real_model = TwoPartLM(AutoModelForCausalLM.from_config(shape.config), shape.text_size, 16).train()
        freeze(real_model, stage)
        assert States.from_model(fake_model) == States.from_model(real_model)
        if checkpointing:
            set_activation_checkpointing(real_model.lm, True)
        ids = torch.randint(shape.config.vocab_size, (rows, length))
        labels = ids.clone()
        labels[:, : length - label_tokens] = -100
        num_bytes, _ = saved_bytes(
            real_model,
            lambda: real_model(input_ids=ids, labels=labels, attention_mask=torch.ones_like(ids)),  # noqa: B023
        )
        if checkpointing:
            layer = (activations.row - activations.row_outside_layers) // activations.layers
            assert activations.bytes_of_rows(rows, True) - rows * layer == pytest.approx(num_bytes, rel=0.1)
        else:
            assert activations.bytes_of_rows(rows, False) == pytest.approx(num_bytes, rel=0.1)


def table(text: str, name: str) -> list[float]:
    """The cells of a line of the plan."""
    line = next(line for line in text.splitlines() if line.strip().startswith(name))
    return [float(cell) for cell in re.findall(r"[\d.]+", line.partition(name)[2].replace(",", ""))]


def run_plan(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert being_vl("plan", *words) == 0
    return capsys.readouterr().out


def test_plan_of_a_training_counts_the_tokens_of_its_records(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = {"name": "one", "unfreeze": "all", "learning_rate": 1e-3, "epochs": 3}
    stage["mixture"] = {"foundation": 1, "reasoning": 1}
    recipe = tmp_path / "recipe.yaml"
    options_of_recipe = {
        **tiny.training_inputs(chain),
        "out": str(tmp_path / "out"),
        "batches": {"micro_batch_size": 2},
        "stages": [stage],
    }
    recipe.write_text(yaml.safe_dump(options_of_recipe))
    text = run_plan(capsys, recipe, "--gpus", "1x1GB")
    train_in_forks(recipe)
    entries = read_log(tmp_path / "out" / "log.jsonl")
    assert table(text, "steps") == [len(entries)]
    assert table(text, "tokens")[0] == pytest.approx(sum(entry["tokens"] for entry in entries), rel=0.02)
    trained_parameters = json.loads((tmp_path / "out" / "one" / "manifest.json").read_text())["trained"]
    assert trained_parameters
    result = sum(file.stat().st_size for file in (tmp_path / "out" / "one").glob("*.safetensors"))
    assert table(text, "result")[0] == pytest.approx(result / 1e9, abs=0.01)


def test_plan_names_what_makes_a_stage_fit(capsys: pytest.CaptureFixture[str]) -> None:
    model_words = ["qwen3-1.7b", "--records", '{"foundation": 1000, "instruction": 1000}']
    overrides = ["--", "--gradient-checkpointing", "false"]
    text = run_plan(capsys, *model_words, "--gpus", "8x24GB", *overrides)
    assert "stage3: " in text
    assert "Any of these makes it fit: gradient_checkpointing: true" in text
    assert "fit" not in run_plan(capsys, *model_words, "--gpus", "8x24GB")
    text = run_plan(capsys, *model_words, "--gpus", "1x8GB")
    assert "stage3: " in text
    assert re.search(r"It takes \d+ GPUs, with .*zero: 3", text)


def test_flags_of_the_training_override_recipes_of_both_kinds(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_plan(capsys, "qwen3-1.7b", "--", "--zero", 3, "--batches.micro-batch-size", 1)
    assert "ZeRO-3, bf16, 1 rows" in run
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**tiny.training_inputs(chain), "out": str(tmp_path / "out")}))
    assert "ZeRO-3, bf16, 1 rows" in run_plan(
        capsys, recipe, "--gpus", "2x1GB", "--", "--zero", 3, "--batches.micro-batch-size", 1
    )
    message = expect_refusal(capsys, being_vl("plan", "qwen3-1.7b", "--", "--zeroo", 3))
    assert "--zeroo: there is no such option" in message


def test_demo_is_planned_before_it_has_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_plan(capsys, "demo").startswith("demo, ")
    assert "unmasked" not in ALL_ATTENTION_FUNCTIONS


def test_bad_plans_are_refused(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(*words: object) -> str:
        return expect_refusal(capsys, being_vl("plan", *words))

    assert "expected such as 8x80GB" in refuse("qwen3-1.7b", "--gpus", "8")
    assert "mfu: expected a share above 0, at most 1, found 2.0" in refuse("qwen3-1.7b", "--mfu", 2)
    assert "one of " in refuse("nothing")
    assert "or one of Llama-3.1-8B" in refuse("demo", "--", "--llm", "./nowhere")


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipe_is_planned(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    training = Recipe.find(name).training()
    text = run_plan(capsys, name, "--gpus", "8x80GB")
    assert len(table(text, "together")) == len(training.stages)
    assert "do not fit" not in text


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*RECIPES} - {"demo"}))
def test_shipped_recipe_trains_a_model_of_its_kind(name: str, chain: Path, tmp_path: Path) -> None:
    """The recipe itself, with other files, fewer steps, and a model scaled down; test_demo runs the demo's."""
    training = Recipe.find(name).training()
    config = find_shape(*Recipe.find(name).model()).config
    if config.model_type == "llama":
        model = chain / ("tied" if config.tie_word_embeddings else "untied")
    else:
        llm = tiny.llm(tmp_path / "llm", config.model_type, tied=config.tie_word_embeddings)
        model = tmp_path / "model"
        expand(ExpandOptions(str(llm), chain / "vocabulary.json", model, str(chain / "quantizer")))
    fields = to_jsonable(training) | {
        "model": str(model),
        "grids": str(chain / "grids"),
        "records": [str(chain / "data" / "train.json")],
        "out": str(tmp_path / "out"),
        "stages": [to_jsonable(stage) | {"max_steps": 2} for stage in training.stages],
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(fields))
    train_in_forks(recipe)
    entries = read_log(tmp_path / "out" / "log.jsonl")
    assert [entry["stage"] for entry in entries] == [
        stage.name for stage in training.stages for _ in range(2)
    ]
    assert all(entry["loss"] > 0 for entry in entries)
