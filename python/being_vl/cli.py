"""The command line: finds the command, and answers errors by one line and an exit status."""

import difflib
import io
import logging
import os
import re
import sys
import traceback
from importlib.metadata import version
from itertools import takewhile

from being_vl.commands import COMMANDS, GROUPS, describe_commands
from being_vl.errors import BeingVLError, ConfigError
from being_vl.extras import install_hint
from being_vl.names import LineFormatter, show_error

SWITCHES = ("-q", "--quiet", "-v", "--verbose")
"""Flags that may stand before the command, too."""

_MACHINE_ERRORS = {
    "MemoryError": "not enough memory; fewer or smaller images, batches, workers or threads need less",
    "OutOfMemoryError": "not enough memory of the GPU; smaller batches need less",
    "RecursionError": "something is nested too deeply",
    "UnicodeEncodeError": "a text holds what cannot be written",
}
"""Kinds of errors that are no fault of the program, and what they are called."""
_WORKER_ERROR = re.compile(r"Caught (?P<kind>\w+) in DataLoader worker process \d+\.\s")
_WORKER_DEATH = re.compile(
    r"DataLoader worker \(pid.*?(?P<reason>killed by signal: [^.]+|exited unexpectedly)", re.S
)


def main(words: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        words: What stands behind `being-vl`; those of this process by default.

    Returns:
        The exit status: 0, 1 (a package is missing), 2 (bad input), 130 (Ctrl-C).
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show a character shows its code
            stream.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
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
    except Exception as error:
        text = describe_error(error)
        if not text:
            raise
        if logging.getLogger("being_vl").isEnabledFor(logging.DEBUG):
            traceback.print_exc()
        print(f"being-vl: error: {text}", file=sys.stderr)
        return 2
    return 0


def describe_error(error: BaseException) -> str:
    """One line about an error of the input or the machine; empty for what is a fault of the program."""
    text, kind = str(error), type(error).__name__
    # A process that reads ahead: torch puts its traceback into the message.
    if worker := _WORKER_ERROR.match(text):
        kind = worker["kind"]
        text = re.split(rf"^(?:[\w.]+\.)?{kind}(?:: |\s*\Z)", text, flags=re.MULTILINE)[-1]
        is_known = kind in ("OSError", *_MACHINE_ERRORS) or issubclass(type(error), BeingVLError | OSError)
    elif killed := _WORKER_DEATH.search(text):
        kind, text = "MemoryError", f"a process that reads ahead has died ({killed['reason']})"
        is_known = True
    else:
        is_known = isinstance(error, BeingVLError | OSError) or kind in _MACHINE_ERRORS
    if not is_known:
        return ""
    reason = _MACHINE_ERRORS.get(kind)
    return show_error(f"{reason} ({text})" if reason and text else reason or text or kind)


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
