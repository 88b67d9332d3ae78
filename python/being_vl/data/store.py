"""Tokenised records, grouped as mixtures name them."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from being_vl.data.sequences import Example, Group


class Sequences(Protocol):
    """Tokenised records; each is in one group.

    Attributes:
        dropout: Probability with which BPE-dropout skips a merge.
        pad_id: An id to fill up batches with.
    """

    dropout: float
    pad_id: int

    @property
    def lengths(self) -> Mapping[Group, NDArray[np.int32]]:
        """Of each group the length in tokens of each of its records, without BPE-dropout. Rows are planned by these."""

    def get(self, group: Group, index: int, position: int) -> Example:
        """One record; also called in the processes of a data loader.

        Args:
            group: One of `lengths`.
            index: Of the record in its group, from 0.
            position: Of this reading in the training's stream of records; BPE-dropout is a function of it and the seed.
        """


class ExampleList:
    """`Sequences` of examples in memory, without BPE-dropout."""

    dropout = 0.0

    def __init__(self, examples: Sequence[Example], pad_id: int) -> None:
        self.pad_id = pad_id
        self._groups: dict[Group, list[Example]] = {}
        for example in examples:
            self._groups.setdefault(example.group, []).append(example)
        self.lengths = {
            group: np.array([len(example.ids) for example in found], np.int32)
            for group, found in self._groups.items()
        }

    def get(self, group: Group, index: int, position: int) -> Example:
        """See `Sequences`."""
        return self._groups[group][index]
