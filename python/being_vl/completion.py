"""`being-vl completion`: completion of commands, flags and their values in bash and zsh."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args, get_origin

from being_vl.flags import list_alternatives
from being_vl.options import Options


@dataclass
class CompletionOptions(Options):
    """Options of `being-vl completion`.

    Args:
        shell: `bash` or `zsh`.
    """

    shell: Literal["bash", "zsh"]


def completion(options: CompletionOptions) -> str:
    """The script, for `eval "$(being-vl completion bash)"` in ~/.bashrc, and the like in ~/.zshrc."""
    import shtab

    from being_vl.commands import build_parser

    parser = build_parser()
    _offer_values(parser)
    return str(shtab.complete(parser, shell=options.shell))


def _offer_values(parser: argparse.ArgumentParser) -> None:
    """Tell shtab which values each flag has: words of a choice, true and false, files."""
    import shtab

    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                _offer_values(child)
            continue
        words: list[str] = []
        for kind in list_alternatives(getattr(action, "hint", None)):
            item = get_args(kind)[0] if get_origin(kind) is list else kind
            if get_origin(kind) is Literal:
                words += map(str, get_args(kind))
            elif kind is bool:
                words += ["true", "false"]
            elif item is Path:
                setattr(action, "complete", shtab.FILE)  # noqa: B010  shtab's own attribute
        if words:
            action.choices = words
