"""Options dataclasses as flags of the command line."""

import dataclasses
from pathlib import Path
from typing import Any

from docstring_parser import parse
from jsonargparse import ActionYesNo, ArgumentParser

REST = "overrides"
"""Name of a field that takes what stands behind `--`: flags for what the command starts."""


def add_flags(parser: ArgumentParser, options: Any, positional: str | None = None) -> None:
    """Add a flag for each field of an options dataclass.

    Lists of strings and paths take several values, `--image a.png b.png`; `--flag` alone sets a bool, and so does
    `--flag true`; a field's metadata may give a flag another name, its `alias`; everything else is as jsonargparse has
    it.

    Args:
        parser: What the flags are added to.
        options: The dataclass.
        positional: A field that is given by its place.
    """
    docs = [parse(kind.__doc__ or "") for kind in options.__mro__]
    help_of = {parameter.arg_name: parameter.description for doc in docs for parameter in doc.params}
    by_hand = set()
    for field in dataclasses.fields(options):
        name, text = field.name, help_of[field.name]
        is_list = field.type in (list[str], list[Path])
        if name == REST:
            pass
        elif name == positional:
            parser.add_argument(name, type=Path, nargs="+" if is_list else None, help=text)
        elif is_list:
            make = field.default_factory
            required = make is dataclasses.MISSING
            kind = str if field.type == list[str] else Path
            default = None if make is dataclasses.MISSING else make()
            parser.add_argument(
                f"--{name}", type=kind, nargs="+", required=required, default=default, help=text
            )
        elif field.type is bool:
            parser.add_argument(f"--{name}", nargs="?", action=ActionYesNo, default=field.default, help=text)
        elif alias := field.metadata.get("alias"):
            parser.add_argument(f"--{name}", alias, type=field.type, default=field.default, help=text)
        else:
            continue
        by_hand.add(name)
    parser.add_class_arguments(options, skip=by_hand)
