"""The order of the records, over all mixtures that hypothesis finds."""

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from being_vl.data.curriculum import Curriculum
from being_vl.errors import ConfigError

NAMES = ("foundation", "perception", "reasoning", "instruction", "extra")
counts = st.dictionaries(st.sampled_from(NAMES), st.integers(1, 12), min_size=1)
weight = st.one_of(st.integers(1, 100), st.floats(1e-3, 1e3), st.sampled_from([0.1, 0.25, 0.3, 1 / 3]))
seeds = st.integers(0, 2**63)


@given(st.data(), counts, seeds, st.integers(1, 300))
def test_shares_hold_to_one_record_in_every_prefix(
    data: st.DataObject, counts: dict[str, int], seed: int, n: int
) -> None:
    weights = {name: data.draw(weight) for name in counts}
    stream = Curriculum(counts, weights, seed)
    total = sum(weights.values())
    seen: Counter[str] = Counter()
    for position, (category, _) in enumerate(islice(stream.iterate(), n), start=1):
        seen[category] += 1
        for name in counts:
            assert abs(seen[name] - position * weights[name] / total) < 1 + 1e-9
        assert stream.counts(position) == seen


@given(counts, seeds)
def test_no_record_returns_before_its_category_is_through(counts: dict[str, int], seed: int) -> None:
    stream = Curriculum(counts, dict.fromkeys(counts, 1), seed)
    passes = {name: [] for name in counts}
    for category, index in islice(stream.iterate(), 5 * sum(counts.values())):
        passes[category].append(index)
    for name, indices in passes.items():
        size = counts[name]
        for start in range(0, len(indices) - size + 1, size):
            assert sorted(indices[start : start + size]) == list(range(size))


@given(st.data(), counts, seeds, st.integers(0, 2000))
def test_a_position_gives_the_same_entry_however_it_is_reached(
    data: st.DataObject, counts: dict[str, int], seed: int, start: int
) -> None:
    weights = {name: data.draw(weight) for name in counts}
    walked = list(islice(Curriculum(counts, weights, seed).iterate(), start, start + 20))
    assert list(islice(Curriculum(counts, weights, seed).iterate(start), 20)) == walked
    fresh = Curriculum(counts, weights, seed)
    assert [fresh[position] for position in reversed(range(start, start + 20))] == walked[::-1]


def test_another_seed_or_pass_is_another_order_of_the_same_records() -> None:
    def order(seed: int, start: int) -> list[int]:
        return [index for _, index in islice(Curriculum({"a": 50}, {"a": 1}, seed).iterate(start), 50)]

    orders = [order(0, 0), order(1, 0), order(0, 50), list(range(50))]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_the_order_stays_the_same_in_later_releases() -> None:
    stream = Curriculum({"a": 5, "b": 3}, {"a": 0.7, "b": 0.3}, seed=1)
    assert [f"{category}{index}" for category, index in islice(stream.iterate(), 10)] == [
        *("a2", "a3", "b0", "a1", "a0", "b2", "a4", "a2", "a1", "b1")
    ]


def test_categories_without_records_are_left_out_and_the_rest_share() -> None:
    stream = Curriculum({"a": 4, "b": 0, "d": 9}, {"a": 30, "b": 20, "c": 40, "d": 10, "e": 0}, seed=0)
    assert stream.asked == {"a": 0.3, "b": 0.2, "c": 0.4, "d": 0.1}
    assert stream.weights == {"a": 0.75, "d": 0.25}
    assert stream.counts(1000) == {"a": 750, "d": 250}


def test_a_far_position_of_a_plain_mixture_is_reached_at_once() -> None:
    stream = Curriculum({"a": 1000, "b": 10}, {"a": 0.8, "b": 0.2}, seed=0)
    assert stream.counts(10**15) == {"a": 8 * 10**14, "b": 2 * 10**14}
    assert stream[10**15][0] in "ab"
    with pytest.raises(IndexError):
        stream[-1]


@pytest.mark.parametrize(
    ("counts", "weights", "message"),
    [
        ({"a": 3}, {"b": 1}, r"no category has both a weight and records: weights b 1; records a 3"),
        ({"a": 3}, {"a": 0}, "no category has both"),
        ({}, {}, "weights none; records none"),
        ({"a": 3}, {"a": -1}, "the weight of 'a' is -1"),
        ({"a": 3}, {"a": float("nan")}, "the weight of 'a' is nan"),
        ({"a": 3}, {"a": float("inf")}, "the weight of 'a' is inf"),
    ],
)
def test_mixtures_that_cannot_be_are_refused(
    counts: dict[str, int], weights: dict[str, float], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Curriculum(counts, weights, seed=0)
