"""Which records share a row: whole records packed into rows of a fixed number of tokens."""

from bisect import bisect_right, insort
from collections import Counter, deque
from collections.abc import Callable, Iterator

from being_vl.data.curriculum import Entry

WINDOW = 256
"""Records looked ahead. On mixed lengths a larger window hardly fills rows better (`python -m benchmarks.packing`)."""
MAX_LEAD = 16
"""Records by which keys of the mixture may be read before their turn, so that rows are fuller; all keys together."""


def pack(draw: Callable[[int], Entry], capacity: int, window: int = WINDOW) -> Iterator[list[Entry]]:
    """Rows without end, each of at most `capacity` tokens.

    A row takes the record that has waited longest. Then it takes the longest record that fits into the rest of the row,
    out of the `window` records that wait, as long as one fits. A key that is too many records ahead of the stream's own
    order is passed over, so that the rows have the stream's mixture. So each record is in one row, none waits for more
    than twice `window` rows, and the rows depend on nothing but the stream.

    Args:
        draw: Gives the next record; its argument is the number of complete rows.
        capacity: Tokens of a row; no record is longer.
        window: Records that wait at any time.
    """
    pool = _Pool()
    num_rows = 0
    while True:
        # Fill the window.
        while len(pool) < window:
            pool.add(draw(num_rows))

        # Begin with the record that has waited longest.
        row = [pool.take_oldest()]
        space = capacity - row[0].length

        # Add the longest that fits, until none does.
        while (entry := pool.take_longest(space)) is not None:
            row.append(entry)
            space -= entry.length
        yield sorted(row, key=lambda entry: entry.position)
        num_rows += 1


class _Pool:
    """The records that wait for a row, and how far each key of the mixture is ahead of the stream's order."""

    def __init__(self) -> None:
        self._entries: dict[int, Entry] = {}
        # Of each key (length, -position) of its records, sorted; the last of equal lengths is the oldest.
        self._lengths: dict[str, list[tuple[int, int]]] = {}
        # Of each key its records in the order of the stream, also those that were taken, up to the oldest that waits.
        self._queues: dict[str, deque[Entry]] = {}
        # Keys in the stream's order, from the record on that it would read next.
        self._stream: deque[str] = deque()
        # Of each key the records taken, less those that the stream's order would have read.
        self._lead: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entry: Entry) -> None:
        """The next record of the stream."""
        insort(self._lengths.setdefault(entry.key, []), (entry.length, -entry.position))
        self._queues.setdefault(entry.key, deque()).append(entry)
        self._entries[entry.position] = entry
        self._stream.append(entry.key)

    def take_oldest(self) -> Entry:
        """The record that has waited longest, of the keys that are not far ahead."""
        oldest_entry = None
        for key, queue in self._queues.items():
            while queue and queue[0].position not in self._entries:
                queue.popleft()
            is_candidate = queue and self._lead[key] <= self._max_lead // 2
            if is_candidate and (oldest_entry is None or queue[0].position < oldest_entry.position):
                oldest_entry = queue[0]
        assert oldest_entry is not None  # the leads add up to 0
        order = self._lengths[oldest_entry.key]
        return self._take(
            oldest_entry.key, bisect_right(order, (oldest_entry.length, -oldest_entry.position)) - 1
        )

    def take_longest(self, space: int) -> Entry | None:
        """The longest record of at most `space` tokens; None if there is none."""
        indices = {
            key: bisect_right(order, (space, 1)) - 1
            for key, order in self._lengths.items()
            if self._lead[key] < self._max_lead
        }
        candidates = [(self._lengths[key][index], key, index) for key, index in indices.items() if index >= 0]
        if not candidates:
            return None
        _, key, index = max(candidates)
        return self._take(key, index)

    @property
    def _max_lead(self) -> int:
        return max(2, MAX_LEAD // max(1, len(self._lengths) - 1))

    def _take(self, key: str, index: int) -> Entry:
        self._lead[key] += 1
        self._lead[self._stream.popleft()] -= 1
        return self._entries.pop(-self._lengths[key].pop(index)[1])
