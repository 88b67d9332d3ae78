"""Options dataclasses as recipes and flags see them: values checked against their types, in our words; JSON schema."""

import dataclasses
import difflib
import inspect
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import NoneType, SimpleNamespace, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from being_vl.errors import ConfigError
from being_vl.files import to_jsonable
from being_vl.options import find_shorthand

NO_DEFAULT = object()
"""Default of an option that has none."""

LINKS = "links"
"""Metadata of a field that is an options dataclass: name of an option in it → function that computes it from the
options beside the field. Such an option cannot be given."""
FALLBACKS = "fallbacks"
"""Metadata of a field that is an options dataclass: names of options in it that, where they are not given, have the
value of the option of this name beside the field, unless that is None."""


class Option(NamedTuple):
    """An option that a recipe or a flag may give.

    Args:
        hint: Its type.
        default: Its value where nothing gives it; `NO_DEFAULT` if something must.
        help: What it does.
        alias: Another flag for it.
        options: The options in it by their names, if it is an options dataclass of its own.
        links: Names of those in it that follow from other options.
    """

    hint: Any
    default: Any
    help: str
    alias: str | None = None
    options: "Mapping[str, Option] | None" = None
    links: frozenset[str] = frozenset()


def read_options(kind: Any, links: frozenset[str] = frozenset()) -> dict[str, Option]:
    """The options of a dataclass by name, without those that follow from others."""
    hints, texts = get_type_hints(kind), _read_help(kind)
    options = {}
    for field in dataclasses.fields(kind):
        if field.name in links:
            continue
        hint = hints[field.name]
        default = NO_DEFAULT
        if field.default is not dataclasses.MISSING:
            default = field.default
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        section, section_links = None, frozenset(field.metadata.get(LINKS, ()))
        if dataclasses.is_dataclass(hint):
            section = _read_section(hint, default, section_links, field.metadata.get(FALLBACKS, ()))
        alias = field.metadata.get("alias")
        help_text = texts.get(field.name, "")
        options[field.name] = Option(hint, default, help_text, alias, section, section_links)
    return options


def _read_section(
    kind: Any, default: Any, links: frozenset[str], fallbacks: Iterable[str]
) -> dict[str, Option]:
    """The options of a dataclass that is an option itself; their defaults are those of its default."""
    options = read_options(kind, links)
    if default is not NO_DEFAULT:
        return {name: option._replace(default=getattr(default, name)) for name, option in options.items()}
    for name in fallbacks:
        if name in options:
            options[name] = options[name]._replace(default=None)
    return options


