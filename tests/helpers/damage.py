"""Damaged files: bits turned, bytes replaced, lengths blown up, parts cut, doubled or swapped; by a seed."""

import random
from collections.abc import Iterator


def damage(data: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """Variations of a file's bytes, each with another kind of damage than the one before; none equals the file.

    Args:
        data: The file.
        count: How many.
        seed: Of the places.
    """
    generator = random.Random(seed)
    kinds = (_turn_bit, _replace_bytes, _blow_up, _cut, _zero, _swap, _double)
    number = 0
    while number < count:
        variation = bytearray(data)
        kinds[number % len(kinds)](variation, generator)
        if variation != data:
            yield bytes(variation)
            number += 1


def _place(data: bytearray, generator: random.Random) -> int:
    """Any place, or one near the beginning or the end, where a file says what it holds."""
    side = min(len(data), 2000)
    places = (
        generator.randrange(len(data)),
        generator.randrange(side),
        len(data) - 1 - generator.randrange(side),
    )
    return generator.choice(places)


def _turn_bit(data: bytearray, generator: random.Random) -> None:
    data[_place(data, generator)] ^= 1 << generator.randrange(8)


def _replace_bytes(data: bytearray, generator: random.Random) -> None:
    for _ in range(generator.choice((1, 3, 30))):
        data[_place(data, generator)] = generator.randrange(256)


def _blow_up(data: bytearray, generator: random.Random) -> None:
    place = _place(data, generator) & ~3
    number = generator.choice((b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff", b"\xff\xff\xff\xff\xff\xff\xff\x7f"))
    data[place : place + len(number)] = number[: len(data) - place]


def _cut(data: bytearray, generator: random.Random) -> None:
    del data[_place(data, generator) :]


def _zero(data: bytearray, generator: random.Random) -> None:
    place = _place(data, generator)
    size = min(generator.choice((1, 8, 200)), len(data) - place)
    data[place : place + size] = bytes(size)


def _swap(data: bytearray, generator: random.Random) -> None:
    first, second, size = _place(data, generator), _place(data, generator), generator.choice((4, 16, 64))
    data[first : first + size], data[second : second + size] = (
        data[second : second + size],
        data[first : first + size],
    )


def _double(data: bytearray, generator: random.Random) -> None:
    place = _place(data, generator)
    data[place:place] = data[place : place + generator.choice((1, 8, 64))]
