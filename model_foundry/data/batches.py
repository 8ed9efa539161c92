"""Which rows make up which micro-batch: a pure function of the lengths, the seed and an integer position.

Nothing here is a generator or keeps a cursor, so a resumed run asks for position 1,234 and gets what the undisturbed
run got. Knows lengths only, never tokens.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from model_foundry.errors import DataError


class BatchPlan:
    """The order of a data set, epoch after epoch.

    Without packing a micro-batch is `batch_size` rows. With packing rows are put into bins of at most `max_length`
    tokens once, and a micro-batch is `batch_size` bins. Rows (or bins) are shuffled anew every epoch; the last
    micro-batch of an epoch may be short, so every row comes exactly once an epoch.

    Args:
        lengths: tokens of each row, int [num_rows].
        batch_size: rows, or bins with packing, in a micro-batch.
        max_length: capacity of a bin in tokens.
        packing: fill bins instead of taking rows one by one.
        shuffle: a new order every epoch; otherwise the order of the file (of the bins with packing).
        seed: decides the order, together with the epoch.

    Raises:
        DataError: no rows, or with packing a row longer than a bin.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        *,
        batch_size: int,
        max_length: int,
        packing: bool = False,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        if self.lengths.size == 0:
            raise DataError("there are no rows to make batches of")
        self.batch_size = batch_size
        self.max_length = max_length
        self._shuffle = shuffle
        self._seed = seed
        bin_of_row = pack_rows(self.lengths, capacity=max_length) if packing else np.arange(self.lengths.size)
        self.num_bins = int(bin_of_row.max()) + 1
        # Rows sorted by bin, and where each bin starts: a bin's rows are one slice.
        self._rows_by_bin = np.argsort(bin_of_row, kind="stable")
        self._bin_starts = np.searchsorted(bin_of_row[self._rows_by_bin], np.arange(self.num_bins + 1))
        self._order = lru_cache(maxsize=2)(self._compute_order)

    @property
    def num_rows(self) -> int:
        return int(self.lengths.size)

    @property
    def num_batches_per_epoch(self) -> int:
        return -(-self.num_bins // self.batch_size)

    @property
    def fill(self) -> float:
        """Share of the room in an epoch's micro-batches (batch_size × max_length tokens each) that tokens take."""
        room = self.num_batches_per_epoch * self.batch_size * self.max_length
        return float(self.lengths.sum()) / room

    def epoch(self, position: int) -> int:
        """The epoch that global micro-batch `position` belongs to."""
        return position // self.num_batches_per_epoch

    def first_batch_of(self, epoch: int) -> int:
        """The position of an epoch's first micro-batch."""
        return epoch * self.num_batches_per_epoch

    def rows(self, position: int) -> list[int]:
        """Row indices of global micro-batch `position`, counted from 0 over all epochs."""
        epoch, index = divmod(position, self.num_batches_per_epoch)
        bins = self._order(epoch)[index * self.batch_size : (index + 1) * self.batch_size]
        return [int(row) for b in bins for row in self._rows_by_bin[self._bin_starts[b] : self._bin_starts[b + 1]]]

    def longest_batch_position(
        self, tokens: Sequence[int] | np.ndarray | None = None, *, num_batches: int | None = None
    ) -> int:
        """The position of the micro-batch with the most tokens.

        Args:
            tokens: tokens of each row, int [num_rows]; default the lengths the plan was made with.
            num_batches: how many positions to look at, from 0 on; default one epoch.
        """
        per_row = self.lengths if tokens is None else np.asarray(tokens, dtype=np.int64)
        per_bin = np.add.reduceat(per_row[self._rows_by_bin], self._bin_starts[:-1])
        starts = np.arange(0, self.num_bins, self.batch_size)
        left = self.num_batches_per_epoch if num_batches is None else num_batches
        best, most = 0, -1
        for epoch in range(-(-left // self.num_batches_per_epoch) if self._shuffle else 1):
            first = self.first_batch_of(epoch)
            per_batch = np.add.reduceat(per_bin[self._order(epoch)], starts)[: left - first]
            longest = int(np.argmax(per_batch))
            if per_batch[longest] > most:
                best, most = first + longest, int(per_batch[longest])
        return best

    def _compute_order(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(self.num_bins)
        # Sorting a counter-based stream: Philox's bits are fixed across numpy versions, its permutations are not.
        draws = np.random.Philox(key=np.array([self._seed, epoch], dtype=np.uint64)).random_raw(self.num_bins)
        return np.argsort(draws, kind="stable")


def pack_rows(lengths: np.ndarray, *, capacity: int) -> np.ndarray:
    """Best-fit decreasing (Johnson 1973): the bin of each row, int64 [num_rows]; no bin holds over `capacity` tokens.

    Raises:
        DataError: a row is longer than a bin.
    """
    if int(lengths.max()) > capacity:
        row = int(np.argmax(lengths))
        raise DataError(
            f"row {row} has {int(lengths[row])} tokens and cannot go into a bin of {capacity}",
            hint="Raise data.max_length, or drop or truncate longer rows",
        )
    bin_of_row = np.empty(lengths.size, dtype=np.int64)
    bins_with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms: list[int] = []  # sorted room values that some bin has
    num_bins = 0
    descending = np.argsort(-lengths, kind="stable")
    for row, length in zip(descending.tolist(), lengths[descending].tolist(), strict=True):
        place = bisect_left(rooms, length)
        if place == len(rooms):
            bin_index, room = num_bins, capacity
            num_bins += 1
        else:
            room = rooms[place]
            bin_index = bins_with_room[room].pop()
            if not bins_with_room[room]:
                del rooms[place]
        bin_of_row[row] = bin_index
        left = room - length
        if not bins_with_room[left]:
            insort(rooms, left)
        bins_with_room[left].append(bin_index)
    return bin_of_row
