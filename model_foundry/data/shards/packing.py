"""Rows into bins of at most `capacity` tokens, while rows keep coming: best fit over a window of tokens.

When the window is full its rows are packed best-fit decreasing. Bins that came out full are closed and written; rows of
the others stay for the next window, where new rows may fit beside them. So the fill does not depend on where windows
end, and memory depends on the window alone. Knows lengths and positions, not what tokens mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from model_foundry.data.batches import pack_rows

FULL_SHARE = 0.998
"""A bin is closed before the last window when it is at least so full."""
GOES_ON = (1 << 64) - 1
"""In `Segments.rows` of text: not a new document but more of the one that an earlier segment began."""


@dataclass(frozen=True, slots=True)
class Segments:
    """Rows (or pieces of rows), end to end.

    Attributes:
        tokens: [N], ids of all segments.
        lengths: int64 [S], tokens of each.
        rows: uint64 [S], the record each came from, as the format stores it.
        spans: int64 [M, 3], sorted: segment, first and end of each stretch of trained tokens, within the segment.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray
    spans: np.ndarray

    @staticmethod
    def empty(dtype: np.dtype[Any]) -> Segments:
        spans = np.zeros((0, 3), dtype=np.int64)
        return Segments(np.zeros(0, dtype=dtype), np.zeros(0, np.int64), np.zeros(0, np.uint64), spans)

    @staticmethod
    def joined(parts: Sequence[Segments]) -> Segments:
        """All segments of `parts` (at least one) in order."""
        counts = np.cumsum([0, *(len(part.lengths) for part in parts)])
        shifted = [part.spans + [count, 0, 0] for part, count in zip(parts, counts[:-1], strict=True)]
        return Segments(
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([part.lengths for part in parts]),
            np.concatenate([part.rows for part in parts]),
            np.concatenate(shifted),
        )

    @property
    def starts(self) -> np.ndarray:
        """int64 [S]: where each segment begins."""
        return np.cumsum(self.lengths) - self.lengths

    @property
    def num_trained(self) -> int:
        """Tokens that can be trained: the first of a segment has nothing before it to be foretold from."""
        spans = self.spans
        return int((spans[:, 2] - np.maximum(spans[:, 1], 1)).clip(0).sum())

    def weights(self) -> np.ndarray:
        """uint8 [ceil(N / 8)]: a bit a token, lowest first, set where the token is trained."""
        steps = np.zeros(len(self.tokens) + 1, dtype=np.int8)
        places = self.starts[self.spans[:, 0]] if len(self.spans) else np.zeros(0, dtype=np.int64)
        # Spans lie apart, so no place is counted twice, except where one begins as another ends.
        np.add.at(steps, places + self.spans[:, 1], 1)
        np.add.at(steps, places + self.spans[:, 2], -1)
        return np.packbits(np.cumsum(steps[:-1], dtype=np.int8).view(np.bool_), bitorder="little")

    def take(self, order: np.ndarray) -> Segments:
        """These segments in this order; others are left out."""
        starts, ends = self.starts, np.cumsum(self.lengths)
        slices = [self.tokens[start:end] for start, end in zip(starts[order], ends[order], strict=True)]
        place = np.full(len(self.lengths), -1, dtype=np.int64)
        place[order] = np.arange(len(order))
        spans = self.spans.copy()
        spans[:, 0] = place[spans[:, 0]]
        spans = spans[spans[:, 0] >= 0]
        return Segments(
            np.concatenate([self.tokens[:0], *slices]),
            self.lengths[order],
            self.rows[order],
            spans[np.argsort(spans[:, 0], kind="stable")],
        )


@dataclass(frozen=True, slots=True)
class Packed:
    """Closed bins: their segments in order, and the first segment of each, int64 [num_bins]."""

    segments: Segments
    bins: np.ndarray


class RowWindow:
    """Rows waiting to be packed.

    Args:
        capacity: tokens of a bin; no segment is longer.
        num_tokens: the window is full when it holds so many tokens.
        waiting: rows that wait already.
    """

    def __init__(self, *, capacity: int, num_tokens: int, waiting: Segments) -> None:
        self._capacity = capacity
        self._max_tokens = num_tokens
        self._waiting = waiting
        self._added: list[Segments] = []
        self._num_added = 0

    @property
    def is_full(self) -> bool:
        return len(self._waiting.tokens) + self._num_added >= self._max_tokens

    @property
    def waiting(self) -> Segments:
        """What waits after `close`: to be kept with what was written, so that a restart can go on."""
        return self._waiting

    def add(self, segments: Segments) -> None:
        self._added.append(segments)
        self._num_added += len(segments.tokens)

    def close(self, *, is_last: bool) -> Packed:
        """Pack the window and take out the full bins; the last time all of them.

        At least half of a full window is taken out, however badly its rows fit together.
        """
        segments = Segments.joined([self._waiting, *self._added])
        self._added, self._num_added = [], 0
        if len(segments.lengths) == 0:
            return Packed(segments, np.zeros(0, dtype=np.int64))
        bin_of = pack_rows(segments.lengths, capacity=self._capacity)
        used = np.bincount(bin_of, weights=segments.lengths).astype(np.int64)
        is_open = np.zeros(len(used), dtype=bool) if is_last else self._open_bins(used)
        stays = is_open[bin_of]
        first_row = np.full(len(used), np.iinfo(np.int64).max)
        np.minimum.at(first_row, bin_of, np.arange(len(bin_of)))
        # Bins in the order of their first rows, rows in a bin in the order of the input.
        order = np.lexsort((np.arange(len(bin_of)), first_row[bin_of]))
        order = order[~stays[order]]
        self._waiting = segments.take(np.flatnonzero(stays))
        bins = np.flatnonzero(np.diff(first_row[bin_of[order]], prepend=-1))
        return Packed(segments.take(order), bins)

    def _open_bins(self, used: np.ndarray) -> np.ndarray:
        """Which bins stay: the emptiest of those that are not full, up to half a window of tokens."""
        is_open = np.zeros(len(used), dtype=bool)
        emptiest = np.argsort(used, kind="stable")
        emptiest = emptiest[used[emptiest] < FULL_SHARE * self._capacity]
        is_open[emptiest[np.cumsum(used[emptiest]) <= self._max_tokens // 2]] = True
        return is_open
