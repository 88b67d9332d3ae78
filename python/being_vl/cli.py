"""The command line: finds the command, and answers errors by one line and an exit status."""

import difflib
import logging
import os
import sys
import traceback
from importlib.metadata import version
from itertools import takewhile

from being_vl.commands import COMMANDS, GROUPS, describe_commands
from being_vl.errors import BeingVLError, ConfigError
from being_vl.extras import install_hint

SWITCHES = ("-q", "--quiet", "-v", "--verbose")
"""Flags that may stand before the command, too."""


def main(words: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        words: What stands behind `being-vl`; those of this process by default.

    Returns:
        The exit status: 0, 1 (a package is missing), 2 (bad input), 130 (Ctrl-C).
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    # Others' bars and warnings that say nothing to our users; before the libraries are imported.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator" not in record.getMessage())
    words = list(sys.argv[1:] if words is None else words)
    switches = list(takewhile(SWITCHES.__contains__, words))  # such as in `being-vl -q train`
    words = words[len(switches) :]
    name = find_command(words)
    try:
        if name is None:
            _answer(words)
        else:
            COMMANDS[name].run(name, switches + words[len(name.split()) :])
    except KeyboardInterrupt:
        print("being-vl: stopped", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if name is None or not error.name or error.name.startswith("being_vl"):
            raise
        print(f"being-vl: {name}: {install_hint(error.name, COMMANDS[name].extra)}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (BeingVLError, OSError) as error:
        if logging.getLogger("being_vl").isEnabledFor(logging.DEBUG):
            traceback.print_exc()
        print(f"being-vl: error: {error}", file=sys.stderr)
        return 2
    return 0


def find_command(words: list[str]) -> str | None:
    """The name of the command at the start of a command line; None if there is none."""
    for length in (2, 1):
        name = " ".join(words[:length])
        if name in COMMANDS:
            return name
    return None


def _answer(words: list[str]) -> None:
    """Answer a command line without a command: the help, the version, or what is wrong."""
    group = words[0] if words and words[0] in GROUPS else ""
    rest = words[1:] if group else words
    if rest == ["--version"] and not group:
        print(f"being-vl {version('being-vl')}")
    elif not rest or rest[0] in ("-h", "--help"):
        print(describe_commands(group))
    else:
        name = f"{group} {rest[0]}" if group else rest[0]
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean `{close[0]}`?" if close else "`being-vl --help` lists them"
        raise ConfigError(f"there is no command {name!r}; {hint}")
