"""Many small sets of 32-bit hashes, kept to be compared exactly: in memory up to a limit, then in a temporary file.

Knows nothing of what the hashes stand for.
"""

from __future__ import annotations

import tempfile
from typing import BinaryIO

import numpy as np

MEMORY_BYTES = 256 << 20
SLAB_MEMBERS = 1 << 15
PARITY_WORDS = 16
_PARITY_SHIFT = np.uint64(32 - 10)


class SetStore:
    """Sets are appended in order and numbered from 0; after `close_writing` they can be taken and compared.

    Args:
        memory_bytes: members beyond this go to an unnamed file in the system's temporary folder, 4 bytes each.
    """

    def __init__(self, *, memory_bytes: int = MEMORY_BYTES) -> None:
        self._memory_bytes = memory_bytes
        self._parts: list[np.ndarray] = []
        self._held_bytes = 0
        self._file: BinaryIO | None = None
        self._all_sizes: list[np.ndarray] = []
        self._members = np.empty(0, np.uint32)
        self._starts = np.empty(0, np.int64)
        self.sizes = np.empty(0, np.int64)

    def append(self, members: np.ndarray, sizes: np.ndarray) -> None:
        """Sets one after the other: `members` uint32, ascending and distinct within each; `sizes` int64."""
        self._all_sizes.append(sizes)
        self._parts.append(members)
        self._held_bytes += members.nbytes
        if self._held_bytes > self._memory_bytes:
            self._spill()

    def close_writing(self) -> None:
        if self._file is not None:
            self._spill()
            self._file.flush()
            self._members = np.memmap(self._file, np.uint32, mode="r")
        elif self._parts:
            self._members = np.concatenate(self._parts)
        self._parts = []
        self.sizes = np.concatenate(self._all_sizes) if self._all_sizes else self.sizes
        self._starts = np.cumsum(self.sizes) - self.sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def keys(self, numbers: np.ndarray) -> np.ndarray:
        """uint64: the members of these sets, the place in `numbers` in the upper 32 bits."""
        sizes = self.sizes[numbers]
        ends = np.cumsum(sizes)
        total = int(ends[-1]) if len(ends) else 0
        places = np.arange(total) + np.repeat(self._starts[numbers] - (ends - sizes), sizes)
        above = np.repeat(np.arange(len(numbers), dtype=np.uint64) << np.uint64(32), sizes)
        return above | self._members[places]

    def jaccard(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """float64 [pairs]: |A ∩ B| / |A ∪ B| of each pair of sets; 0 where both are empty."""
        similarity = np.empty(len(first))
        for piece in slabs(self.sizes[first] + self.sizes[second], SLAB_MEMBERS):
            similarity[piece] = self._jaccard(first[piece], second[piece])
        return similarity

    def _jaccard(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        both = np.concatenate([self.keys(first), self.keys(second)])
        both.sort()
        total = self.sizes[first] + self.sizes[second]
        twice = np.flatnonzero(both[1:] == both[:-1])
        shared = np.diff(np.searchsorted(twice, np.cumsum(total)), prepend=0)
        return shared / np.maximum(total - shared, 1)

    def parities(self, numbers: np.ndarray) -> np.ndarray:
        """uint64 [sets, PARITY_WORDS]: 1,024 bits a set, each telling whether an odd number of its members fall there.

        The bits in which two sets differ are at most as many as the members in which they differ, which is a bound on
        their similarity for a hundredth of the work (bitmap filter: Sandes, Teodoro and Melo 2017).
        """
        found = np.empty((len(numbers), PARITY_WORDS), np.uint64)
        for slab in slabs(self.sizes[numbers], SLAB_MEMBERS):
            places = self.keys(numbers[slab]) >> _PARITY_SHIFT  # ascending, as the members are
            starts = np.flatnonzero(run_starts(places))
            odd = np.diff(starts, append=len(places)) & 1 == 1
            bits = np.zeros((slab.stop - slab.start) * PARITY_WORDS * 64, bool)
            bits[places[starts[odd]].astype(np.int64)] = True
            found[slab] = np.packbits(bits).view(np.uint64).reshape(-1, PARITY_WORDS)
        return found

    def _spill(self) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="foundry-sets-")  # noqa: SIM115 (open as long as the store)
        for part in self._parts:
            self._file.write(part.data)
        self._parts, self._held_bytes = [], 0


def slabs(sizes: np.ndarray, limit: int) -> list[slice]:
    """Cut items of these sizes into runs of at most `limit` together, but at least one item each."""
    ends = np.cumsum(sizes)
    found, start, before = [], 0, 0
    while start < len(sizes):
        stop = max(start + 1, int(np.searchsorted(ends, before + limit, side="right")))
        found.append(slice(start, stop))
        start, before = stop, int(ends[stop - 1])
    return found


def run_starts(ascending: np.ndarray) -> np.ndarray:
    """bool: where a run of equal values begins."""
    starts = np.ones(len(ascending), bool)
    np.not_equal(ascending[1:], ascending[:-1], out=starts[1:])
    return starts
