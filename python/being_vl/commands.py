"""The commands of `being-vl`: a table of what they call, imported when it is called."""

import argparse
import json
import logging
import os
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from being_vl.errors import ConfigError
from being_vl.flags import REST, Parser, add_flags, read_flags
from being_vl.names import LineFormatter
from being_vl.recipes.recipe import Recipe, make_options, merge_values
from being_vl.schema import Option, dump_values, json_schema, read_options
from being_vl.yaml_text import dump_yaml

SETTINGS = ("dry_run", "print_config", "print_schema", "quiet", "verbose")
"""Flags that a command may have besides its options."""
DESCRIPTION = "Visual BPE and one shared vocabulary: images as tokens of an ordinary language model."


def load(name: str) -> Any:
    """The object of a module, `module:object`, imported now."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


class Invocation(NamedTuple):
    """A command line that was read.

    Args:
        kind: The options dataclass.
        options: What may be given.
        recipe: The recipe, if one is given.
        flags: The values of the flags, over those of the recipe.
        settings: Flags of the command line itself, by `SETTINGS`.
    """

    kind: Any
    options: Mapping[str, Option]
    recipe: Recipe | None
    flags: Mapping[str, Any]
    settings: Mapping[str, Any]

    def values(self) -> dict[str, Any]:
        """The values that recipe and flags give, before they become the options dataclass."""
        return merge_values(self.options, self.recipe, self.flags)

    def make_options(self) -> Any:
        """The options dataclass.

        Raises:
            ConfigError: if something is missing or wrong.
        """
        return make_options(self.kind, self.recipe, self.flags)


class Command(NamedTuple):
    """A subcommand.

    Args:
        function: `module:function`. It takes the options; what it returns, a text or texts one by one, is printed.
        options: `module:class`, the options dataclass whose fields are the flags.
        text: What the command does.
        positional_option: The option that is given by its place. `recipe` stands for the command's own recipe where the
            options have none of this name.
        dry_run: `module:function` that is called in place of the other one with `--dry_run`.
        extra: The package's extra that it needs.
    """

    function: str
    options: str
    text: str
    positional_option: str | None = None
    dry_run: str | None = None
    extra: str = "data"

    def parser(self, name: str, options: Mapping[str, Option]) -> Parser:
        """The parser of this command.

        Args:
            name: The command's.
            options: Of its dataclass.
        """
        place = f"{self.positional_option.upper()} " if self.positional_option else ""
        overrides = " [-- FLAGS OF THE TRAINING]" if REST in options else ""
        usage = f"being-vl {name} {place}[OPTIONS]{overrides}"
        parser = Parser(prog=f"being-vl {name}", usage=usage, description=self.text)
        switches = {
            "-q --quiet": "Log warnings and errors alone.",
            "-v --verbose": "Log more, with times, and where an error comes from.",
        }
        if self.dry_run:
            switches["--dry_run"] = "Check and plan everything, and write nothing."
        if "recipe" not in options:
            self._add_recipe(parser)
            switches["--print_config"] = "Print all options as a recipe, and do nothing."
            switches["--print_schema"] = (
                "Print the JSON schema of such a recipe, for editors, and do nothing."
            )
        for flags, text in switches.items():
            parser.add_argument(*flags.split(), action="store_true", help=text)
        add_flags(parser, options, self.positional_option)
        return parser

    def _add_recipe(self, parser: Parser) -> None:
        """Add the recipe of the command's own options, by its place where that is free."""
        settings: dict[str, Any] = {"default": argparse.SUPPRESS, "help": "YAML file of these options"}
        flag = parser.add_argument("--recipe", metavar="FILE", **settings)
        vars(flag)["hint"] = Path
        if self.positional_option == "recipe":
            flag.help = argparse.SUPPRESS
            settings["help"] += ", or the name of a shipped one"
            vars(parser.add_argument("recipe", nargs="?", metavar="RECIPE", **settings))["hint"] = Path

    def parse(self, name: str, words: list[str]) -> Invocation:
        """Read the words after the command's name.

        Raises:
            ConfigError: if a flag or the recipe is wrong; it says which, what was expected and what was found.
        """
        kind = load(self.options)
        options = read_options(kind)
        overrides: list[str] = []
        if REST in options and "--" in words:
            place = words.index("--")
            words, overrides = words[:place], words[place + 1 :]
        flags = read_flags(self.parser(name, options), options, words)
        if overrides:
            flags[REST] = overrides
        settings = {key: None if key in options else flags.pop(key, None) for key in SETTINGS}
        path = flags.pop("recipe", None) if "recipe" not in options else None
        recipe = Recipe.find(path) if path else None
        if recipe is not None and not settings["print_schema"]:
            _check_kind(recipe, name)
        return Invocation(kind, options, recipe, flags, settings)

    def run(self, name: str, words: list[str]) -> None:
        """Do what the words after the command's name ask for.

        Raises:
            BeingVLError, OSError: if something is wrong with the options, or in the command.
        """
        invocation = self.parse(name, words)
        settings = invocation.settings
        set_verbosity(settings["quiet"], settings["verbose"])
        if settings["print_schema"]:
            print(json.dumps(json_schema(invocation.options, f"recipe of being-vl {name}"), indent=2))
        elif settings["print_config"]:
            print(dump_yaml(dump_values(invocation.options, invocation.values())), end="")
        else:
            function = self.dry_run if self.dry_run and settings["dry_run"] else self.function
            show(load(function)(invocation.make_options()))


