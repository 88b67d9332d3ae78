"""Options dataclasses as flags of the command line."""

import dataclasses
from pathlib import Path
from typing import Any

from docstring_parser import parse
from jsonargparse import ArgumentParser


def add_flags(parser: ArgumentParser, options: Any, positional: str | None = None) -> None:
    """Add a flag for each field of an options dataclass.

    Lists of strings and paths take several values, `--image a.png b.png`; everything else is as jsonargparse has it.

    Args:
        parser: What the flags are added to.
        options: The dataclass.
        positional: A field that is given by its place.
    """
    help_of = {parameter.arg_name: parameter.description for parameter in parse(options.__doc__).params}
    if positional:
        parser.add_argument(positional, type=Path, help=help_of[positional])
    by_hand = {positional} if positional else set()
    for field in dataclasses.fields(options):
        if field.type in (list[str], list[Path]):
            required = field.default_factory is dataclasses.MISSING
            kind = str if field.type == list[str] else Path
            default: list[object] | None = None if required else []
            name = f"--{field.name}"
            parser.add_argument(
                name, type=kind, nargs="+", required=required, default=default, help=help_of[field.name]
            )
            by_hand.add(field.name)
    parser.add_class_arguments(options, skip=by_hand)
