"""Options dataclasses as flags of the command line."""

import dataclasses
import re
from argparse import ArgumentError
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from docstring_parser import parse
from jsonargparse import ActionYesNo, ArgumentParser

from being_vl.errors import ConfigError
from being_vl.recipes import read_recipe

REST = "overrides"
"""Name of a field that takes what stands behind `--`: flags for what the command starts."""

PHRASES = {
    r"<class '(?:\w+\.)*(\w+)'>": r"\1",
    r'Parser key "(.+?)":': r"\1:",
    r"Not of type Path: .*, not NoneType": "is required",
    r"Not of type Path: .*, not (\w+)": r"expected a path, found \1",
    r"Does not validate .* Subtypes: \[(.*?)(?:, NoneType)?\] .* Given value: ": r"expected \1, found ",
    r"Expected an? (.*?)\. Got value: ": r"expected \1, found ",
    r"typing\.Literal\[(.*?)\]": r"one of \1",
}
"""What jsonargparse says about values, and how we say it."""


class Parser(ArgumentParser):
    """A parser that answers bad flags and recipes by a `ConfigError` of one line, not by all its flags and an exit."""

    def parse_args(self, args: Any = None, *more: Any, **named: Any) -> Any:
        recipe = _recipe_of(args)
        content = read_recipe(Path(recipe)) if recipe else {}
        # jsonargparse would take the letters of a string, and not say which option.
        for action in self._actions:
            value = _value_at(content, action.dest)
            if action.nargs == "+" and not isinstance(value, list | None):
                raise ConfigError(f"{recipe}: {action.dest}: expected list, found {value}")
        return super().parse_args(args, *more, **named)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        words = getattr(self, "args", None) or []
        recipe, flags = _recipe_of(words), {word.partition("=")[0] for word in words}
        key = re.match(r'Parser key "(.+?)"', message)
        by_flag = ex is None or isinstance(ex, ArgumentError) or (key is not None and f"--{key[1]}" in flags)
        line = " ".join(message.split())
        for theirs, ours in PHRASES.items():
            line = re.sub(theirs, ours, line)
        if recipe and not by_flag and key is not None:
            line = _number_item(line, key[1], read_recipe(Path(recipe)))
        raise ConfigError(f"{recipe}: {line}" if recipe and not by_flag else line) from ex


def _number_item(line: str, key: str, recipe: Any) -> str:
    """Say which item of a recipe's list of mappings a line is about, as `stages[1]`, if one alone can be meant."""
    items = _value_at(recipe, key)
    said = re.match(rf"{re.escape(key)}: (?:Option '(\w+)'|(\w+): .*?found (.*))", line)
    if not said or not isinstance(items, list):
        return line
    name, value = said[1] or said[2], said[3]
    meant = [
        number
        for number, item in enumerate(items)
        if isinstance(item, dict) and name in item and (value is None or str(item[name]) == value)
    ]
    return line.replace(key, f"{key}[{meant[0]}]", 1) if len(meant) == 1 else line


def _value_at(recipe: Any, key: str) -> Any:
    """The value of `outer.inner` in a recipe's content, None if there is none."""
    for part in key.split("."):
        recipe = recipe.get(part) if isinstance(recipe, dict) else None
    return recipe


def _recipe_of(words: list[str]) -> str | None:
    return next((after for word, after in pairwise(words) if word == "--recipe"), None)


def add_flags(parser: ArgumentParser, options: Any, positional: str | None = None) -> None:
    """Add a flag for each field of an options dataclass, `--outer.inner` for the fields of nested ones.

    Lists of strings and paths take several values, `--image a.png b.png`; `--flag` alone sets a bool, and so does
    `--flag true`; a field's metadata may give a flag another name, its `alias`; everything else is as jsonargparse has
    it.

    Args:
        parser: What the flags are added to.
        options: The dataclass.
        positional: A field that is given by its place.
    """
    _add_fields(parser, options, "", positional)


def _add_fields(parser: ArgumentParser, options: Any, owner: str, positional: str | None = None) -> None:
    """Add the fields of a dataclass, whose flags begin with the name of its owner, such as `checkpoint`."""
    docs = [parse(kind.__doc__ or "") for kind in options.__mro__]
    help_of = {parameter.arg_name: parameter.description for doc in docs for parameter in doc.params}
    skipped = set()
    nested: list[tuple[Any, str]] = []
    for field in dataclasses.fields(options):
        text = help_of[field.name]
        name = f"{owner}.{field.name}" if owner else field.name
        is_list = field.type in (list[str], list[Path])
        if field.name == REST:
            pass
        elif dataclasses.is_dataclass(field.type):
            nested.append((field.type, name))
        elif name == positional:
            parser.add_argument(name, type=Path, nargs="+" if is_list else None, help=text)
        elif is_list:
            make = field.default_factory
            required = make is dataclasses.MISSING
            item = str if field.type == list[str] else Path
            default = None if make is dataclasses.MISSING else make()
            parser.add_argument(
                f"--{name}", type=item, nargs="+", required=required, default=default, help=text
            )
        elif field.type is bool:
            parser.add_argument(f"--{name}", nargs="?", action=ActionYesNo, default=field.default, help=text)
        elif alias := field.metadata.get("alias"):
            parser.add_argument(f"--{name}", alias, type=field.type, default=field.default, help=text)
        else:
            continue
        skipped.add(field.name)
    parser.add_class_arguments(options, owner or None, skip=skipped)
    for kind, name in nested:
        _add_fields(parser, kind, name)
