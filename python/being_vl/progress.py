"""Progress of long work: a bar on a terminal and in a notebook, nothing elsewhere, where log lines serve."""

import os
import sys
from typing import Any

from tqdm import tqdm


def progress_bar(total: int, unit: str, description: str, initial: int = 0) -> Any:
    """A tqdm bar, for a `with` statement; disabled unless somebody sees it, or if `TQDM_DISABLE=1`, as `-q` sets it.

    Args:
        total: How many units the work has.
        unit: Name of one.
        description: What stands before the bar.
        initial: Units that were done before.
    """
    if _in_notebook():
        from tqdm.notebook import tqdm as notebook_bar

        return notebook_bar(total=total, unit=unit, desc=description, initial=initial)
    disable = os.environ.get("TQDM_DISABLE") == "1" or None
    return tqdm(total=total, unit=unit, desc=description, initial=initial, disable=disable)


def _in_notebook() -> bool:
    """Whether this is the kernel of a Jupyter notebook."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and type(ipython.get_ipython()).__name__ == "ZMQInteractiveShell"