def _check_kind(recipe: Recipe, name: str) -> None:
    """Refuse a recipe of a run where one of a training is expected."""
    if name in ("prepare", "check", "train") and recipe.is_run:
        raise ConfigError(
            f"{recipe.path}: is a recipe for `being-vl run`, which does all steps; `being-vl launch` and `plan` take "
            f"it too, but not `{name}`"
        )


def show(report: Any) -> None:
    """Print what a command's function returned, if it is a text, or texts that it yields one by one."""
    if isinstance(report, str):
        print(report)
    elif isinstance(report, Iterator):
        for text in report:
            print(text, flush=True)


def set_verbosity(quiet: bool, verbose: bool) -> None:
    """Log to stderr: warnings alone, or what is done, or that with times and details."""
    if quiet and verbose:
        raise ConfigError("give -q or -v, not both")
    level = logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO
    logging.getLogger("being_vl").setLevel(level)
    if quiet:
        os.environ["TQDM_DISABLE"] = "1"
    if verbose:
        for handler in logging.getLogger().handlers:
            handler.setFormatter(LineFormatter("%(asctime)s %(name)s: %(message)s"))


COMMANDS = {
    "run": Command(
        "being_vl.run:run",
        "being_vl.recipes.options:RunOptions",
        "Do all steps on your own images and records: quantize, learn the vocabulary, expand, train.",
        "recipe",
        dry_run="being_vl.run:dry_run",
        extra="train",
    ),
    "quantize": Command(
        "being_vl.quantizer.job:quantize",
        "being_vl.quantizer.options:QuantizeOptions",
        "Turn images into grids of ids.",
        "images",
    ),
    "grids info": Command(
        "being_vl.quantizer.inspect:info",
        "being_vl.quantizer.options:GridsInfoOptions",
        "Count grids, ids and neighbours.",
        "grids",
    ),
    "grids verify": Command(
        "being_vl.quantizer.inspect:verify",
        "being_vl.quantizer.options:GridsVerifyOptions",
        "Compare grids with the checksums of their manifest.",
        "grids",
    ),
    "grids decode": Command(
        "being_vl.quantizer.inspect:decode",
        "being_vl.quantizer.options:GridsDecodeOptions",
        "Draw grids as a sheet of reconstructions.",
        "grids",
    ),
    "quantizer train": Command(
        "being_vl.quantizer.training.trainer:train_quantizer",
        "being_vl.quantizer.training.options:QuantizerTrainOptions",
        "Train a VQ-GAN on folders of images.",
    ),
    "encode": Command(
        "being_vl.tokenizer.encode:encode_grids",
        "being_vl.tokenizer.options:EncodeOptions",
        "Turn grids into visual BPE tokens.",
        "grids",
    ),
    "vocab train": Command(
        "being_vl.tokenizer.train:train_vocabulary",
        "being_vl.tokenizer.options:VocabularyOptions",
        "Learn a visual BPE vocabulary from grids.",
        "grids",
    ),
    "vocab import": Command(
        "being_vl.tokenizer.inspect:import_vocabulary",
        "being_vl.tokenizer.options:VocabularyImportOptions",
        "Read a vocabulary that Being-VL-0.5 published.",
        "vocabulary",
    ),
    "vocab show": Command(
        "being_vl.tokenizer.inspect:show_vocabulary",
        "being_vl.tokenizer.options:VocabularyShowOptions",
        "Show a vocabulary's options, merges and a token.",
        "vocabulary",
    ),
    "vocab merge-stats": Command(
        "being_vl.tokenizer.inspect:show_merges",
        "being_vl.tokenizer.options:MergeStatsOptions",
        "List all merges with their statistics.",
        "vocabulary",
    ),
    "vocab truncate": Command(
        "being_vl.tokenizer.inspect:truncate_vocabulary",
        "being_vl.tokenizer.options:VocabularyTruncateOptions",
        "Keep the first merges of a vocabulary.",
        "vocabulary",
    ),
    "expand": Command(
        "being_vl.model.expand:expand",
        "being_vl.model.options:ExpandOptions",
        "Add the visual tokens to a causal LM.",
        extra="infer",
    ),
    "prepare": Command(
        "being_vl.data.prepare:prepare",
        "being_vl.data.options:PrepareOptions",
        "Turn records and grids into sequences.",
    ),
    "check": Command(
        "being_vl.training.check:check",
        "being_vl.training.options:CheckOptions",
        "Show what a training will see, before it starts.",
        extra="train",
    ),
    "train": Command(
        "being_vl.training.engine:train",
        "being_vl.training.options:TrainOptions",
        "Train an expanded model in stages, or a plain one on text.",
        dry_run="being_vl.training.engine:plan_training",
        extra="train",
    ),
    "launch": Command(
        "being_vl.launch.launch:launch",
        "being_vl.launch.options:LaunchOptions",
        "Start a training on one or several machines, or print how.",
        "recipe",
        extra="train",
    ),
    "plan": Command(
        "being_vl.estimate.plan:plan",
        "being_vl.estimate.options:PlanOptions",
        "Say what a training takes: memory, disk, operations, hours.",
        "recipe",
        extra="train",
    ),
    "generate": Command(
        "being_vl.model.assistant:generate",
        "being_vl.model.options:GenerateOptions",
        "Ask a trained model about images.",
        extra="infer",
    ),
    "demo": Command(
        "being_vl.demo.demo:demo",
        "being_vl.demo.options:DemoOptions",
        "Run the whole chain on built-in data, on a CPU.",
        extra="train",
    ),
    "completion": Command(
        "being_vl.completion:completion",
        "being_vl.completion:CompletionOptions",
        "Print a script that completes commands and flags in a shell.",
        "shell",
    ),
}
GROUPS = {
    "grids": "Look at grids.",
    "quantizer": "Work on quantizers.",
    "vocab": "Work on visual BPE vocabularies.",
}