def _read_help(kind: Any) -> dict[str, str]:
    """What the `Args:` of a class and its bases say about each name."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        args_text = inspect.cleandoc(base.__doc__ or "").partition("\nArgs:\n")[2]
        for entry in re.split(r"\n(?=    \S)", args_text.split("\n\n")[0]):
            name, colon, text = entry.strip().partition(":")
            if colon and name.isidentifier():
                texts[name] = " ".join(text.split())
    return texts


def walk(options: Mapping[str, Option], prefix: str = "") -> Iterator[tuple[str, Option]]:
    """Name, with dots, and option, of all options that hold no others."""
    for name, option in options.items():
        if option.options is None:
            yield prefix + name, option
        else:
            yield from walk(option.options, f"{prefix}{name}.")


def check_values(
    content: Any, options: Mapping[str, Option], key: str = "", links: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """Check names and types of the values of a recipe; none is required yet.

    Args:
        content: What the recipe holds, or its part `key`.
        options: What may be in it.
        key: Name of the part, with dots.
        links: Names that follow from other options.

    Returns:
        Name → value as the options dataclass takes it; those of nested options as a mapping.

    Raises:
        ConfigError: that names the key, what was expected and what was found.
    """
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise ConfigError(
            f"{key}{': ' if key else ''}expected options, `name: value`, found {show_value(content)}"
        )
    values = {}
    for name, value in content.items():
        path = f"{key}.{name}" if key else str(name)
        if name in links:
            raise ConfigError(f"{path}: follows from other options, and cannot be given")
        if name not in options:
            raise ConfigError(unknown_option(path, options, key))
        option = options[name]
        if option.options is None:
            values[name] = convert(value, option.hint, path)
        else:
            values[name] = check_values(value, option.options, path, option.links)
    return values


def unknown_option(path: str, options: Mapping[str, Option], prefix: str = "") -> str:
    """The message for a name that no option has, with the likeliest one that was meant."""
    nested_names = [name for name, _ in walk(options) if name not in options]
    names = [f"{prefix}.{name}" if prefix else name for name in (*options, *nested_names)]
    names_by_last_word = {name.rpartition(".")[2]: name for name in reversed(names)}
    matches = difflib.get_close_matches(path.rpartition(".")[2], names_by_last_word, n=1, cutoff=0.7)
    meant = names_by_last_word[matches[0]] if matches else ""
    if meant == path:
        return f"{path}: there is no such flag; give the value by its place, without one"
    return f"{path}: there is no such option" + (f"; did you mean {meant}?" if meant else "")


def convert(value: Any, hint: Any, key: str) -> Any:
    """A value as its type has it: paths from strings, floats from whole numbers, dataclasses from mappings.

    Args:
        value: What YAML gives.
        hint: A type: bool, int, float, str, Path, Literal, list, tuple, dict with names as keys, an options
            dataclass, or a union of these.
        key: What an error calls it.

    Raises:
        ConfigError: if it is of another type.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if origin in (Union, UnionType):
        return _convert_union(value, hint, key)
    if isinstance(value, str) and "\0" in value:
        raise ConfigError(
            f"{key}: expected {name_type(hint)}, found {show_value(value)}, with a NUL character"
        )
    if hint is Any or (hint in (bool, str, NoneType) and isinstance(value, hint)):
        return value
    if origin is Literal and any(value == choice and type(value) is type(choice) for choice in arguments):
        return value
    if hint is int and number and isinstance(value, int):
        return value
    if hint is float and number and _is_finite(value):
        return float(value)
    if hint is Path and isinstance(value, str | os.PathLike) and str(value):
        return Path(value)
    if hint == list[Path] and isinstance(value, str | os.PathLike):
        return [convert(value, Path, key)]
    if origin is list and isinstance(value, list | tuple):
        if dataclasses.is_dataclass(arguments[0]):  # wrong names in any come before what one of them lacks
            options = read_options(arguments[0])
            for index, item in enumerate(value):
                if isinstance(item, Mapping) or not find_shorthand(arguments[0]):
                    check_values(item, options, f"{key}[{index}]")
        return [convert(item, arguments[0], f"{key}[{index}]") for index, item in enumerate(value)]
    if origin is tuple and isinstance(value, list | tuple) and len(value) == len(arguments):
        pairs = enumerate(zip(value, arguments, strict=True))
        return tuple(convert(item, kind, f"{key}[{index}]") for index, (item, kind) in pairs)
    if origin is dict and isinstance(value, Mapping):
        return {
            convert(name, arguments[0], key): convert(item, arguments[1], f"{key}.{name}")
            for name, item in value.items()
        }
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return build_options(hint, check_values(value, read_options(hint), key), key)
    if shorthand := find_shorthand(hint):
        return build_options(hint, {shorthand: convert(value, get_type_hints(hint)[shorthand], key)}, key)
    quotes = "; put it in quotes" if hint in (str, Path) and _is_scalar(value) else ""
    raise ConfigError(f"{key}: expected {name_type(hint)}, found {show_value(value)}{quotes}")


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


def _is_scalar(value: Any) -> bool:
    """Whether YAML made a number, a date or a truth value of a word."""
    return value is not None and not isinstance(value, str | list | Mapping)


def _convert_union(value: Any, hint: Any, key: str) -> Any:
    """The value as the first of a union's types that takes it."""
    errors = []
    for kind in get_args(hint):
        try:
            return convert(value, kind, key)
        except ConfigError as error:
            shape = get_origin(kind) or kind
            takes_mapping = shape is dict or dataclasses.is_dataclass(shape)
            if (takes_mapping and isinstance(value, Mapping)) or (
                shape in (list, tuple) and isinstance(value, list)
            ):
                errors.append(error)
    if len(errors) == 1:  # the one type that was meant says more precisely what is wrong
        raise errors[0]
    raise ConfigError(f"{key}: expected {name_type(hint)}, found {show_value(value)}")


NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    NoneType: "null",
}


