"""One pass over all datums: where trained runs begin and end, and what is written twice. Arrays only, no text.

A run is a stretch of trained targets within a row. Knows tokens and weights as the engine gets them; does not know
messages, so what it finds suspicious `borders` looks at with the renderer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from model_foundry.types import Datum

ROWS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class Scan:
    """Facts by datum, each [num_datums].

    Attributes:
        num_runs: int64, stretches of trained targets.
        starts_as_expected: bool, every run follows the tokens that a generation prompt ends with.
        ends_in_stop: bool, every run ends with a stop token; the last one may be cut off by truncation.
        num_stops: int64, trained stop tokens.
        is_bos_doubled: bool, a second BOS before anything else, white space aside.
        is_stop_doubled: bool, a trained stop token followed by itself, white space aside.
    """

    num_runs: np.ndarray
    starts_as_expected: np.ndarray
    ends_in_stop: np.ndarray
    num_stops: np.ndarray
    is_bos_doubled: np.ndarray
    is_stop_doubled: np.ndarray


def scan(
    datums: Sequence[Datum],
    *,
    is_truncated: np.ndarray,
    stops: Sequence[int],
    bos: int | None,
    blanks: Sequence[int],
    prompt_end: Sequence[int],
    rows_at_once: int = ROWS_AT_ONCE,
) -> Scan:
    """Look at every datum.

    Args:
        is_truncated: bool [num_datums].
        stops: tokens that end a turn.
        bos: the tokenizer's beginning-of-text token.
        blanks: tokens that are white space.
        prompt_end: the last tokens of every generation prompt; none: nothing is known about where runs begin.
        rows_at_once: rows in a piece; bounds the memory and changes nothing.
    """
    parts: list[tuple[np.ndarray, ...]] = []
    for first, piece in _pieces(datums, rows_at_once):
        cut = is_truncated[first : first + piece.num_rows]
        starts, ends = piece.runs()
        parts.append(
            (
                np.bincount(piece.row_of[starts], minlength=piece.num_rows),
                ~piece.any_row(starts[~piece.follows(starts, prompt_end)]),
                ~piece.any_row(_unended(piece, ends, cut, stops)),
                np.bincount(piece.row_of[piece.trained & np.isin(piece.targets, stops)], minlength=piece.num_rows),
                _bos_doubled(piece, bos, blanks),
                piece.any_row(_stops_doubled(piece, stops, blanks)),
            )
        )
    kinds = (np.int64, bool, bool, np.int64, bool, bool)
    if not parts:
        return Scan(*(np.zeros(0, dtype=kind) for kind in kinds))
    return Scan(*(np.concatenate(column) for column in zip(*parts, strict=True)))


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some rows end to end: `targets[t]` follows `tokens[t]`; positions count over all rows of the piece."""

    tokens: np.ndarray
    targets: np.ndarray
    trained: np.ndarray
    row_of: np.ndarray
    row_starts: np.ndarray
    num_rows: int

    def runs(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the first and of the last target of every run."""
        is_first = np.zeros(self.trained.size + 1, dtype=bool)
        is_first[self.row_starts] = True
        is_first[-1] = True
        before = np.concatenate(([False], self.trained[:-1])) & ~is_first[:-1]
        after = np.concatenate((self.trained[1:], [False])) & ~is_first[1:]
        return np.flatnonzero(self.trained & ~before), np.flatnonzero(self.trained & ~after)

    def any_row(self, positions: np.ndarray) -> np.ndarray:
        """bool [num_rows]: which rows have one of the positions."""
        found = np.zeros(self.num_rows, dtype=bool)
        found[self.row_of[positions]] = True
        return found

    def follows(self, positions: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
        """bool, by position: whether its target comes right after `tokens`; false where there are none to compare."""
        found = np.full(positions.size, bool(tokens))
        for back, token in enumerate(reversed(tokens)):
            place = positions - back
            found &= place >= self.row_starts[self.row_of[positions]]
            found &= self.tokens[np.maximum(place, 0)] == token
        return found


def _pieces(datums: Sequence[Datum], rows_at_once: int) -> Iterator[tuple[int, _Piece]]:
    for first in range(0, len(datums), rows_at_once):
        rows = datums[first : first + rows_at_once]
        lengths = np.array([row.num_tokens for row in rows], dtype=np.int64)
        yield (
            first,
            _Piece(
                tokens=np.concatenate([row.tokens for row in rows]),
                targets=np.concatenate([row.loss_inputs["target_tokens"] for row in rows]),
                trained=np.concatenate([row.loss_inputs["weights"] for row in rows]) > 0,
                row_of=np.repeat(np.arange(len(rows)), lengths),
                row_starts=np.cumsum(lengths) - lengths,
                num_rows=len(rows),
            ),
        )


def _unended(piece: _Piece, ends: np.ndarray, is_truncated: np.ndarray, stops: Sequence[int]) -> np.ndarray:
    """Ends of runs that are not stop tokens, where truncation did not cut them."""
    row = piece.row_of[ends]
    is_row_end = np.concatenate((piece.row_starts[1:], [piece.trained.size]))[row] - 1 == ends
    return ends[~np.isin(piece.targets[ends], stops) & ~(is_truncated[row] & is_row_end)]


def _bos_doubled(piece: _Piece, bos: int | None, blanks: Sequence[int]) -> np.ndarray:
    if bos is None:
        return np.zeros(piece.num_rows, dtype=bool)
    first = piece.row_starts
    lengths = np.diff(np.concatenate((first, [piece.trained.size])))
    second, third = piece.targets[first], piece.targets[np.minimum(first + 1, piece.trained.size - 1)]
    later = np.isin(second, blanks) & (third == bos) & (lengths > 1)
    return (piece.tokens[first] == bos) & ((second == bos) | later)


def _stops_doubled(piece: _Piece, stops: Sequence[int], blanks: Sequence[int]) -> np.ndarray:
    """Positions of trained stop tokens that repeat the one before, with at most one token of white space between."""
    places = np.flatnonzero(piece.trained & np.isin(piece.targets, stops))
    found = np.zeros(places.size, dtype=bool)
    for back in (1, 2):
        before = places - back
        inside = before >= piece.row_starts[piece.row_of[places]]
        before = np.maximum(before, 0)
        same = inside & piece.trained[before] & (piece.targets[before] == piece.targets[places])
        found |= same if back == 1 else same & np.isin(piece.targets[places - 1], blanks)
    return places[found]
