"""`being-vl completion`: completion of commands, flags and their values in bash and zsh."""

from dataclasses import dataclass
from typing import Literal

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

    return str(shtab.complete(build_parser(), shell=options.shell))
