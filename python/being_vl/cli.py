"""The command line: finds the command, and answers errors by one line and an exit status."""

import difflib
import logging
import os
import sys
import traceback
from importlib.metadata import version

from being_vl.commands import COMMANDS, GROUPS, describe_commands
from being_vl.errors import BeingVLError, ConfigError
from being_vl.extras import missing_extra


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
    try:
        _run_command(list(sys.argv[1:] if words is None else words))
    except KeyboardInterrupt:
        print("being-vl: stopped", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("being_vl"):
            raise
        print(f"being-vl: {missing_extra(error.name or str(error))}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever reads what we print, `head` for one, wants no more of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (BeingVLError, OSError) as error:
        if logging.getLogger("being_vl").isEnabledFor(logging.DEBUG):
            traceback.print_exc()
        print(f"being-vl: error: {error}", file=sys.stderr)
        return 2
    return 0


def _run_command(words: list[str]) -> None:
    """Find the command that the first words name, and run it with the others."""
    if words == ["--version"]:
        print(f"being-vl {version('being-vl')}")
        return
    for length in (2, 1):
        name = " ".join(words[:length])
        if name in COMMANDS:
            COMMANDS[name].run(name, words[length:])
            return
    group = words[0] if words and words[0] in GROUPS else ""
    rest = words[1:] if group else words
    if not rest or rest[0] in ("-h", "--help"):
        print(describe_commands(group))
        return
    name = f"{group} {rest[0]}" if group else rest[0]
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean `{close[0]}`?" if close else "`being-vl --help` lists them"
    raise ConfigError(f"there is no command {name!r}; {hint}")
