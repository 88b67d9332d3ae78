"""Which records share a row: whole records packed into rows of a fixed number of tokens."""

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterator

from being_vl.data.curriculum import Entry

WINDOW = 512
"""Records looked ahead. On mixed lengths more of them hardly fill rows better (`python -m benchmarks.packing`)."""


def pack(draw: Callable[[int], Entry], capacity: int, window: int = WINDOW) -> Iterator[list[Entry]]:
    """Rows without end, each of at most `capacity` tokens.

    A row takes the record that has waited longest, and then, as long as one fits, the longest that fits into what is
    left, out of the `window` records that wait. So each record is in one row, none waits for more than `window` rows,
    and the rows depend on nothing but the stream.

    Args:
        draw: Gives the next record when that many rows are complete.
        capacity: Tokens of a row; no record is longer.
        window: Records that wait at any time.
    """
    # Sorted by length, the last of equal ones is the oldest.
    waiting: list[tuple[int, int]] = []
    entries: dict[int, Entry] = {}
    arrived: deque[int] = deque()
    rows = 0

    def take(place: int) -> Entry:
        return entries.pop(-waiting.pop(place)[1])

    while True:
        while len(waiting) < window:
            entry = draw(rows)
            insort(waiting, (entry.length, -entry.position))
            entries[entry.position] = entry
            arrived.append(entry.position)
        while arrived[0] not in entries:
            arrived.popleft()
        oldest = entries[arrived[0]]
        row = [take(bisect_right(waiting, (oldest.length, -oldest.position)) - 1)]
        left = capacity - row[0].length
        while (place := bisect_right(waiting, (left, 1)) - 1) >= 0:
            row.append(take(place))
            left -= row[-1].length
        yield sorted(row, key=lambda entry: entry.position)
        rows += 1
