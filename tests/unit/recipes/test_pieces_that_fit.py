"""A batch is split where the free memory asks for it, and no further than that."""

from __future__ import annotations

import pytest

from model_foundry.recipes.plan import pieces_that_fit

LENGTHS = [300, 200, 100, 100, 100]


@pytest.mark.parametrize("room, tokens", [(1000, None), (801, None), (799, 400), (400, 400), (399, 300), (10, 300)])
def test_pieces_are_as_large_as_fit_and_hold_the_longest_row(room: int, tokens: int | None) -> None:
    """Prevents a run that Linux ends, and pieces that are smaller than a row or than they need to be."""
    found = pieces_that_fit(LENGTHS, lambda tokens: tokens or sum(LENGTHS), room_bytes=room)
    assert found == tokens
