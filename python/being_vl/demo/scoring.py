"""Scores of answers, and what they have to be compared with."""

import re
from collections import Counter
from collections.abc import Collection, Sequence


def normalised(answer: str) -> str:
    """Lower case, single spaces, none before punctuation, no full stop at the end."""
    text = " ".join(answer.lower().split())
    return re.sub(r"\s+([.,;:?!])", r"\1", text).rstrip(" .")


def exact_match(answer: str, reference: str) -> bool:
    """Whether two answers are the same up to case, spaces and the full stop at the end."""
    return normalised(answer) == normalised(reference)


def set_f1(found: Collection[str], expected: Collection[str]) -> float:
    """Harmonic mean of precision and recall, 0 to 1; two empty sets agree."""
    found, expected = set(found), set(expected)
    if not found and not expected:
        return 1.0
    return 2 * len(found & expected) / (len(found) + len(expected))


def majority_share(references: Sequence[str]) -> float:
    """Accuracy, 0 to 1, of always giving the most frequent of the references."""
    counts = Counter(normalised(reference) for reference in references)
    return max(counts.values()) / len(references)
