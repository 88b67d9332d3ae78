"""A hook of mkdocs: `guide/commands.md` is made from the parsers of the command line, so it cannot be out of date.

`python docs/hooks.py` prints the page.
"""

import argparse
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from docstring_parser import parse

PAGE = "guide/commands.md"
HEAD = """# Commands

Made from the command line's own parsers. Each command takes `--recipe FILE`, a YAML file of its options, and flags
override it. Flags may be written with dashes. An option of a section is reached by a point, `--checkpoint.every 500`,
or written as YAML in the recipe. `being-vl COMMAND --help` prints the same.

"""
GENERAL = ("help", "print_config", "print_shtab", "print_schema")
"""Flags that every command has."""
SECTIONS = {
    "quantizer_training": "quantizer train",
    "quantize": "quantize",
    "vocab": "vocab train",
    "expand": "expand",
    "train": "train",
}
"""Sections of `being-vl run` and the commands whose options they hold."""


def on_files(files: Any, config: Any) -> Any:
    """Add the page to those of the site."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, PAGE, content=command_reference()))
    return files


def command_reference() -> str:
    """All commands with their options, as a page of Markdown."""
    from being_vl.cli import build_parser
    from being_vl.train.options import LoraOptions, StageOptions

    sections = {name: section(name, text, parser) for name, text, parser in commands(build_parser())}
    sections["train"] += "\n".join(
        [fields("A stage", StageOptions), fields("Adapters of a stage", LoraOptions)]
    )
    return HEAD + "\n".join(sections.values())


def commands(parser: Any, group: str = "") -> Iterator[tuple[str, str, Any]]:
    """Name, description and parser of each command; those of a group, such as `vocab train`, in their place."""
    for action in parser._actions:
        if not isinstance(action, argparse._SubParsersAction):
            continue
        texts = {choice.dest: choice.help or "" for choice in action._choices_actions}
        for name, child in action.choices.items():
            if any(isinstance(part, argparse._SubParsersAction) for part in child._actions):
                yield from commands(child, f"{group}{name} ")
            else:
                yield group + name, texts.get(name, ""), child


def section(name: str, text: str, parser: Any) -> str:
    """One command: its description, its usage and a table of its options."""
    arguments = [action.dest.upper() for action in parser._actions if not action.option_strings]
    lines = [f"## being-vl {name} {{ #{anchor(name)} }}", "", plain(text), ""]
    lines += ["```text", " ".join(["being-vl", name, *arguments, "[options]"]), "```", ""]
    lines += ["| option | default | |", "|---|---|---|"]
    lines += [option_row(action, parser) for action in parser._actions if is_shown(action, name)]
    if name == "run":
        links = [
            f"`--{part}.…` as of [`{command}`](#{anchor(command)})" for part, command in SECTIONS.items()
        ]
        lines += ["", "Each step has a section of its own options: " + ", ".join(links) + "."]
    return "\n".join([*lines, ""])


def is_shown(action: argparse.Action, command: str) -> bool:
    """Whether an option has a row: not if it is hidden, general, follows from others, or is of a step of a run."""
    named = not action.option_strings or any(flag.startswith("--") for flag in action.option_strings)
    hidden = action.help == argparse.SUPPRESS or (action.help or "").startswith(
        "Path to a configuration file"
    )
    general = action.dest.rpartition(".")[2] in GENERAL or any(
        flag.endswith(".help") for flag in action.option_strings
    )
    of_step = command == "run" and action.dest.partition(".")[0] in SECTIONS
    return named and not (hidden or general or of_step)


def option_row(action: argparse.Action, parser: Any) -> str:
    """A row of the table: flag or argument, default, help."""
    names = [flag for flag in action.option_strings if flag.startswith("--") and not flag.endswith("+")]
    names = [flag for flag in names if not re.match(r"--(\w+\.)*no_", flag)] or names
    words = ", ".join(f"`{name}`" for name in names) or f"`{action.dest.upper()}`"
    return f"| {words} | {default_of(action, parser)} | {plain(action.help or '')} |"


def default_of(action: argparse.Action, parser: Any) -> str:
    """A default as YAML has it; nothing for None, and a word for what must be given."""
    value = action.default
    if action.required or not action.option_strings or action.dest in getattr(parser, "required_args", ()):
        return "*required*"
    if value is None or value == argparse.SUPPRESS or len(str(value)) > 40 or value == []:
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def fields(title: str, options: Any) -> str:
    """A table of an options dataclass that has no flags of its own, such as a stage's."""
    texts = {parameter.arg_name: parameter.description or "" for parameter in parse(options.__doc__).params}
    lines = [f"### {title} {{ #{anchor(options.__name__)} }}", "", "| key | default | |", "|---|---|---|"]
    for field in dataclasses.fields(options):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        value = "" if field.default in (dataclasses.MISSING, None) else f"`{field.default}`"
        lines.append(
            f"| `{field.name}` | {'*required*' if required else value} | {plain(texts[field.name])} |"
        )
    return "\n".join([*lines, ""])


def anchor(name: str) -> str:
    """The part of an address behind `#`."""
    return name.replace(" ", "-").lower()


def plain(text: str) -> str:
    """A help text as one line of a table, with `|` kept apart from the table's."""
    return " ".join(text.split()).replace("%%", "%").replace("|", "\\|")


if __name__ == "__main__":
    print(command_reference())
