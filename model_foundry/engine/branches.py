"""Rows that end in branches, as a model reads them: side by side behind what they share, or each as a row of its own.

It knows datums, and nothing of models or losses.

Shapes: T tokens of a datum, N tokens of several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from model_foundry.types import Datum


@dataclass(frozen=True, slots=True)
class LaidRows:
    """Datums as a model reads them.

    Attributes:
        places: int64 [N], where each token of the datums stands in the rows; None where that is in their order.
    """

    rows: list[np.ndarray]
    branches: list[tuple[int, ...]]
    places: np.ndarray | None


BRANCH_COST = 2048
"""Query-key pairs between two branches, which are computed for nothing, that cost as much as reading a token twice."""


def stays_whole(datum: Datum, *, reads_branches: bool) -> bool:
    """Whether a datum is read as one row: a plain one, or one whose branches share enough to stand side by side."""
    wasted = (sum(datum.branches) ** 2 - sum(size**2 for size in datum.branches)) // 2
    return not datum.branches or (reads_branches and wasted < BRANCH_COST * datum.num_shared)


def laid_lengths(datum: Datum, *, reads_branches: bool) -> list[int]:
    """Tokens of each row that a datum is read as."""
    if stays_whole(datum, reads_branches=reads_branches):
        return [datum.num_tokens]
    return [datum.num_shared + size for size in datum.branches]


def lay_out(data: Sequence[Datum], *, reads_branches: bool) -> LaidRows:
    """Rows for a model; where branches are rows of their own, each begins with what they share."""
    rows: list[np.ndarray] = []
    branches: list[tuple[int, ...]] = []
    places: list[np.ndarray] = []
    start = 0
    for datum in data:
        if stays_whole(datum, reads_branches=reads_branches):
            rows.append(datum.tokens)
            branches.append(datum.branches)
            places.append(start + np.arange(datum.num_tokens))
            start += datum.num_tokens
            continue
        shared = datum.num_shared
        places.append(start + np.arange(shared))
        for part in np.split(datum.tokens[shared:], np.cumsum(datum.branches)[:-1]):
            rows.append(np.concatenate([datum.tokens[:shared], part]))
            branches.append(())
            places.append(start + shared + np.arange(part.size))
            start += shared + part.size
    place = np.concatenate(places)
    return LaidRows(rows, branches, None if np.array_equal(place, np.arange(start)) else place)


def answers_of(data: Sequence[Datum]) -> np.ndarray:
    """int64 [N]: for a token with a loss due, which branch of all the data's it belongs to; else how many there are."""
    num_branches = sum(len(datum.branches) for datum in data)
    first, parts = 0, []
    for datum in data:
        numbers = np.arange(first, first + len(datum.branches))
        part = np.concatenate([np.full(datum.num_shared, num_branches), np.repeat(numbers, datum.branches)])
        parts.append(np.where(datum.loss_inputs["weights"] != 0, part, num_branches))
        first += len(datum.branches)
    return np.concatenate(parts).astype(np.int64)


def wrong_branches(datum: Datum, wanted: int) -> str | None:
    """Why a datum cannot be used by a loss of so many branches (0: of tokens, whatever they belong to), or None."""
    if datum.branches and (min(datum.branches) < 1 or datum.num_shared < 0):
        return f"it has {datum.num_tokens} tokens and branches of {datum.branches}"
    if not wanted:
        return None
    if len(datum.branches) != wanted:
        return f"it has {len(datum.branches)} branches, and the loss is of {wanted}"
    weights = datum.loss_inputs["weights"]
    parts = np.split(weights[datum.num_shared :], np.cumsum(datum.branches)[:-1])
    if weights[: datum.num_shared].any() or not all(part.any() for part in parts):
        return "its weights are not on every branch and on nothing else"
    if np.unique(weights[weights != 0]).size > 1:
        return "the tokens of a pair have different weights"
    return None
