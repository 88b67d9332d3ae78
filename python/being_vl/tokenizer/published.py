"""Reading the vocabularies that Being-VL-0.5 published as pickles, without running code in a pickle."""

import pickletools
from os import PathLike
from pathlib import Path
from typing import Any

from being_vl._core import VocabularyError

MAX_BYTES = 1 << 29
"""A pickle of as many merges as a vocabulary may have is smaller."""


def read_published(path: str | PathLike[str]) -> list[tuple[tuple[int, int], int]]:
    """The merges ((a, b), new_id) in a pickle.

    Raises:
        VocabularyError: anything but a list of such merges.
        OSError: a file that cannot be read.
    """
    path = Path(path)
    if path.stat().st_size > MAX_BYTES:
        raise VocabularyError(f"{path}: {path.stat().st_size} bytes; no pickled list of merges is so large")
    try:
        merges = _unpickle(path.read_bytes())
    except VocabularyError as error:
        raise VocabularyError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle raises almost anything
        raise VocabularyError(f"{path}: not a pickled list of merges ({error})") from None
    if not isinstance(merges, list):
        raise VocabularyError(f"{path}: holds {type(merges).__name__}, expected a list of ((a, b), new_id)")
    for i, merge in enumerate(merges):
        if not _is_merge(merge):
            raise VocabularyError(f"{path}: merge {i} is not ((a, b), new_id) with ints of at least 0")
    return merges


def _unpickle(data: bytes) -> Any:
    """Unpickle lists, tuples and ints, and refuse everything else.

    Nothing in the pickle is compared, hashed or called. The memo is a dict, since the standard library's unpickler
    takes memory for the largest memo index in the file.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}

    def pop_to_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for opcode, argument, position in pickletools.genops(data):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                marks.append(len(stack))
            case "INT" | "LONG" | "LONG1" | "BININT" | "BININT1" | "BININT2":
                stack.append(argument)
            case "EMPTY_LIST":
                stack.append([])
            case "LIST":
                stack.append(pop_to_mark())
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS":
                items = pop_to_mark()
                stack[-1].extend(items)
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                stack.append(tuple(pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [stack.pop() for _ in range(int(opcode.name[-1]))]
                stack.append(tuple(reversed(items)))
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "STOP":
                return stack.pop()
            case name:
                raise VocabularyError(f"byte {position}: {name} in a pickle that may hold only ints")
    raise EOFError("it has no end")


def _is_merge(merge: Any) -> bool:
    match merge:
        case ((a, b), token):
            return all(type(number) is int and 0 <= number < 2**32 for number in (a, b, token))
    return False
