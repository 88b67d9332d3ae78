"""Reading the vocabularies that Being-VL-0.5 published as pickles, without running what a pickle may say."""

import pickle
import pickletools
from pathlib import Path
from typing import Any

from being_vl._core import VocabularyError

# What builds lists, tuples and ints, and nothing else.
HARMLESS = {
    *(
        "PROTO",
        "FRAME",
        "STOP",
        "MARK",
        "MEMOIZE",
        "PUT",
        "BINPUT",
        "LONG_BINPUT",
        "GET",
        "BINGET",
        "LONG_BINGET",
    ),
    *("EMPTY_LIST", "LIST", "APPEND", "APPENDS"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("INT", "LONG", "LONG1", "BININT", "BININT1", "BININT2"),
}


def read_published(path: Path) -> list[tuple[tuple[int, int], int]]:
    """The merges ((a, b), new_id) in a pickle.

    Raises:
        VocabularyError: anything but a list of such merges.
        OSError: a file that cannot be read.
    """
    data = path.read_bytes()
    try:
        for opcode, _, position in pickletools.genops(data):
            if opcode.name not in HARMLESS:
                raise VocabularyError(
                    f"{path}: byte {position}: {opcode.name} in a pickle that may hold only ints"
                )
        merges = pickle.loads(data)
    except VocabularyError:
        raise
    except Exception as error:  # a damaged pickle raises almost anything
        raise VocabularyError(f"{path}: not a pickled list of merges ({error})") from None
    if not isinstance(merges, list):
        raise VocabularyError(f"{path}: holds {type(merges).__name__}, expected a list of ((a, b), new_id)")
    for i, merge in enumerate(merges):
        if not _is_merge(merge):
            raise VocabularyError(f"{path}: merge {i} is not ((a, b), new_id) with ints of at least 0")
    return merges


def _is_merge(merge: Any) -> bool:
    match merge:
        case (int(a), int(b)), int(token):
            return min(a, b, token) >= 0 and max(a, b, token) < 2**32
    return False
