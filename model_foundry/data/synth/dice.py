"""Chance that is a pure function of a seed and a place, so that no library's generator decides what a row says."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import TypeVar

T = TypeVar("T")


class Dice:
    """Numbers drawn from sha256 of (seed, place, count). Row 7 is the same whether rows 1 to 6 were made or not."""

    def __init__(self, seed: int, *place: object) -> None:
        self._key = "/".join(map(str, (seed, *place)))
        self._count = 0

    def below(self, bound: int) -> int:
        """A whole number from 0 to bound - 1."""
        self._count += 1
        digest = sha256(f"{self._key}#{self._count}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % bound

    def pick(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def chance(self, percent: int) -> bool:
        return self.below(100) < percent

    def several(self, items: Sequence[T], count: int) -> list[T]:
        """`count` different items in chance order (the beginning of Fisher's and Yates's shuffle)."""
        made = list(items)
        for index in range(count):
            other = index + self.below(len(made) - index)
            made[index], made[other] = made[other], made[index]
        return made[:count]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """All items in another order."""
        return self.several(items, len(items))
