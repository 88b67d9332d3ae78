"""Recipes and flags: what is wrong is said in one line, with its place; what is printed is read back."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from being_vl.commands import COMMANDS, load
from being_vl.data.options import RecordFile
from being_vl.recipes.options import RunOptions
from being_vl.recipes.recipe import FOLDER, Recipe
from being_vl.schema import NO_DEFAULT, json_schema, read_options, walk
from being_vl.training.options import TrainOptions
from helpers.commands import being_vl, expect_refusal

STAGE = "name: a, unfreeze: 0.5, learning_rate: 1e-3"
RUN = "images: i\nrecords: [r]\nllm: l\nout: o\n"
SHIPPED_NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
WITH_RECIPE = sorted(name for name, c in COMMANDS.items() if "recipe" not in read_options(load(c.options)))

WRONG_RECIPES = [
    # Names.
    (["train"], "learning_rat: 1", "learning_rat: there is no such option"),
    (["train"], "sede: 1", "sede: there is no such option; did you mean seed?"),
    (["train"], "save_every: 3", "save_every: there is no such option"),
    (["train"], "1: 2", "1: there is no such option"),
    (
        ["train"],
        f"stages: [{{{STAGE}}}, {{name: b, steps: 3}}]",
        "stages[1].steps: there is no such option; did you mean stages[1].max_steps?",
    ),
    (
        ["run"],
        "llm: l\ntrain: {stages: [{name: a, max_steps: 2}, {name: b, steps: 3}]}",
        "train.stages[1].steps: there is no such option; did you mean train.stages[1].max_steps?",
    ),
    (["vocab", "train", "g"], "merges: 3", "merges: there is no such option"),
    (["run"], "llm: l\nzero: 2", "zero: there is no such option; did you mean train.zero?"),
    (["run"], "llm: l\nquantise: {workers: 1}", "quantise: there is no such option; did you mean quantize?"),
    (["run"], "llm: l\ntrain: {model: m}", "train.model: follows from other options, and cannot be given"),
    (["run"], "llm: l\nvocab: {grids: g}", "vocab.grids: follows from other options, and cannot be given"),
    # Types of single values.
    (["train"], "zero: two", "zero: expected one of 0, 1, 2, 3, found 'two'"),
    (["train"], "zero: [2]", "zero: expected one of 0, 1, 2, 3, found [2]"),
    (["train"], "zero: null", "zero: expected one of 0, 1, 2, 3, found null"),
    (["train"], "seed: 2048.0", "seed: expected a whole number, found 2048.0"),
    (["train"], "seed: '2048'", "seed: expected a whole number, found '2048'"),
    (["train"], "seed: true", "seed: expected a whole number, found true"),
    (["train"], "lenient: maybe", "lenient: expected true or false, found 'maybe'"),
    (["train"], "lenient: 1", "lenient: expected true or false, found 1"),
    (["train"], "model: 7", "model: expected a path, found 7; put it in quotes"),
    (["train"], "model: 2024-01-01", "model: expected a path, found 2024-01-01; put it in quotes"),
    (["train"], "model: ''", "model: expected a path, found ''"),
    (["expand"], "llm: [a]", "llm: expected text, found ['a']"),
    (["generate"], "temperature: hot", "temperature: expected a number, found 'hot'"),
    (["generate"], "temperature: .nan", "temperature: expected a number, found nan"),
    (["vocab", "train", "g"], "num_merges: [1, 2]", "num_merges: expected a whole number, found [1, 2]"),
    (["vocab", "train", "g"], "num_threads: many", "num_threads: expected a whole number, found 'many'"),
    (["run"], "llm: l\nuntil: eval", "until: expected one of quantize, vocab, expand, train, found 'eval'"),
    # Lists, mappings, nested options.
    (["train"], "records: 7", "records: expected a list, found 7"),
    (["train"], "grids: {a: b}", "grids: expected a list, found {'a': 'b'}"),
    (["train"], "grids: [a, 3]", "grids[1]: expected a path, found 3; put it in quotes"),
    (["train"], "records: [a, 3]", "records[1]: expected a path, found 3; put it in quotes"),
    (["train"], "records: [[a]]", "records[0]: expected a path, found ['a']"),
    (["train"], "records: [a, {category: x}]", "records[1].path: is required"),
    (["train"], "records: [{path: 3}]", "records[0].path: expected a path, found 3; put it in quotes"),
    (
        ["prepare"],
        "records: [a, {path: b, categoy: x}]",
        "records[1].categoy: there is no such option; did you mean records[1].category?",
    ),
    (["prepare"], "records: [{path: b, category: 5}]", "records[0].category: expected text, found 5"),
    (["prepare"], "records: [null]", "records[0]: expected a path, found null"),
    (
        ["prepare"],
        "model: m\nout: o\nrecords: [{path: b, category: talk}]",
        "records: the category of b is 'talk'; expected one of foundation, perception, reasoning, instruction",
    ),
    (
        ["run"],
        "images: i\nllm: l\nout: o\nrecords: [{path: b, category: talk}]",
        "train.records: the category of b is 'talk'; expected one of foundation, perception, reasoning, instruction",
    ),
    (["generate"], "prompt: hello", "prompt: expected a list, found 'hello'"),
    (["train"], "optimizer: {betas: [0.9]}", "optimizer.betas: expected a list of 2 values, found [0.9]"),
    (["train"], "optimizer: {betas: [0.9, x]}", "optimizer.betas[1]: expected a number, found 'x'"),
    (["train"], "optimizer: adamw", "optimizer: expected options, `name: value`, found 'adamw'"),
    (["train"], "checkpoint: {every: often}", "checkpoint.every: expected a whole number, found 'often'"),
    (["train"], "sequences: {loss: {answers: x}}", "sequences.loss.answers: expected a number, found 'x'"),
    (["train"], "stages: 3", "stages: expected a list, found 3"),
    (["train"], "stages: {name: a}", "stages: expected a list, found {'name': 'a'}"),
    (["train"], "stages: [a]", "stages[0]: expected options, `name: value`, found 'a'"),
    (["train"], "stages: [{name: a}]", "stages[0].unfreeze: is required"),
    (["train"], f"stages: [{{{STAGE}, epochs: [1]}}]", "stages[0].epochs: expected a number, found [1]"),
    (
        ["train"],
        "stages: [{name: a, unfreeze: {x: 1}}]",
        "stages[0].unfreeze: expected a number, `all` or a list, found {'x': 1}",
    ),
    (
        ["train"],
        "stages: [{name: a, unfreeze: [1]}]",
        "stages[0].unfreeze[0]: expected text, found 1; put it in quotes",
    ),
    (
        ["train"],
        f"stages: [{{{STAGE}, lora: 3}}]",
        "stages[0].lora: expected options, `name: value`, found 3",
    ),
    (
        ["train"],
        f"stages: [{{{STAGE}, lora: {{rank: big}}}}]",
        "stages[0].lora.rank: expected a whole number, found 'big'",
    ),
    (
        ["train"],
        f"stages: [{{{STAGE}, mixture: [foundation]}}]",
        "stages[0].mixture: expected a mapping, `name: value`, found ['foundation']",
    ),
    (
        ["train"],
        f"stages: [{{{STAGE}, mixture: {{foundation: much}}}}]",
        "stages[0].mixture.foundation: expected a number, found 'much'",
    ),
    (["run"], "images: [a, b]\nllm: l", "images: expected a path, found ['a', 'b']"),
    (["run"], f"{RUN}train: [zero]", "train: expected options, `name: value`, found ['zero']"),
    (["launch"], "zero: [2]", "zero: expected one of 0, 1, 2, 3, found [2]"),
    (["plan"], "seed: {a: 1}", "seed: expected a whole number, found {'a': 1}"),
    # Values, and what is missing.
    (["run"], "llm: c", "images: is required"),
    (["run"], f"{RUN}train: {{max_steps: 0}}", "train.max_steps: expected at least 1, found 0"),
    (["run"], f"{RUN}ranks: 0", "ranks: expected at least 1, found 0"),
    # Files.
    (["train"], "", "expected options, `name: value`, found null"),
    (["train"], "- a\n- b", "expected options, `name: value`, found ['a', 'b']"),
    (["train"], "seed: 1\nzero: 2\nseed: 2", "line 3: no YAML ('seed' comes twice)"),
    (["encode", "g"], "a: [", "line 1: no YAML ("),
    (["train"], "zero: 1\n\tseed: 1", "line 2: no YAML ("),
    (["train"], "model: !!python/object:os.system x", "line 1: no YAML (could not determine a constructor"),
]


def write_text(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def place(command: list[str]) -> list[str]:
    """What stands before a recipe on the command line."""
    return [] if command[0] in ("run", "launch", "plan") else ["--recipe"]


@pytest.mark.parametrize(("command", "text", "message"), WRONG_RECIPES)
def test_a_wrong_recipe_is_told_in_one_line(
    command: list[str], text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_text(tmp_path / "recipe.yaml", text)
    line = expect_refusal(capsys, being_vl(*command, *place(command), path))
    assert line.startswith(f"being-vl: error: {path}: {message}")


def test_recipes_that_nobody_thought_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Any value at any option: it is taken, or refused in one line that names the file and the option."""
    path = tmp_path / "recipe.yaml"
    for name, _ in walk(read_options(TrainOptions)):
        for value in (
            None,
            True,
            -1,
            0.5,
            "",
            "x y",
            [],
            [[1]],
            ["a", 2],
            {},
            {"a": {"b": []}},
            [{"name": 1}],
        ):
            content: Any = value
            for part in reversed(name.split(".")):
                content = {part: content}
            path.write_text(yaml.safe_dump(content))
            status = being_vl("train", "--recipe", path, "--print_config")
            if status:
                line = expect_refusal(capsys, status)
                assert line.startswith(f"being-vl: error: {path}: {name}"), (name, value, line)
                assert "expected" in line or "no such option" in line, line
            capsys.readouterr()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--zero", "two"], "--zero: expected one of 0, 1, 2, 3, found 'two'"),
        (["--zeros", "2"], "--zeros: there is no such option; did you mean --zero?"),
        (["--checkpoint.every", "often"], "--checkpoint.every: expected a whole number, found 'often'"),
        (["--every", "3"], "--every: there is no such option; did you mean --checkpoint.every?"),
        (["--optimizer.betas", "0.9"], "--optimizer.betas: expected a list of 2 values, found [0.9]"),
        (["--lenient", "--seed"], "--seed: expected one argument"),
        (["stray"], "'stray': nothing was expected here"),
        (["-q", "-v"], "give -q or -v, not both"),
    ],
)
def test_a_wrong_flag_is_named_without_the_recipe(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_text(tmp_path / "recipe.yaml", "seed: 1")
    assert (
        expect_refusal(capsys, being_vl("train", "--recipe", path, *flags)) == f"being-vl: error: {message}"
    )


def config(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    """What a command prints as its recipe."""
    capsys.readouterr()
    assert being_vl(*words, "--print_config") == 0
    content = yaml.safe_load(capsys.readouterr().out)
    assert isinstance(content, dict)
    return content


def test_flags_of_all_kinds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--checkpoint.every", "3", "--sequences.categories", "a", "b", "--precision.liger"]
    words += ["--records", "r 1.json", "3.json", "--optimizer.betas", "0.9", "0.95", "--lenient=false"]
    words += ["--sequences.images-in-front", "true", "--batches.micro-batch-size=2", "--logging.wandb", "3"]
    words += ["--retention.text", "null", "--loss-chunk", "1_000"]
    content = config(capsys, *words)
    assert content["checkpoint"]["every"] == 3
    assert content["sequences"]["categories"] == ["a", "b"]
    assert content["sequences"]["images_in_front"] is True
    assert content["precision"]["liger"] is True
    assert content["records"] == ["r 1.json", "3.json"]
    assert content["optimizer"]["betas"] == [0.9, 0.95]
    assert content["lenient"] is False
    assert content["batches"]["micro_batch_size"] == 2
    assert content["logging"]["wandb"] == "3"
    assert content["loss_chunk"] == 1000
    stages = [{"name": "a", "unfreeze": "all", "learning_rate": 1e-3}]
    assert config(capsys, "train", "--stages", json.dumps(stages))["stages"][0]["unfreeze"] == "all"
    # A bare flag takes nothing that follows it.
    assert config(capsys, "quantize", "--compile", "images")["images"] == "images"


def test_files_of_records_with_and_without_a_category(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As YAML, as flags and in Python; what is printed is read back, and the schema takes both."""
    mapping = {"path": "b c.json", "category": "reasoning"}
    text = yaml.safe_dump({"model": "m", "out": "o", "records": ["a.json", mapping]})
    path = write_text(tmp_path / "train.yaml", text)
    printed = config(capsys, "train", "--recipe", path)
    assert printed["records"] == ["a.json", mapping]
    assert (
        config(capsys, "train", "--recipe", write_text(tmp_path / "2.yaml", yaml.safe_dump(printed)))
        == printed
    )
    for words in (["a.json", json.dumps(mapping)], ["a.json", "{path: b c.json, category: reasoning}"]):
        assert config(capsys, "train", "--recipe", path, "--records", *words) == printed
    expected = [RecordFile(Path("a.json")), RecordFile(Path("b c.json"), "reasoning")]
    assert Recipe.find(path).training().records == expected
    for items in (["a.json", mapping], [Path("a.json"), expected[1]]):
        assert TrainOptions("m", items, "o").records == expected
    validator = jsonschema.Draft202012Validator(json_schema(read_options(TrainOptions), "recipe"))
    assert validator.is_valid(printed)
    for wrong_item in (3, {"category": "reasoning"}, {"path": "a", "kind": "x"}, ["a"], None):
        assert not validator.is_valid(printed | {"records": [wrong_item]})


def test_a_flag_overrides_one_option_of_several_in_a_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_text(
        tmp_path / "r.yaml", "checkpoint: {every: 7, keep: 5}\nspikes: {deviations: 1e1}\nrecords: [a]"
    )
    content = config(capsys, "train", "--recipe", path, "--checkpoint.keep", 1)
    assert content["checkpoint"] == {"every": 7, "keep": 1}
    assert content["spikes"]["deviations"] == 10.0
    assert content["records"] == ["a"]


@pytest.mark.parametrize("name", WITH_RECIPE)
def test_a_printed_recipe_is_read_back(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of every command: all options that can be given, each with another value than its default where that is easy."""
    values = {bool: "true", int: "16", float: "0.5", str: "64", Path: "a b.json"}
    words: list[str] = []
    for option, description in walk(read_options(load(COMMANDS[name].options))):
        if description.hint in values and option != COMMANDS[name].positional_option:
            words += [f"--{option}={values[description.hint]}"]
    content = config(capsys, *name.split(), *words)
    path = write_text(tmp_path / "recipe.yaml", yaml.safe_dump(content))
    old_config = config(capsys, *name.split(), "--recipe", path)
    assert old_config == content


@pytest.mark.parametrize("name", SHIPPED_NAMES)
def test_a_shipped_recipe_is_valid_and_read_back(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Recipe.find(name)
    options = recipe.run()
    path = write_text(tmp_path / "a.yaml", yaml.safe_dump(config(capsys, "run", name)))
    assert Recipe.find(path).run() == options
    schema = json_schema(read_options(RunOptions), "run")
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(dict(recipe.content), schema)


def test_the_schema_refuses_what_reading_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert being_vl("train", "--print_schema") == 0
    schema = json.loads(capsys.readouterr().out)
    num_checks = 0
    for command, text, message in WRONG_RECIPES:
        if command == ["train"] and not re.search(
            "no YAML|is required|in quotes|2048.0|found ''|nan", message
        ):
            num_checks += 1
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(yaml.safe_load(text), schema)
    assert num_checks > 20


def test_seed_and_device_of_a_run_reach_every_step_that_gives_none(tmp_path: Path) -> None:
    path = write_text(tmp_path / "r.yaml", f"{RUN}vocab: {{seed: 5}}\nquantize: {{device: cpu}}")
    run = Recipe.find(path).run(["--seed", "3", "--device", "cuda:1", "--max-steps", "7", "--overwrite"])
    assert (run.quantizer_training.seed, run.vocab.seed, run.expand.seed, run.train.seed) == (3, 5, 3, 3)
    assert (run.quantizer_training.device, run.quantize.device) == ("cuda:1", "cpu")
    assert (run.quantizer_training.steps, run.train.max_steps) == (7, 7)
    assert run.train.overwrite
    default_options = Recipe.find(path).run()
    assert (
        default_options.train.seed,
        default_options.expand.seed,
        default_options.quantizer_training.steps,
    ) == (0, 0, 4000)


def test_flags_of_a_training_are_understood_by_recipes_of_both_kinds(tmp_path: Path) -> None:
    run = write_text(tmp_path / "run.yaml", RUN)
    training = write_text(tmp_path / "train.yaml", "model: m\nrecords: [r]\nout: o")
    for path in (run, training):
        flags = ["--zero", "3", "--checkpoint.every=9", "--precision.liger"]
        options = Recipe.find(path).training(flags)
        assert (options.zero, options.checkpoint.every, options.precision.liger) == (3, 9, True)
    assert Recipe.find(run).training(["--train.zero", "2", "--out", "other"]).out == Path("other/training")


def test_required_options_have_no_default_in_help() -> None:
    for name in ("train", "run"):
        options = read_options(load(COMMANDS[name].options))
        assert all(option.help for _, option in walk(options)), name
        assert options["out"].default is NO_DEFAULT
