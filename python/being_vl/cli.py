"""The command `being-vl`: a subcommand for each step, each with a recipe (YAML) and flags that override it."""

import logging
import os
import re
import sys
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse import Namespace

from being_vl.data.options import PrepareOptions
from being_vl.demo.options import DemoOptions
from being_vl.errors import BeingVLError, ConfigError
from being_vl.files import to_jsonable, write_json
from being_vl.flags import REST, Parser, add_flags
from being_vl.launch.launch import LaunchOptions
from being_vl.model.options import ExpandOptions, GenerateOptions
from being_vl.quantize.options import (
    GridsDecodeOptions,
    GridsInfoOptions,
    GridsVerifyOptions,
    QuantizeOptions,
)
from being_vl.quantize.training.options import QuantizerTrainOptions
from being_vl.recipes import find_recipe
from being_vl.run import is_run, model_of, recipe_parser, training_of
from being_vl.tokenizer.options import (
    EncodeOptions,
    MergeStatsOptions,
    VocabularyImportOptions,
    VocabularyOptions,
    VocabularyShowOptions,
    VocabularyTruncateOptions,
)
from being_vl.train.options import CheckOptions, PlanOptions, TrainOptions


def _quantize(options: QuantizeOptions) -> None:
    from being_vl.quantize.job import quantize

    quantize(options)


def _grids_info(options: GridsInfoOptions) -> None:
    from being_vl.quantize.inspect import info

    print(info(options))


def _grids_verify(options: GridsVerifyOptions) -> None:
    from being_vl.quantize.inspect import verify

    print(verify(options))


def _grids_decode(options: GridsDecodeOptions) -> None:
    from being_vl.quantize.inspect import decode

    print(decode(options))


def _train_quantizer(options: QuantizerTrainOptions) -> None:
    from being_vl.quantize.training.trainer import train_quantizer

    train_quantizer(options)


def _train_vocabulary(options: VocabularyOptions) -> None:
    from being_vl.tokenizer.train import train_vocabulary

    train_vocabulary(options)


def _encode(options: EncodeOptions) -> None:
    from being_vl.tokenizer.encode import encode_grids

    encode_grids(options)


def _import_vocabulary(options: VocabularyImportOptions) -> None:
    from being_vl.tokenizer.inspect import import_vocabulary

    import_vocabulary(options)


def _show(options: VocabularyShowOptions) -> None:
    from being_vl.tokenizer.inspect import show_vocabulary

    print(show_vocabulary(options))


def _merge_stats(options: MergeStatsOptions) -> None:
    from being_vl.tokenizer.inspect import show_merges

    print(show_merges(options))


def _truncate(options: VocabularyTruncateOptions) -> None:
    from being_vl.tokenizer.inspect import truncate_vocabulary

    truncate_vocabulary(options)


def _expand(options: ExpandOptions) -> None:
    from being_vl.model.expand import expand

    expand(options)


def _prepare(options: PrepareOptions) -> None:
    from being_vl.data.prepare import prepare

    prepare(options)


def _check(options: CheckOptions) -> None:
    from being_vl.train.check import check

    check(options, print)


def _train(options: TrainOptions) -> None:
    from being_vl.train.engine import train

    train(options)


def _launch(options: LaunchOptions) -> None:
    from being_vl.launch.launch import launch

    training, flags = training_of(options.recipe, options.overrides)
    if is_run(find_recipe(options.recipe)):
        if not (training.model / "config.json").is_file():
            raise ConfigError(
                f"{training.model}: there is no model yet; `being-vl run {options.recipe} --until expand` makes it"
            )
        write_json(Path(flags[1]), to_jsonable(training))
    launch(options, training, flags, print)


def _plan(options: PlanOptions) -> None:
    from being_vl.estimate.estimate import plan_recipe

    training, _ = training_of(options.recipe, options.overrides)
    print(plan_recipe(options, training, *model_of(options.recipe, options.overrides)))


def _generate(options: GenerateOptions) -> None:
    from being_vl.model.assistant import generate

    for answer in generate(options):
        print(answer)


def _demo(options: DemoOptions) -> None:
    from being_vl.demo.demo import demo

    demo(options)


def _run(config: Namespace) -> None:
    from being_vl.run import run

    run(config)


class Command(NamedTuple):
    """A subcommand whose flags are the fields of an options dataclass; `positional` is given by its place."""

    function: Callable[[Any], None]
    options: Any
    text: str
    positional: str | None = None

    def parser(self) -> Parser:
        """Flags of this command, and `--recipe`, unless the command is about a recipe."""
        parser = Parser(description=self.text)
        if self.positional != "recipe":
            parser.add_argument(
                "--recipe", action="config", help="YAML file of these options; flags override it."
            )
        add_flags(parser, self.options, self.positional)
        return parser

    def __call__(self, config: Namespace, rest: list[str]) -> None:
        """Run with what its parser parsed, and what stood behind `--`."""
        values = vars(self.parser().instantiate(config))
        if self.positional != "recipe":
            values.pop("recipe", None)
        if rest:
            values[REST] = rest
        self.function(self.options(**values))


