"""A recipe: the user's YAML file of options, read once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from being_vl.errors import ConfigError
from being_vl.flags import Parser, add_flags, read_flags, to_underscores
from being_vl.options import StrPath
from being_vl.recipes.options import RunOptions
from being_vl.schema import Option, build_options, check_values, read_options, show_value
from being_vl.training.options import TrainOptions
from being_vl.yaml_text import MAX_LENGTH, parse_yaml

FOLDER = Path(__file__).parent
"""Where the recipes that come with the package are, named by their file without `.yaml`."""
CHAMELEON = "zawnpn/being-vq-8k"
"""The papers' quantizer, of 8192 ids; a run can be planned before it is downloaded."""


class ModelSource(NamedTuple):
    """The model that a training starts from.

    Args:
        name: Folder or hub name: of the expanded model, or if there is none yet of the LLM.
        new_rows: Rows that expanding the LLM adds; None if the model is expanded, or is not to be.
    """

    name: str
    new_rows: int | None


@dataclass(frozen=True)
class Recipe:
    """A recipe's file and what it holds.

    Args:
        path: The file.
        content: Name → value, as YAML has them.
    """

    path: Path
    content: Mapping[str, Any]

    @classmethod
    def find(cls, name: StrPath) -> "Recipe":
        """Read a recipe: a file, or a shipped one by its name.

        Raises:
            ConfigError: if there is neither, naming the shipped ones; or if it is no YAML of options.
        """
        for path in (Path(name), FOLDER / f"{name}.yaml"):
            if path.is_file():
                return cls(path, _read_content(path))
        shipped_names = ", ".join(sorted(path.stem for path in FOLDER.glob("*.yaml")))
        raise ConfigError(f"{name}: no such recipe; expected a file, or one of {shipped_names}")

    @property
    def is_run(self) -> bool:
        """Whether it is one of `being-vl run`, and not of a single step."""
        return "llm" in self.content and "vocabulary" not in self.content

    @property
    def is_shipped(self) -> bool:
        """Whether it comes with the package."""
        return self.path.parent == FOLDER

    @property
    def name(self) -> str:
        """What the command line calls it: its path, or the name of a shipped one."""
        return self.path.stem if self.is_shipped else str(self.path)

    def run(self, flags: Sequence[str] = ()) -> RunOptions:
        """The options of the run, with flags that override the recipe's.

        Raises:
            ConfigError: if something is missing or wrong.
        """
        options: RunOptions = make_options(RunOptions, self, _read_words(RunOptions, flags))
        return options

    def training(self, flags: Sequence[str] = ()) -> TrainOptions:
        """The options of the training, be the recipe one of a training or of a run.

        Args:
            flags: Flags of the training that override the recipe's, such as `--zero 3`. Of a run they may be those of
                the run, too: `--train.zero 3`.

        Raises:
            ConfigError: if something is missing or wrong.
        """
        if self.is_run:
            return self.run(_run_flags(flags)).train
        options: TrainOptions = make_options(TrainOptions, self, _read_words(TrainOptions, flags))
        return options

    def model(self, flags: Sequence[str] = ()) -> ModelSource:
        """The model that the recipe's training starts from, with flags as for `training`."""
        if not self.is_run:
            return ModelSource(str(self.training(flags).model), None)
        run = self.run(_run_flags(flags))
        if (run.train.model / "config.json").is_file():
            return ModelSource(str(run.train.model), None)
        if run.train_quantizer:
            codebook_size = run.quantizer_training.codebook.size
        elif run.quantizer.partition("@")[0] == CHAMELEON:
            codebook_size = 8192
        else:
            from being_vl.quantizer.base import load_quantizer

            codebook_size = load_quantizer(run.quantizer, "cpu").codebook_size
        return ModelSource(run.llm, 2 + codebook_size + run.vocab.num_merges)


def _read_content(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        if size > MAX_LENGTH:
            raise ConfigError(f"{path}: a recipe has at most {MAX_LENGTH:,} bytes, this file {size:,}")
        content = parse_yaml(path.read_text(encoding="utf-8-sig"))
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError(f"{path}: {line}no YAML ({_describe(error.problem)})") from None
    except yaml.reader.ReaderError as error:
        raise ConfigError(
            f"{path}: no YAML (it holds the character {error.character:#x}, which no text has)"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: no YAML in UTF-8; save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: no YAML ({_describe(error)})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected options, `name: value`, found {show_value(content)}")
    return content


def _describe(problem: object) -> str:
    """What is wrong with a YAML text, in one line of bounded length."""
    text = " ".join(str(problem).split())
    return text if len(text) <= 200 else f"{text[:200]}…"


def make_options(kind: Any, recipe: Recipe | None, flags: Mapping[str, Any]) -> Any:
    """Make an options dataclass of a recipe and of flags that override it.

    Args:
        kind: The dataclass.
        recipe: The recipe, if there is one.
        flags: As `read_flags` returns them.

    Raises:
        ConfigError: if something is missing or wrong; it names the recipe where that is to blame.
    """
    try:
        return build_options(kind, merge_values(read_options(kind), recipe, flags))
    except ConfigError as error:
        if recipe is None or flags or str(error).startswith(f"{recipe.path}: "):
            raise
        raise ConfigError(f"{recipe.path}: {error}") from None


def merge_values(
    options: Mapping[str, Option], recipe: Recipe | None, flags: Mapping[str, Any]
) -> dict[str, Any]:
    """The values of a recipe, checked, and over them those of flags.

    Raises:
        ConfigError: if the recipe has an unknown name or a value of a wrong type.
    """
    if recipe is None:
        return dict(flags)
    try:
        values = check_values(recipe.content, options)
    except ConfigError as error:
        raise ConfigError(f"{recipe.path}: {error}") from None
    return _overlay(values, flags, options)


def _overlay(
    values: Mapping[str, Any], flags: Mapping[str, Any], options: Mapping[str, Option]
) -> dict[str, Any]:
    result = {**values, **flags}
    for name in values.keys() & flags.keys():
        section = options[name].options
        if section is not None:
            result[name] = _overlay(values[name], flags[name], section)
    return result


def _read_words(kind: Any, words: Sequence[str]) -> dict[str, Any]:
    """The flags of an options dataclass alone."""
    options = read_options(kind)
    parser = Parser(add_help=False)
    add_flags(parser, options)
    return read_flags(parser, options, list(words))


def _run_flags(flags: Sequence[str]) -> list[str]:
    """Flags of a training as flags of the run that it is part of: `--zero` is `--train.zero`."""
    run, training = read_options(RunOptions), read_options(TrainOptions)
    words = []
    for word in map(to_underscores, flags):
        name = word.removeprefix("--").partition("=")[0].partition(".")[0]
        if word.startswith("--") and name in training and name not in run:
            word = f"--train.{word.removeprefix('--')}"
        words.append(word)
    return words
