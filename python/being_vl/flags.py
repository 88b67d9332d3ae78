"""Options as flags of the command line."""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

import yaml

from being_vl.errors import ConfigError
from being_vl.options import find_shorthand
from being_vl.schema import NO_DEFAULT, Option, convert, show_value, unknown_option, walk
from being_vl.yaml_text import parse_yaml

REST = "overrides"
"""Name of a field that takes what stands behind `--`: flags for what the command starts."""

BOOLEAN_WORDS = ("true", "yes", "on", "false", "no", "off")
"""What YAML takes for a bool."""


class Parser(argparse.ArgumentParser):
    """A parser that answers wrong flags by a `ConfigError` of one line, not by its usage and an exit."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))


def add_flags(parser: Parser, options: Mapping[str, Option], positional_option: str | None = None) -> None:
    """Add a flag for each option; those of nested options are `--outer.inner`, in a group of their own.

    Each action has the type of its option as `hint`.

    Args:
        parser: What the flags are added to.
        options: As `read_options` returns them.
        positional_option: The option that is given by its place.
    """
    for name, option in options.items():
        if option.options is not None:
            group = parser.add_argument_group(name, option.help or None)
            for leaf_name, leaf in walk(option.options, f"{name}."):
                _add_flag(group, leaf_name, leaf)
        elif name == positional_option:
            nargs = "*" if get_origin(option.hint) is list else "?"
            text = option.help.replace("%", "%%")
            action = parser.add_argument(
                name, nargs=nargs, default=argparse.SUPPRESS, help=text, metavar=name.upper()
            )
            vars(action)["hint"] = option.hint
        elif name != REST:
            _add_flag(parser, name, option)


def _add_flag(container: Any, name: str, option: Option) -> None:
    """Add one flag. All values stay words here; `read_flags` converts them."""
    kinds = [kind for kind in list_alternatives(option.hint) if kind is not NoneType]
    text = option.help
    if option.default is NO_DEFAULT:
        text += " (required)"
    elif option.default not in (None, "", [], {}):
        text += f" (default: {_show_default(option.default)})"
    settings: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text.replace("%", "%%"), "dest": name}
    if _takes_several(option.hint):
        settings["nargs"] = "+"
    if len(kinds) == 1 and get_origin(kinds[0]) is Literal:
        settings["metavar"] = "{" + ",".join(map(str, get_args(kinds[0]))) + "}"
    else:
        settings["metavar"] = "|".join(dict.fromkeys(_name_value(kind) for kind in kinds))
    action = container.add_argument(f"--{name}", *([option.alias] if option.alias else []), **settings)
    action.hint = option.hint


def list_alternatives(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the type itself."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _takes_several(hint: Any) -> bool:
    """Whether a flag takes several words: lists of what is written as one word, and tuples."""
    scalar_types = (str, Path, int, float)
    return any(
        get_origin(kind) is tuple
        or (
            get_origin(kind) is list
            and (get_args(kind)[0] in scalar_types or find_shorthand(get_args(kind)[0]) is not None)
        )
        for kind in list_alternatives(hint)
    ) and not any(kind in scalar_types for kind in list_alternatives(hint))


def _name_value(kind: Any) -> str:
    """What a help calls a value of a type."""
    names = {bool: "true|false", int: "N", float: "X", str: "TEXT", Path: "PATH"}
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    if get_origin(kind) in (list, tuple):
        item = get_args(kind)[0]
        return "PATH|YAML" if find_shorthand(item) else names.get(item, "YAML")
    return names.get(kind, "YAML")


def _show_default(value: Any) -> str:
    """A default for a help; long ones, such as the stages, only by their names."""
    if isinstance(value, list | tuple):
        return " ".join(str(getattr(item, "name", item)) for item in value)
    return str(value) if isinstance(value, str | Path) else show_value(value)


def read_flags(parser: Parser, options: Mapping[str, Option], words: list[str]) -> dict[str, Any]:
    """Parse the words of a command line.

    Args:
        parser: With the flags of `options`, and possibly others.
        options: As `read_options` returns them.
        words: Such as `--checkpoint.every 3`; dashes in a name are the same as underscores.

    Returns:
        Name → value as `check_values` returns them, and of the parser's other flags what it parsed.

    Raises:
        ConfigError: that names the flag, what was expected and what was found.
    """
    leaves = dict(walk(options))
    namespace, strays = parser.parse_known_args(_join_boolean_words(words, leaves))
    for word in strays:
        if word.startswith("--"):
            message = unknown_option(word[2:].partition("=")[0], options)
            raise ConfigError("--" + message.replace("did you mean ", "did you mean --"))
        raise ConfigError(f"{show_value(word)}: nothing was expected here")
    values: dict[str, Any] = {}
    for name, value in vars(namespace).items():
        if name not in leaves:
            values[name] = value
        elif value != []:  # what argparse gives for a list by its place that is not there
            *owners, option_name = name.split(".")
            section = values
            for owner in owners:
                section = section.setdefault(owner, {})
            section[option_name] = _convert_words(value, leaves[name].hint, f"--{name}")
    return values


def to_underscores(word: str) -> str:
    """A flag's name as its field has it: `--gpus-per-node` is `--gpus_per_node`."""
    return re.sub(r"^--[\w.-]+", lambda name: "--" + name[0][2:].replace("-", "_"), word)


def _join_boolean_words(words: list[str], leaves: Mapping[str, Option]) -> list[str]:
    """`--flag true` as one word, and a bare `--flag` too, so that the next word is not taken for its value."""
    result: list[str] = []
    queue = [to_underscores(word) for word in words]
    while queue:
        word = queue.pop(0)
        option = leaves.get(word.removeprefix("--")) if word.startswith("--") else None
        if option is not None and bool in list_alternatives(option.hint):
            truth = queue.pop(0) if queue and queue[0].lower() in (*BOOLEAN_WORDS, "null") else "true"
            word = f"{word}={truth}"
        result.append(word)
    return result


def _convert_words(words: str | list[str], hint: Any, key: str) -> Any:
    """The value that a flag's word or words stand for."""
    kinds = list_alternatives(hint)
    if isinstance(words, str):
        return convert(_read_word(words, kinds), hint, key)
    item = get_args(next(kind for kind in kinds if kind is not NoneType))[0]
    if len(words) == 1 and words[0].startswith("[") and item not in (str, Path) and not find_shorthand(item):
        return convert(parse_yaml(words[0]), hint, key)
    return convert([_read_word(word, (item,)) for word in words], hint, key)


def _read_word(word: str, kinds: tuple[Any, ...]) -> Any:
    """A word as it is where text or a path is expected, else as YAML reads it."""
    if NoneType in kinds and word == "null":
        return None
    texts = [kind for kind in kinds if kind in (str, Path)]
    if any(map(find_shorthand, kinds)) and not word.startswith("{"):
        return word
    if texts or any(get_origin(kind) is Literal and word in get_args(kind) for kind in kinds):
        return word
    if not word.strip():  # not null, as in YAML: a shell's variable that is empty
        return word
    try:
        return parse_yaml(word)
    except yaml.YAMLError:
        return word