COMMANDS = {
    "quantize": Command(_quantize, QuantizeOptions, "Turn images into grids of ids.", "images"),
    "grids info": Command(_grids_info, GridsInfoOptions, "Count grids, ids and neighbours.", "grids"),
    "grids verify": Command(
        _grids_verify, GridsVerifyOptions, "Compare grids with the checksums of their manifest.", "grids"
    ),
    "grids decode": Command(
        _grids_decode, GridsDecodeOptions, "Draw grids as a sheet of reconstructions.", "grids"
    ),
    "quantizer train": Command(
        _train_quantizer, QuantizerTrainOptions, "Train a VQ-GAN on a folder of images."
    ),
    "encode": Command(_encode, EncodeOptions, "Turn grids into visual BPE tokens.", "grids"),
    "vocab train": Command(
        _train_vocabulary, VocabularyOptions, "Learn a visual BPE vocabulary from grids.", "grids"
    ),
    "vocab import": Command(
        _import_vocabulary,
        VocabularyImportOptions,
        "Read a vocabulary that Being-VL-0.5 published.",
        "vocabulary",
    ),
    "vocab show": Command(
        _show, VocabularyShowOptions, "Show a vocabulary's options, merges and a token.", "vocabulary"
    ),
    "vocab merge-stats": Command(
        _merge_stats, MergeStatsOptions, "List all merges with their statistics.", "vocabulary"
    ),
    "vocab truncate": Command(
        _truncate, VocabularyTruncateOptions, "Keep the first merges of a vocabulary.", "vocabulary"
    ),
    "expand": Command(_expand, ExpandOptions, "Add the visual tokens to a causal LM."),
    "prepare": Command(_prepare, PrepareOptions, "Turn records and grids into tokenised records."),
    "check": Command(_check, CheckOptions, "Show what a training will see, before it starts."),
    "train": Command(_train, TrainOptions, "Train an expanded model in stages, or a plain one on text."),
    "launch": Command(
        _launch, LaunchOptions, "Start a training on one or several machines, or print how.", "recipe"
    ),
    "plan": Command(
        _plan, PlanOptions, "Say what a training takes: memory, disk, operations, hours.", "recipe"
    ),
    "generate": Command(_generate, GenerateOptions, "Ask a trained model about images."),
    "demo": Command(_demo, DemoOptions, "Run the whole chain on built-in data, on a CPU."),
}
GROUPS = {
    "grids": "Look at grids.",
    "quantizer": "Work on quantizers.",
    "vocab": "Work on visual BPE vocabularies.",
}


@cache
def build_parser() -> Parser:
    """The parser of the whole command line."""
    parser = Parser(prog="being-vl", version=version("being-vl"), description=__doc__)
    commands = parser.add_subcommands()
    commands.add_subcommand(
        "run", recipe_parser(), help="Do all steps on your own images and records: run RECIPE."
    )
    groups = {}
    for name, text in GROUPS.items():
        group = Parser(description=text)
        commands.add_subcommand(name, group, help=text)
        groups[name] = group.add_subcommands()
    for name, command in COMMANDS.items():
        group_name, _, last = name.rpartition(" ")
        (groups[group_name] if group_name else commands).add_subcommand(
            last, command.parser(), help=command.text
        )
    return parser


def _with_underscores(word: str) -> str:
    """A flag's name as its field has it: `--gpus-per-node` is `--gpus_per_node`."""
    return re.sub(r"^--[\w.-]+", lambda name: "--" + name[0][2:].replace("-", "_"), word)


def _split_recipe(word: str) -> list[str]:
    return word.split("=", 1) if word.startswith("--recipe=") else [word]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 (missing extra), 2 (bad input), 130 (Ctrl-C)."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("being_vl").setLevel(logging.INFO)
    # Others' bars and warnings that say nothing to our users; before the libraries are imported.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator" not in record.getMessage())
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    rest: list[str] = []
    if arguments[:1] in (["launch"], ["plan"]) and "--" in arguments:
        place = arguments.index("--")
        arguments, rest = arguments[:place], arguments[place + 1 :]
    arguments, rest = ([_with_underscores(word) for word in words] for words in (arguments, rest))
    arguments = [part for word in arguments for part in _split_recipe(word)]
    if arguments in ([], *([group] for group in GROUPS)):
        arguments.append("--help")
    if arguments[:1] == ["run"] and len(arguments) > 1 and not arguments[1].startswith("-"):
        arguments.insert(1, "--recipe")
    try:
        for place, word in enumerate(arguments[:-1]):
            if word == "--recipe":
                recipe = find_recipe(arguments[place + 1])
                if arguments[0] in ("prepare", "check", "train") and is_run(recipe):
                    raise ConfigError(
                        f"{arguments[place + 1]}: is a recipe for `being-vl run`, which does all steps; "
                        f"`being-vl launch` and `plan` take it too, but not `{arguments[0]}`"
                    )
                arguments[place + 1] = str(recipe)
        name = next((n for n in ("run", *COMMANDS) if arguments[: len(n.split())] == n.split()), None)
        if name is None:
            build_parser().parse_args(arguments)  # shows help or the version, or says what is wrong
            return 0
        parser = recipe_parser() if name == "run" else COMMANDS[name].parser()
        parser.prog = f"being-vl {name}"
        config = parser.parse_args(arguments[len(name.split()) :])
        if name == "run":
            _run(config)
        else:
            COMMANDS[name](config, rest)
    except KeyboardInterrupt:
        print("being-vl: stopped", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("being_vl"):
            raise
        extra = "ray" if error.name == "ray" else "train"
        print(f"being-vl: needs {error.name}: pip install 'being-vl[{extra}]'", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of what we print, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (BeingVLError, OSError) as error:
        print(f"being-vl: error: {error}", file=sys.stderr)
        return 2
    return 0
