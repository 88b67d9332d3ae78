"""Progress of long work: a bar on a terminal and in a notebook, log lines elsewhere."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from being_vl.names import LineFormatter


def progress_bar(total: int, unit: str, description: str, initial: int = 0) -> Any:
    """A tqdm bar, for a `with` statement; disabled unless somebody sees it, or if `TQDM_DISABLE=1`, as `-q` sets it.

    Args:
        total: How many units the work has.
        unit: Name of one.
        description: What stands before the bar.
        initial: Units that were done before.
    """
    options: dict[str, Any] = {"total": total, "unit": unit, "desc": description, "initial": initial}
    if not _in_notebook():
        return tqdm(**options, disable=os.environ.get("TQDM_DISABLE") == "1" or None)
    from tqdm.notebook import tqdm as notebook_bar

    try:
        return notebook_bar(**options)
    except ImportError:  # without ipywidgets, a bar of characters
        return tqdm(**options)


@contextmanager
def show_log_lines() -> Iterator[None]:
    """While this lasts, the log lines of being_vl go to stderr, if nobody has set up logging.

    A decorator of the functions that a script or a notebook calls. Where the root logger or that of `being_vl` has a
    handler, nothing changes; elsewhere the lines of level INFO are shown, and none twice.
    """
    logger = logging.getLogger("being_vl")
    if logger.hasHandlers():
        yield
        return
    handler, level = logging.StreamHandler(sys.stderr), logger.level
    handler.setFormatter(LineFormatter())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _in_notebook() -> bool:
    """Whether this is the kernel of a Jupyter notebook."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and type(ipython.get_ipython()).__name__ == "ZMQInteractiveShell"