def name_type(hint: Any) -> str:
    """A type in words, as an error says it."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        kinds = [
            kind for kind in arguments if kind is not NoneType and not (kind is int and float in arguments)
        ]
        *words, last_word = dict.fromkeys(name_type(kind) for kind in kinds)
        return f"{', '.join(words)} or {last_word}" if words else last_word
    if origin is Literal:
        choices = ", ".join(map(str, arguments))
        return f"one of {choices}" if len(arguments) > 1 else f"`{choices}`"
    if origin is list:
        return "a list"
    if origin is tuple:
        return f"a list of {len(arguments)} values"
    if origin is dict:
        return "a mapping, `name: value`"
    return NAMES.get(hint, "options, `name: value`")


def show_value(value: Any) -> str:
    """A value in a line, as an error shows it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def build_options(kind: Any, values: Mapping[str, Any], key: str = "") -> Any:
    """Make an options dataclass of values that `check_values` returned.

    Raises:
        ConfigError: if a required one is missing, or the dataclass refuses a value.
    """
    options = read_options(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    # First the options that hold no others: those of nested dataclasses may follow from them.
    arguments = {}
    for name, option in options.items():
        if option.options is None:
            arguments[name] = values.get(name, option.default)
            if arguments[name] is NO_DEFAULT:
                raise ConfigError(f"{key}.{name}: is required" if key else f"{name}: is required")
    flat_options = SimpleNamespace(**arguments)
    for name, option in options.items():
        if option.options is None:
            continue
        path = f"{key}.{name}" if key else name
        section = values.get(name, {})
        section_values = dict(vars(section) if dataclasses.is_dataclass(section) else section)
        for fallback in fields[name].metadata.get(FALLBACKS, ()):
            if fallback in option.options and getattr(flat_options, fallback) is not None:
                section_values.setdefault(fallback, getattr(flat_options, fallback))
        links: Mapping[str, Callable[[Any], Any]] = fields[name].metadata.get(LINKS, {})
        section_values |= {link: compute(flat_options) for link, compute in links.items()}
        if option.default is not NO_DEFAULT:
            section_values = vars(option.default) | section_values
        arguments[name] = build_options(option.hint, section_values, path)
    try:
        return kind(**arguments)
    except ConfigError as error:
        section, _, last_name = key.rpartition(".")
        if str(error).startswith(f"{last_name}."):  # it names the section itself
            raise ConfigError(f"{section}.{error}" if section else str(error)) from None
        first_word = re.match(r"\w+", str(error))
        dot = "." if first_word and first_word[0] in options else ": "
        raise ConfigError(f"{key}{dot}{error}" if key else str(error)) from None


def dump_values(options: Mapping[str, Option], values: Mapping[str, Any]) -> dict[str, Any]:
    """All options with their values or defaults in plain JSON types, for a recipe that gives the same again."""
    content = {}
    for name, option in options.items():
        if option.options is not None:
            content[name] = dump_values(option.options, values.get(name, {}))
        elif name in values or option.default not in (NO_DEFAULT, None):
            content[name] = _dump_value(values.get(name, option.default))
    return content


def _dump_value(value: Any) -> Any:
    """A value in plain JSON types; options that only have the field of their shorthand as the value of that field."""
    if isinstance(value, list):
        return [_dump_value(item) for item in value]
    shorthand = find_shorthand(type(value))
    if shorthand is None:
        return to_jsonable(value)
    fields = {name: item for name, item in to_jsonable(value).items() if item is not None}
    return fields[shorthand] if fields.keys() == {shorthand} else fields


def json_schema(options: Mapping[str, Option], title: str) -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a recipe, for editors."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": title,
        **_schema_of_options(options, is_complete=False),
    }


def _schema_of_options(options: Mapping[str, Option], is_complete: bool) -> dict[str, Any]:
    """Of a recipe, or of an item of a list; only the latter must have all options without a default."""
    properties = {}
    for name, option in options.items():
        if option.options is not None:
            schema = _schema_of_options(option.options, is_complete)
        else:
            schema = _schema_of_type(option.hint)
            if option.default not in (NO_DEFAULT, None):
                schema["default"] = to_jsonable(option.default)
        properties[name] = {"description": option.help, **schema} if option.help else schema
    required_names = [
        name for name, option in options.items() if is_complete and option.default is NO_DEFAULT
    ]
    return {
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        **({"required": required_names} if required_names else {}),
    }


def _schema_of_type(hint: Any) -> dict[str, Any]:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return {"anyOf": [_schema_of_type(kind) for kind in arguments]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is list:
        schema = {"type": "array", "items": _schema_of_type(arguments[0])}
        return {"anyOf": [schema, _schema_of_type(Path)]} if hint == list[Path] else schema
    if origin is tuple:
        items = [_schema_of_type(kind) for kind in arguments]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema_of_type(arguments[1])}
    if dataclasses.is_dataclass(hint):
        schema = _schema_of_options(read_options(hint), is_complete=True)
        shorthand = find_shorthand(hint)
        return {"anyOf": [_schema_of_type(get_type_hints(hint)[shorthand]), schema]} if shorthand else schema
    names = {
        bool: "boolean",
        int: "integer",
        float: "number",
        str: "string",
        Path: "string",
        NoneType: "null",
    }
    return {"type": names[hint]}
