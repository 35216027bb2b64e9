"""Random choices that are the same for a seed in every version of Python."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

_WORD = (1 << 64) - 1


class Draws:
    """A stream of choices that depends on `parts` alone (SplitMix64, Steele, Lea, Flood 2014)."""

    def __init__(self, *parts: int | str) -> None:
        digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
        self._state = int.from_bytes(digest, "little")

    def below(self, n: int) -> int:
        """A number of 0..n-1."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & _WORD
        x = self._state
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _WORD
        return (x ^ (x >> 31)) * n >> 64

    def between(self, low: int, high: int) -> int:
        """A number of low..high."""
        return low + self.below(high - low + 1)

    def choice(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def chance(self, one_in: int) -> bool:
        """True once in so many times."""
        return self.below(one_in) == 0

    def shuffled(self, items: Sequence[T]) -> list[T]:
        mixed = list(items)
        for last in range(len(mixed) - 1, 0, -1):
            other = self.below(last + 1)
            mixed[last], mixed[other] = mixed[other], mixed[last]
        return mixed
