"""The order of the records, over all mixtures that hypothesis finds."""

from collections import Counter
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from being_vl.data.curriculum import Curriculum, Entry, assign_groups
from being_vl.data.sequences import RecordGroup
from being_vl.errors import ConfigError

NAMES = ("foundation", "perception", "reasoning", "instruction", "extra")
counts = st.dictionaries(st.sampled_from(NAMES), st.integers(1, 12), min_size=1)
weight = st.one_of(st.integers(1, 100), st.floats(1e-3, 1e3), st.sampled_from([0.1, 0.25, 0.3, 1 / 3]))
seeds = st.integers(0, 2**63)
MAX_LENGTH = 2000


def records(counts: Mapping[str, int], seed: int = 0) -> dict[RecordGroup, np.ndarray]:
    """Lengths of that many records of each category."""
    generator = np.random.default_rng(seed)
    return {
        RecordGroup(name, "file", False): generator.integers(20, MAX_LENGTH + 1, count).astype(np.int32)
        for name, count in counts.items()
    }


def draw(stream: Curriculum, n: int) -> list[Entry]:
    return [stream.draw() for _ in range(n)]


@given(st.data(), counts, seeds, st.integers(1, 300))
def test_shares_of_records_hold_to_one_record_in_every_prefix(
    data: st.DataObject, counts: dict[str, int], seed: int, n: int
) -> None:
    weights = {name: data.draw(weight) for name in counts}
    total = sum(weights.values())
    entry_counts: Counter[str] = Counter()
    for position, entry in enumerate(draw(Curriculum(records(counts), weights, seed), n), start=1):
        assert entry.position == position - 1
        entry_counts[entry.key] += 1
        for name in counts:
            assert abs(entry_counts[name] - position * weights[name] / total) < 1 + 1e-9


@given(st.data(), counts, seeds, st.integers(1, 300))
def test_shares_of_tokens_hold_to_the_longest_record_in_every_prefix(
    data: st.DataObject, counts: dict[str, int], seed: int, n: int
) -> None:
    weights = {name: data.draw(weight) for name in counts}
    lengths = records(counts, seed % 1000)
    total = sum(weights.values())
    entry_counts: Counter[str] = Counter()
    for entry in draw(Curriculum(lengths, weights, seed, unit="tokens"), n):
        assert entry.length == lengths[entry.group][entry.number]
        entry_counts[entry.key] += entry.length
        for name in counts:
            assert abs(entry_counts[name] - entry_counts.total() * weights[name] / total) < MAX_LENGTH + 1e-6


@settings(max_examples=8)
@given(st.data(), st.sampled_from(["records", "tokens"]))
def test_realised_shares_are_within_half_a_percent_over_ten_thousand_records(
    data: st.DataObject, unit: str
) -> None:
    counts = {name: data.draw(st.integers(1, 5000)) for name in NAMES}
    start, end = ({name: data.draw(st.integers(0, 100)) for name in NAMES} for _ in range(2))
    start["foundation"] = end["foundation"] = 7
    if unit == "tokens":  # rows of other lengths bend the line
        end = start
    stream = Curriculum(records(counts), start, 0, end, total=10_000, unit=unit)
    entry_counts: Counter[str] = Counter()
    for row in range(10_000):
        entry = stream.draw(row)
        entry_counts[entry.key] += entry.length if unit == "tokens" else 1
    for name in NAMES:  # the mean of a line is that of its ends
        mean_share = (start[name] / sum(start.values()) + end[name] / sum(end.values())) / 2
        assert abs(entry_counts[name] / entry_counts.total() - mean_share) < 0.005


def test_schedule_goes_from_one_mixture_to_the_other_in_a_line() -> None:
    stream = Curriculum(records({"a": 40, "b": 60}), {"a": 1}, 0, {"a": 1, "b": 3}, total=1000)
    assert stream.weights == {"a": 1.0}
    assert stream.end == {"a": 0.25, "b": 0.75}
    entries = [stream.draw(row) for row in range(1000)]
    for first in range(0, 1000, 100):
        num_entries = sum(entry.key == "b" for entry in entries[first : first + 100])
        assert abs(num_entries - 75 * (first + 50) / 1000) <= 1.5


