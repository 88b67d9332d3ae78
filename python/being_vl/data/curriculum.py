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
        group: The group that it belongs to.
        number: Its number in the group, from 0.
        length: Tokens.
        position: Its place in the stream, from 0.
    """

    key: str
    group: RecordGroup
    number: int
    length: int
    position: int


def assign_groups(keys: Sequence[str], groups: Sequence[RecordGroup]) -> dict[str, list[RecordGroup]]:
    """The groups that each key of a mixture stands for; keys without any are left out.

    A group belongs to one key: `text_only` if that is a key and its records have no images, else the key of its source,
    `category/source`, else that of its category. So a source with a weight of 0 is left out of its category.
    """
    groups_of_keys: dict[str, list[RecordGroup]] = {}
    for group in sorted(groups):
        names = [TEXT_ONLY] * group.text_only + [f"{group.category}/{group.source}", group.category]
        key = next((name for name in names if name in keys), None)
        if key:
            groups_of_keys.setdefault(key, []).append(group)
    return groups_of_keys


class Curriculum:
    """An endless stream of records, a pure function of its arguments and of the `elapsed` that are passed to `draw`.

    The next record is that of the key which is due first, among the keys that are not ahead of their share. Counted in
    records this is the quota method of Balinski and Young (1975), and each key stands less than one record above or
    below its share at any moment; in tokens it is the fair queueing of Bennett and Zhang (WF²Q, 1996), and each
    stands less than the longest record above or below. A key's records come in a shuffled order that is new in each
    pass; none returns before all of the key have come.

    Args:
        lengths: Per group the tokens of each of its records, int32.
        mixture: Weight of each key at the start, on any positive scale; without one, each category weighs as
            much as it has records, or tokens. Keys without records are left out and the others share their part.
        seed: Seed of the order of the records.
        end: Weights at the end, if the mixture changes; in between it changes linearly.
        total: The `elapsed` at which the end is reached.
        unit: What the weights are shares of.

    Attributes:
        keys: The keys in effect, each with the number of its records.
        tokens: Tokens of all these records.
        weights: Shares in effect at the start, scaled to a sum of 1.
        end: Shares in effect at the end, likewise.

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
        unit: Literal["records", "tokens"] = "records",
    ) -> None:
        mixture = mixture or _sizes(lengths, unit)
        end = mixture if end is None else end or _sizes(lengths, unit)
        self._is_by_tokens = unit == "tokens"
        self._seed = seed

        # The keys in effect, and the records of each: those of its groups, one group after the other.
        nonempty_groups = [group for group, group_lengths in lengths.items() if len(group_lengths)]
        groups = assign_groups([*mixture, *end], nonempty_groups)
        # Sorted, so that the order in which a recipe names them does not matter.
        self._names = sorted(name for name in groups if mixture.get(name) or end.get(name))
        self._groups = [groups[name] for name in self._names]
        self._starts = [
            [0, *accumulate(len(lengths[group]) for group in members)][:-1] for members in self._groups
        ]
        self._lengths = [np.concatenate([lengths[group] for group in members]) for members in self._groups]
        self.keys = {
            name: len(key_lengths) for name, key_lengths in zip(self._names, self._lengths, strict=True)
        }
        self.tokens = sum(int(key_lengths.sum(dtype=np.int64)) for key_lengths in self._lengths)

        # Shares are integers, parts of `scale` at the start and of `scale * total` in between, so that nothing drifts.
        start_shares, end_shares = (_normalize(weights, self._names) for weights in (mixture, end))
        scale = math.lcm(*(share.denominator for share in start_shares + end_shares))
        self._start_shares = [int(share * scale) for share in start_shares]
        self._end_shares = [int(share * scale) for share in end_shares]
        self._total = total if start_shares != end_shares else 1
        self._scale = scale * self._total
        self.weights, self.end = (
            {name: float(share) for name, share in zip(self._names, shares, strict=True) if share}
            for shares in (start_shares, end_shares)
        )

        # The state: per key how many records were drawn, its credit, and its next record.
        self._draw_counts = [0] * len(self._names)
        self._credits = [0] * len(self._names)  # what a key was due less what it got, in parts of `_scale`
        self._orders: dict[int, tuple[int, NDArray[np.intp]]] = {}
        self._next_records = [self._peek(key) for key in range(len(self._names))]
        self._position = 0

    def draw(self, elapsed: int = 0) -> Entry:
        """The next record, by the mixture as it is at `elapsed`, 0 to `total`."""
        # The shares now.
        if self._total == 1:
            shares = self._start_shares
        else:
            rest = self._total - elapsed
            pairs = zip(self._start_shares, self._end_shares, strict=True)
            shares = [start * rest + end * elapsed for start, end in pairs]

        # Of the keys that are not ahead of their share the one that is due first.
        balances, scale = self._credits, self._scale
        costs = [length for _, length in self._next_records] if self._is_by_tokens else [1] * len(balances)
        key, earliest_deadline = -1, math.inf
        for candidate, share in enumerate(shares):
            if balances[candidate] + share * costs[candidate] > 0:
                deadline = (costs[candidate] * scale - balances[candidate]) / share if share else math.inf
                if deadline < earliest_deadline or key < 0:
                    key, earliest_deadline = candidate, deadline

        # Every key is credited its share of the record's cost; the chosen key pays the cost.
        for candidate, share in enumerate(shares):
            balances[candidate] += share * costs[key]
        balances[key] -= scale * costs[key]

        # The record, and the key's next one.
        index, length = self._next_records[key]
        member = bisect_right(self._starts[key], index) - 1
        group, number = self._groups[key][member], index - self._starts[key][member]
        entry = Entry(self._names[key], group, number, length, self._position)
        self._position += 1
        self._draw_counts[key] += 1
        self._next_records[key] = self._peek(key)
        return entry

    def _peek(self, key: int) -> tuple[int, int]:
        """A key's next record: its number among those of the key, and its length."""
        pass_number, rank = divmod(self._draw_counts[key], len(self._lengths[key]))
        index = int(self._order(key, pass_number)[rank])
        return index, int(self._lengths[key][index])

    def _order(self, key: int, pass_number: int) -> NDArray[np.intp]:
        """The order of a key's records in a pass; raw generator output, so equal under any numpy."""
        if key not in self._orders or self._orders[key][0] != pass_number:
            generator = np.random.PCG64([self._seed, crc32(self._names[key].encode()), pass_number])
            order = np.argsort(generator.random_raw(len(self._lengths[key])), kind="stable")
            self._orders[key] = pass_number, order
        return self._orders[key][1]


def _sizes(lengths: Mapping[RecordGroup, NDArray[np.int32]], unit: str) -> dict[str, float]:
    """Weight of each category by its size."""
    sizes: dict[str, float] = {}
    for group, group_lengths in lengths.items():
        size = int(group_lengths.sum(dtype=np.int64)) if unit == "tokens" else len(group_lengths)
        sizes[group.category] = sizes.get(group.category, 0) + size
    return sizes


def _normalize(weights: Mapping[str, float], names: Sequence[str]) -> list[Fraction]:
    """The shares of `names` as exact fractions with a sum of 1."""
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(f"the weight of {name!r} is {weight}; expected a number of at least 0")
    # str() so that 0.3 is 3/10, and not the nearest binary fraction.
    shares = [Fraction(str(weights.get(name, 0))) for name in names]
    if not sum(shares):
        listing = ", ".join(f"{name} {weight}" for name, weight in weights.items()) or "none"
        raise ConfigError(
            f"no category has both a weight and records: weights {listing}; records of {', '.join(names) or 'none'}"
        )
    return [share / sum(shares) for share in shares]
