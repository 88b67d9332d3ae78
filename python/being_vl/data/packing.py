"""Which records share a row: whole records packed into rows of a fixed number of tokens."""

from bisect import bisect_right, insort
from collections import Counter, deque
from collections.abc import Callable, Iterator

from being_vl.data.curriculum import Entry

WINDOW = 256
"""Records looked ahead. On mixed lengths more of them hardly fill rows better (`python -m benchmarks.packing`)."""
AHEAD = 16
"""Records by which keys of the mixture may be read before their turn for the sake of fuller rows; all keys together."""


def pack(draw: Callable[[int], Entry], capacity: int, window: int = WINDOW) -> Iterator[list[Entry]]:
    """Rows without end, each of at most `capacity` tokens.

    A row takes the record that has waited longest, and then, as long as one fits, the longest that fits into what is
    left, out of the `window` records that wait. A key of which more has been read than the stream would have brought in
    its own order is passed over, lest the rows' mixture be another than the stream's. So each record is in one row,
    none waits for more than twice `window` rows, and the rows depend on nothing but the stream.

    Args:
        draw: Gives the next record when that many rows are complete.
        capacity: Tokens of a row; no record is longer.
        window: Records that wait at any time.
    """
    # Of each key those that wait, sorted by length; the last of equal ones is the oldest.
    waiting: dict[str, list[tuple[int, int]]] = {}
    arrived: dict[str, deque[Entry]] = {}
    entries: dict[int, Entry] = {}
    # Keys of the records from the one on that would be read next in the stream's order.
    stream: deque[str] = deque()
    # Records of each key read, less those that would have been in the stream's order.
    ahead: Counter[str] = Counter()
    rows = 0

    def take(key: str, place: int) -> Entry:
        ahead[key] += 1
        ahead[stream.popleft()] -= 1
        return entries.pop(-waiting[key].pop(place)[1])

    while True:
        while len(entries) < window:
            entry = draw(rows)
            insort(waiting.setdefault(entry.key, []), (entry.length, -entry.position))
            arrived.setdefault(entry.key, deque()).append(entry)
            entries[entry.position] = entry
            stream.append(entry.key)
        most = max(2, AHEAD // max(1, len(waiting) - 1))
        first = None
        for key, found in arrived.items():
            while found and found[0].position not in entries:
                found.popleft()
            if found and ahead[key] <= most // 2 and (first is None or found[0].position < first.position):
                first = found[0]
        assert first is not None  # what is ahead adds up to 0
        row = [take(first.key, bisect_right(waiting[first.key], (first.length, -first.position)) - 1)]
        left = capacity - first.length
        while True:
            places = {
                key: bisect_right(found, (left, 1)) - 1 for key, found in waiting.items() if ahead[key] < most
            }
            fitting = [(waiting[key][place], key, place) for key, place in places.items() if place >= 0]
            if not fitting:
                break
            _, key, place = max(fitting)
            row.append(take(key, place))
            left -= row[-1].length
        yield sorted(row, key=lambda entry: entry.position)
        rows += 1
