"""Which record comes next: categories mixed by weight, each in a seeded order without repetition."""

import math
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from fractions import Fraction
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from being_vl.errors import ConfigError


class Curriculum:
    """An endless stream of records, a pure function of (counts, weights, seed) and the position.

    So a position is all that a resumed run needs. In any first n entries category c stands less than one entry
    above or below `weights[c] * n`: entry n goes to the category that is due first among those that are not ahead
    of their share (the quota method of Balinski and Young, 1975). A category's records come in a shuffled order
    that is new in each pass; none returns before all of its category have come.

    Args:
        counts: Number of records of each category.
        weights: Share asked of each category, on any positive scale. Those that have no records are left out and
            the others share their part.
        seed: Seed of the order within the categories.

    Attributes:
        asked: Shares as asked, scaled to a sum of 1.
        weights: Shares in effect: only of categories that have a weight and records.

    Raises:
        ConfigError: if a weight is negative or not finite, or no category with a weight has records.
    """

    def __init__(self, counts: Mapping[str, int], weights: Mapping[str, float], seed: int) -> None:
        for name, weight in weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise ConfigError(f"the weight of {name!r} is {weight}; expected a number of at least 0")
        # str() so that 0.3 is 3/10, and the cycle of the shares short, not the nearest binary fraction.
        exact = {name: Fraction(str(weight)) for name, weight in weights.items() if weight}
        # Sorted, so that the order in which a recipe names the categories does not matter.
        present = {name: share for name, share in sorted(exact.items()) if counts.get(name)}
        if not present:
            asked = ", ".join(f"{name} {weight}" for name, weight in weights.items()) or "none"
            having = ", ".join(f"{name} {count}" for name, count in counts.items()) or "none"
            raise ConfigError(f"no category has both a weight and records: weights {asked}; records {having}")
        self.asked = {name: float(share / sum(exact.values())) for name, share in exact.items()}
        self.weights = {name: float(share / sum(present.values())) for name, share in present.items()}
        self._seed = seed
        self._names = list(present)
        self._counts = [counts[name] for name in self._names]
        scale = math.lcm(*(share.denominator for share in present.values()))
        parts = [int(share * scale) for share in present.values()]
        common = math.gcd(*parts)
        self._parts = [part // common for part in parts]
        self._cycle = sum(self._parts)
        # Category i's next entry is due at (taken + 1) / part; in a common unit these are integers.
        self._units = [math.lcm(*self._parts) // part for part in self._parts]
        # One cycle of the mixture, as far as it has been read: the category of each entry, and how many of that
        # category come before it.
        self._choices = array("H")
        self._before = array("q")
        self._taken = [0] * len(self._parts)
        self._orders: dict[int, tuple[int, NDArray[np.intp]]] = {}

    def __getitem__(self, position: int) -> tuple[str, int]:
        """The entry at `position`, from 0: its category, and the record's index within that category."""
        if position < 0:
            raise IndexError(f"position {position} is negative")
        cycles, place = divmod(position, self._cycle)
        self._extend(place + 1)
        category = self._choices[place]
        rank = cycles * self._parts[category] + self._before[place]
        turn, index = divmod(rank, self._counts[category])
        return self._names[category], int(self._order(category, turn)[index])

    def iterate(self, start: int = 0) -> Iterator[tuple[str, int]]:
        """The entries from position `start` on, without end."""
        position = start
        while True:
            yield self[position]
            position += 1

    def counts(self, length: int) -> Counter[str]:
        """How many of the first `length` entries each category has."""
        cycles, place = divmod(length, self._cycle)
        self._extend(place)
        rest = Counter(self._choices[:place])
        return Counter({name: cycles * self._parts[i] + rest[i] for i, name in enumerate(self._names)})

    def _extend(self, length: int) -> None:
        """Make the first `length` entries of the cycle known. All in integers: floats would drift."""
        parts, taken, cycle = self._parts, self._taken, self._cycle
        for place in range(len(self._choices) + 1, length + 1):
            due = [
                ((taken[i] + 1) * self._units[i], i)
                for i, part in enumerate(parts)
                if taken[i] * cycle < part * place
            ]
            category = min(due)[1]
            self._choices.append(category)
            self._before.append(taken[category])
            taken[category] += 1

    def _order(self, category: int, turn: int) -> NDArray[np.intp]:
        """The order of a category's records in pass `turn`; raw generator output, so equal under any numpy."""
        known = self._orders.get(category)
        if known is None or known[0] != turn:
            generator = np.random.PCG64([self._seed, crc32(self._names[category].encode()), turn])
            order = np.argsort(generator.random_raw(self._counts[category]), kind="stable")
            self._orders[category] = known = turn, order
        return known[1]
