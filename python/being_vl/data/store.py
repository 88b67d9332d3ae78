"""Tokenised records, grouped as mixtures name them."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from being_vl.data.sequences import Example


class Sequences(Protocol):
    """Tokenised records in groups, which are what a mixture gives shares to.

    A group is a category, `foundation`, or the records of one source in it, `foundation/llava` for a file `llava.json`;
    so a record is in two groups.

    Attributes:
        dropout: Probability with which BPE-dropout skips a merge; where it is 0, `length` is what `lengths` says.
        pad_id: An id to fill up batches with.
    """

    dropout: float
    pad_id: int

    @property
    def lengths(self) -> Mapping[str, NDArray[np.int32]]:
        """Of each group the length in tokens of each of its records, without BPE-dropout."""

    def get(self, group: str, index: int, position: int) -> Example:
        """One record.

        Args:
            group: One of `lengths`.
            index: Of the record in its group, from 0.
            position: Of this reading in the training's stream of records; BPE-dropout is a function of it and the seed.
        """

    def length(self, group: str, index: int, position: int) -> int:
        """Tokens of what `get` returns."""


class ExampleList:
    """`Sequences` of examples in memory, without BPE-dropout."""

    dropout = 0.0

    def __init__(self, examples: Sequence[Example], pad_id: int) -> None:
        self.pad_id = pad_id
        self._groups: dict[str, list[Example]] = {}
        for example in examples:
            for group in (example.category, f"{example.category}/{example.source}"):
                self._groups.setdefault(group, []).append(example)
        self.lengths = {
            group: np.array([len(example.ids) for example in found], np.int32)
            for group, found in self._groups.items()
        }

    def get(self, group: str, index: int, position: int) -> Example:
        """See `Sequences`."""
        return self._groups[group][index]

    def length(self, group: str, index: int, position: int) -> int:
        """See `Sequences`."""
        return int(self.lengths[group][index])
