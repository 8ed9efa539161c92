"""Rows of token ids as one rectangle: cut to a length, filled up to a length, with a mask of what is real.

Knows ids; does not know text, tokenizers or what a token means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Side = Literal["left", "right"]


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one length.

    Attributes:
        ids_BT: int32 [B, T].
        mask_BT: bool [B, T]: True where a token stands, False where the row was filled up.
        num_cut_B: int64 [B]: tokens that each row lost because it was too long.
    """

    ids_BT: np.ndarray
    mask_BT: np.ndarray
    num_cut_B: np.ndarray

    @property
    def num_tokens_B(self) -> np.ndarray:
        """int64 [B]: tokens of each row, without the filling."""
        return self.mask_BT.sum(axis=1)


def truncate(
    ids: Sequence[int], max_length: int, *, frame: tuple[Sequence[int], Sequence[int]] = ((), ()), side: Side = "right"
) -> list[int]:
    """At most `max_length` ids, cut on one side, with the frame around what is left.

    Args:
        ids: the row.
        max_length: tokens, the frame's among them.
        frame: ids put before and after; these are never cut.
        side: where ids are cut off.

    Raises:
        ValueError: the frame alone is longer.
    """
    before, after = frame
    room = max_length - len(before) - len(after)
    if room < 0:
        raise ValueError(f"{max_length} tokens do not hold the {len(before) + len(after)} special tokens around a text")
    kept = list(ids[:room] if side == "right" else ids[max(0, len(ids) - room) :])
    return [*before, *kept, *after]


def pad(
    rows: Sequence[Sequence[int]],
    *,
    pad_id: int,
    length: int | None = None,
    multiple_of: int = 1,
    side: Side = "right",
    num_cut: Sequence[int] | None = None,
) -> Batch:
    """Fill rows up to one length.

    Args:
        rows: token ids, B rows.
        pad_id: what the rows are filled with.
        length: T; default the longest row.
        multiple_of: T is rounded up to a multiple of this.
        side: where rows are filled up. Models that generate want `left`.
        num_cut: how many tokens each row lost before.

    Raises:
        ValueError: a row is longer than `length`.
    """
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    longest = int(lengths.max(initial=0))
    if length is not None and longest > length:
        raise ValueError(f"row {int(lengths.argmax())} has {longest} tokens, more than the {length} asked for")
    width = -(-(longest if length is None else length) // multiple_of) * multiple_of
    places = np.arange(width)
    mask_BT = places < lengths[:, None] if side == "right" else places >= width - lengths[:, None]
    ids_BT = np.full((len(rows), width), pad_id, dtype=np.int32)
    ids_BT[mask_BT] = [token_id for row in rows for token_id in row]
    num_cut_B = np.zeros(len(rows), dtype=np.int64) if num_cut is None else np.array(num_cut, dtype=np.int64)
    return Batch(ids_BT, mask_BT, num_cut_B)
