"""Which record comes next: groups of records mixed by weight, each in a seeded order without repetition."""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import accumulate
from typing import Literal, NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from being_vl.data.sequences import RecordGroup
from being_vl.errors import ConfigError

TEXT_ONLY = "text_only"
"""Key of a mixture for the records without an image, whatever their category."""


class Entry(NamedTuple):
    """A record of the stream.

    Args:
        key: The mixture's key that it was drawn for.
        group: Where it lies.
        number: Its number in the group, from 0.
        length: Tokens.
        position: Its place in the stream, from 0.
    """

    key: str
    group: RecordGroup
    number: int
    length: int
    position: int


def members(keys: Sequence[str], groups: Sequence[RecordGroup]) -> dict[str, list[RecordGroup]]:
    """The groups that each key of a mixture stands for; keys without any are left out.

    A group belongs to one key: `text_only` if that is a key and its records have no images, else the key of its source,
    `category/source`, else that of its category. So a source with a weight of 0 is left out of its category.
    """
    found: dict[str, list[RecordGroup]] = {}
    for group in sorted(groups):
        names = [TEXT_ONLY] * group.text_only + [f"{group.category}/{group.source}", group.category]
        key = next((name for name in names if name in keys), None)
        if key:
            found.setdefault(key, []).append(group)
    return found