def build_parser() -> Parser:
    """The parser of the whole command line, with those of all commands; for completion and for the reference."""
    parser = Parser(prog="being-vl", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"being-vl {version('being-vl')}")
    subcommands = parser.add_subparsers(metavar="COMMAND", parser_class=Parser)
    groups: dict[str, Any] = {}
    for name, command in COMMANDS.items():
        group, _, last_word = name.rpartition(" ")
        place = subcommands
        if group:
            if group not in groups:
                child = subcommands.add_parser(group, help=GROUPS[group], description=GROUPS[group])
                groups[group] = child.add_subparsers(metavar="COMMAND", parser_class=Parser)
            place = groups[group]
        template = command.parser(name, read_options(load(command.options)))
        place.add_parser(
            last_word, help=command.text, description=command.text, parents=[template], add_help=False
        )
    return parser


def describe_commands(group: str = "") -> str:
    """The help of `being-vl`, or of one of its groups of commands, without any of their options."""
    prefix = f"{group} " if group else ""
    commands = {name: command.text for name, command in COMMANDS.items() if name.startswith(prefix)}
    lines = [
        f"usage: being-vl {prefix}COMMAND [OPTIONS]",
        "",
        GROUPS.get(group, DESCRIPTION),
        "",
        "commands:",
    ]
    lines += [f"  {name:<20}{text}" for name, text in commands.items()]
    lines += ["", "options:", "  -h, --help          Show this, or with a command its options."]
    if not group:
        lines.append("  --version           Show the version.")
    return "\n".join(lines)
