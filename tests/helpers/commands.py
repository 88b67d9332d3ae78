"""Running the command line in a test."""

import os
from typing import Any

import pytest

from being_vl.cli import main


def being_vl(*words: object) -> int:
    """Run a command; returns its exit status."""
    return main([str(word) for word in words])


def refused(capsys: pytest.CaptureFixture[str], status: int) -> str:
    """The one line that a command said before it failed."""
    said = capsys.readouterr().err.splitlines()
    assert status == 2, said
    lines = [line for line in said if line.startswith("being-vl: error: ")]
    assert lines == said[-1:]
    return lines[0]


class Hostile:
    """Whoever unpickles it makes a file `executed`."""

    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)