class Curriculum:
    """An endless stream of records, a pure function of its arguments and of the `elapsed` that are passed to `draw`.

    The next record is that of the key which is due first among those that are not ahead of their share. Counted in
    records this is the quota method of Balinski and Young (1975), and each key stands less than one record above or
    below its share at any moment; in tokens it is the fair queueing of Bennett and Zhang (WF²Q, 1996), and each
    stands less than the longest record above or below. A key's records come in a shuffled order that is new in each
    pass; none returns before all of the key have come.

    Args:
        lengths: Of each group the tokens of each of its records, int32.
        mixture: Weight of each key at the start, on any positive scale; without one, each category weighs as
            many records, or tokens, as it has. Keys without records are left out and the others share their part.
        seed: Seed of the order of the records.
        end: Weights at the end, if the mixture changes; in between it changes linearly.
        total: The `elapsed` at which the end is reached.
        by: What the weights are shares of.

    Attributes:
        keys: The keys in effect, each with the number of its records.
        tokens: Tokens of all these records.
        weights: Shares in effect at the start, scaled to a sum of 1.
        end: Shares in effect at the end, likewise.
        drawn: Records of each key that were drawn.

    Raises:
        ConfigError: if a weight is negative or not finite, or no key with a weight has records.
    """

    def __init__(
        self,
        lengths: Mapping[RecordGroup, NDArray[np.int32]],
        mixture: Mapping[str, float],
        seed: int,
        end: Mapping[str, float] | None = None,
        total: int = 1,
        by: Literal["records", "tokens"] = "records",
    ) -> None:
        mixture = mixture or _sizes(lengths, by)
        end = mixture if end is None else end or _sizes(lengths, by)
        groups = members([*mixture, *end], [group for group, found in lengths.items() if len(found)])
        # Sorted, so that the order in which a recipe names them does not matter.
        names = sorted(name for name in groups if mixture.get(name) or end.get(name))
        first, last = (_exact(weights, names) for weights in (mixture, end))
        scale = math.lcm(*(share.denominator for share in first + last))
        # Shares are integers, parts of `scale` at the start and of `scale * total` in between, so that nothing drifts.
        self._first = [int(share * scale) for share in first]
        self._last = [int(share * scale) for share in last]
        self._total = total if first != last else 1
        self._scale = scale * self._total
        self.weights, self.end = (
            {name: float(share) for name, share in zip(names, shares, strict=True) if share}
            for shares in (first, last)
        )
        self._seed = seed
        self._names = names
        self._groups = [groups[name] for name in names]
        self._starts = [
            [0, *accumulate(len(lengths[group]) for group in found)][:-1] for found in self._groups
        ]
        self._lengths = [np.concatenate([lengths[group] for group in found]) for found in self._groups]
        self.keys = {name: len(found) for name, found in zip(names, self._lengths, strict=True)}
        self.tokens = sum(int(found.sum(dtype=np.int64)) for found in self._lengths)
        self._by_tokens = by == "tokens"
        self._drawn = [0] * len(names)
        self._owed = [0] * len(names)  # of each key, what it was due less what it got, in parts of `_scale`
        self._orders: dict[int, tuple[int, NDArray[np.intp]]] = {}
        self._next = [self._peek(key) for key in range(len(names))]
        self._position = 0

    @property
    def drawn(self) -> dict[str, int]:
        """Records of each key that were drawn."""
        return dict(zip(self._names, self._drawn, strict=True))

    def draw(self, elapsed: int = 0) -> Entry:
        """The next record, by the mixture as it is at `elapsed`, 0 to `total`."""
        if self._total == 1:
            shares = self._first
        else:
            left = self._total - elapsed
            shares = [a * left + b * elapsed for a, b in zip(self._first, self._last, strict=True)]
        owed, scale = self._owed, self._scale
        costs = [length for _, length in self._next] if self._by_tokens else [1] * len(owed)
        chosen, soonest = -1, math.inf
        for key, share in enumerate(shares):
            if owed[key] + share * costs[key] > 0:
                due = (costs[key] * scale - owed[key]) / share if share else math.inf
                if due < soonest or chosen < 0:
                    chosen, soonest = key, due
        cost = costs[chosen]
        for key, share in enumerate(shares):
            owed[key] += share * cost
        owed[chosen] -= scale * cost
        place, length = self._next[chosen]
        which = bisect_right(self._starts[chosen], place) - 1
        group, number = self._groups[chosen][which], place - self._starts[chosen][which]
        entry = Entry(self._names[chosen], group, number, length, self._position)
        self._position += 1
        self._drawn[chosen] += 1
        self._next[chosen] = self._peek(chosen)
        return entry

    def _peek(self, key: int) -> tuple[int, int]:
        """A key's next record: its number among those of the key, and its length."""
        turn, rank = divmod(self._drawn[key], len(self._lengths[key]))
        place = int(self._order(key, turn)[rank])
        return place, int(self._lengths[key][place])

    def _order(self, key: int, turn: int) -> NDArray[np.intp]:
        """The order of a key's records in pass `turn`; raw generator output, so equal under any numpy."""
        known = self._orders.get(key)
        if known is None or known[0] != turn:
            generator = np.random.PCG64([self._seed, crc32(self._names[key].encode()), turn])
            order = np.argsort(generator.random_raw(len(self._lengths[key])), kind="stable")
            self._orders[key] = known = turn, order
        return known[1]


def _sizes(lengths: Mapping[RecordGroup, NDArray[np.int32]], by: str) -> dict[str, float]:
    """Weight of each category by its size."""
    sizes: dict[str, float] = {}
    for group, found in lengths.items():
        size = int(found.sum(dtype=np.int64)) if by == "tokens" else len(found)
        sizes[group.category] = sizes.get(group.category, 0) + size
    return sizes


def _exact(weights: Mapping[str, float], names: Sequence[str]) -> list[Fraction]:
    """The shares of `names`, with a sum of 1."""
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(f"the weight of {name!r} is {weight}; expected a number of at least 0")
    # str() so that 0.3 is 3/10, and not the nearest binary fraction.
    shares = [Fraction(str(weights.get(name, 0))) for name in names]
    if not sum(shares):
        asked = ", ".join(f"{name} {weight}" for name, weight in weights.items()) or "none"
        raise ConfigError(
            f"no category has both a weight and records: weights {asked}; records of {', '.join(names) or 'none'}"
        )
    return [share / sum(shares) for share in shares]