@given(counts, seeds)
def test_no_record_returns_before_its_category_is_through(counts: dict[str, int], seed: int) -> None:
    passes: dict[str, list[int]] = {name: [] for name in counts}
    stream = Curriculum(records(counts), dict.fromkeys(counts, 1), seed)
    for entry in draw(stream, 5 * sum(counts.values())):
        passes[entry.key].append(entry.number)
    for name, indices in passes.items():
        size = counts[name]
        for start in range(0, len(indices) - size + 1, size):
            assert sorted(indices[start : start + size]) == list(range(size))


def test_another_seed_or_pass_is_another_order_of_the_same_records() -> None:
    def order(seed: int, start: int) -> list[int]:
        entries = draw(Curriculum(records({"a": 50}), {"a": 1}, seed), start + 50)
        return [entry.number for entry in entries[start:]]

    orders = [order(0, 0), order(1, 0), order(0, 50), list(range(50))]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize("scale", [1, 0.1, 30])
def test_the_order_stays_the_same_in_later_releases(scale: float) -> None:
    stream = Curriculum(records({"a": 5, "b": 3}), {"a": 7 * scale, "b": 3 * scale}, seed=1)
    assert [f"{entry.key}{entry.number}" for entry in draw(stream, 10)] == [
        *("a2", "a3", "b0", "a1", "a0", "b2", "a4", "a2", "a1", "b1")
    ]


def test_a_key_is_a_category_a_source_or_text_only() -> None:
    a, b = RecordGroup("foundation", "llava", False), RecordGroup("foundation", "coco", False)
    text, other = RecordGroup("foundation", "llava", True), RecordGroup("reasoning", "coco", True)
    groups = [a, b, text, other]
    assert assign_groups(["foundation"], groups) == {"foundation": [b, a, text]}
    assert assign_groups(["foundation", "text_only"], groups) == {
        "foundation": [b, a],
        "text_only": [text, other],
    }
    assert assign_groups(["foundation", "foundation/llava"], groups) == {
        "foundation": [b],
        "foundation/llava": [a, text],
    }
    lengths = {group: np.full(10, 5, np.int32) for group in groups}
    stream = Curriculum(lengths, {"foundation": 90, "text_only": 10}, seed=0)
    counts = Counter(entry.group.text_only for entry in draw(stream, 100))
    assert counts == {False: 90, True: 10}
    curriculum = Curriculum(lengths, {"foundation": 1, "foundation/coco": 0}, seed=0)
    assert {entry.group for entry in draw(curriculum, 40)} == {a, text}
    assert curriculum.keys == {"foundation": 20}


def test_without_a_mixture_each_category_has_its_size() -> None:
    lengths = records({"a": 30, "b": 10})
    assert Curriculum(lengths, {}, 0).weights == {"a": 0.75, "b": 0.25}
    sizes = [int(group_lengths.sum()) for group_lengths in lengths.values()]
    weights = Curriculum(lengths, {}, 0, unit="tokens").weights
    assert weights == {"a": sizes[0] / sum(sizes), "b": sizes[1] / sum(sizes)}


def test_categories_without_records_are_left_out_and_the_rest_share() -> None:
    mixture = {"a": 30, "b": 20, "c": 40, "d": 10, "e": 0}
    stream = Curriculum(records({"a": 4, "b": 0, "d": 9}), mixture, seed=0)
    assert stream.weights == {"a": 0.75, "d": 0.25}
    assert Counter(entry.key for entry in draw(stream, 1000)) == {"a": 750, "d": 250}


@pytest.mark.parametrize(
    ("counts", "weights", "message"),
    [
        ({"a": 3}, {"b": 1}, r"no category has both a weight and records: weights b 1; records of none"),
        ({"a": 3}, {"a": 0}, "no category has both"),
        ({}, {}, "weights none; records of none"),
        ({"a": 3}, {"a": -1}, "the weight of 'a' is -1"),
        ({"a": 3}, {"a": float("nan")}, "the weight of 'a' is nan"),
        ({"a": 3}, {"a": float("inf")}, "the weight of 'a' is inf"),
    ],
)
def test_mixtures_that_cannot_be_are_refused(
    counts: dict[str, int], weights: dict[str, float], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Curriculum(records(counts), weights, seed=0)
