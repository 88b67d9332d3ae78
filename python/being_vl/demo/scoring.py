"""Scores of answers, and what they have to be compared with."""

import re
from collections import Counter
from collections.abc import Collection, Sequence


def normalise(answer: str) -> str:
    """Lower case, single spaces, none before punctuation, no full stop at the end."""
    text = " ".join(answer.lower().split())
    return re.sub(r"\s+([.,;:?!])", r"\1", text).rstrip(" .")


def exact_match(answer: str, reference: str) -> bool:
    """Whether two answers are the same up to case, spaces and the full stop at the end."""
    return normalise(answer) == normalise(reference)


def set_f1(items: Collection[str], reference: Collection[str]) -> float:
    """Harmonic mean of the precision and recall of `items`, 0 to 1; two empty sets agree."""
    items, reference = set(items), set(reference)
    if not items and not reference:
        return 1.0
    return 2 * len(items & reference) / (len(items) + len(reference))


def majority_share(references: Sequence[str]) -> float:
    """Accuracy, 0 to 1, of always giving the most frequent of the references."""
    counts = Counter(normalise(reference) for reference in references)
    return max(counts.values()) / len(references)
