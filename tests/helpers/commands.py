"""Running the command line in a test."""

import os
from typing import Any

import pytest

from being_vl.cli import main


def being_vl(*words: object) -> int:
    """Run a command; returns its exit status."""
    return main([str(word) for word in words])


def expect_refusal(capsys: pytest.CaptureFixture[str], status: int) -> str:
    """The one line that a command ended with when it failed; what it logged before does not count."""
    lines = capsys.readouterr().err.splitlines()
    assert status == 2, lines
    errors = [line for line in lines if line.startswith("being-vl: error: ")]
    assert errors == lines[-1:]
    assert not any("Traceback" in line for line in lines)
    return errors[0]


class FileCreator:
    """Whoever unpickles it makes a file `executed`."""

    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)
