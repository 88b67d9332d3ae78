"""The integers that `VisualBPE` hands to the core, checked so that errors name them."""

import operator
from typing import SupportsIndex

from being_vl._core import BeingVLError

MAX_VOCAB_SIZE = 2**24
INT64_MAX, UINT64_MAX = 2**63 - 1, 2**64 - 1


def check_integer(name: str, value: SupportsIndex, minimum: int, maximum: int) -> int:
    """An option as an int between two bounds, both included."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {value!r}") from None
    if not minimum <= number <= maximum:
        raise BeingVLError(f"{name} = {number}: expected {minimum} to {maximum}")
    return number


def check_threads(num_threads: int | None) -> int:
    """The number of threads for the core, where 0 means one per core."""
    return 0 if num_threads is None else check_integer("num_threads", num_threads, 1, 1024)


def check_seed(dropout: float, seed: int | None) -> int:
    """The seed for the core; an error if there is dropout without a seed."""
    if seed is None:
        if dropout:
            raise BeingVLError(f"dropout = {dropout} needs a seed")
        return 0
    return check_integer("seed", seed, 0, UINT64_MAX)


def training_integers(
    base_vocab_size: int, num_merges: int, min_frequency: int, num_threads: int | None, checkpoint_every: int
) -> dict[str, int]:
    """The integers among the options of training, by the names that the core gives them."""
    return {
        "base_vocab_size": check_integer("base_vocab_size", base_vocab_size, 1, MAX_VOCAB_SIZE),
        "num_merges": check_integer("num_merges", num_merges, 0, MAX_VOCAB_SIZE),
        "min_frequency": check_integer("min_frequency", min_frequency, 1, INT64_MAX),
        "num_threads": check_threads(num_threads),
        "checkpoint_every": check_integer("checkpoint_every", checkpoint_every, 1, INT64_MAX),
    }
