"""A batch is split where the free memory asks for it, and no further than that; a disk that is too small is said."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from model_foundry.models.memory import MemoryEstimate
from model_foundry.recipes.plan import memory_hint, pieces_that_fit, warn_of_disk

LENGTHS = [300, 200, 100, 100, 100]


@pytest.mark.parametrize("room, tokens", [(1000, None), (801, None), (799, 400), (400, 400), (399, 300), (10, 300)])
def test_pieces_are_as_large_as_fit_and_hold_the_longest_row(room: int, tokens: int | None) -> None:
    """Prevents a run that Linux ends, and pieces that are smaller than a row or than they need to be."""
    found = pieces_that_fit(LENGTHS, lambda tokens: tokens or sum(LENGTHS), room_bytes=room)
    assert found == tokens


def test_nothing_is_split_for_nothing() -> None:
    """Prevents pieces of one row, and their slowness, where something else makes the peak."""
    asking = 900
    assert pieces_that_fit(LENGTHS, lambda _: asking, room_bytes=10) is None
    assert pieces_that_fit(LENGTHS, lambda tokens: max(tokens or sum(LENGTHS), 500), room_bytes=10) == 400
    assert pieces_that_fit(LENGTHS, lambda tokens: max(tokens or sum(LENGTHS), 350), room_bytes=10) == 300


def test_the_part_that_makes_the_peak_is_named() -> None:
    """Prevents the advice to shorten rows where sixteen answers at once are what does not fit."""
    memory = MemoryEstimate(weights=1, gradients=1, optimizer=1, activations=90, logits=5, other=2)
    hint = partial(memory_hint, memory, gradient_checkpointing=False)
    assert "evaluation.batch_size" in hint(unasked=60, unsampled=70)
    assert "evaluation.suites" in hint(unasked=60, unsampled=100)
    assert "data.max_length, or set training.gradient_checkpointing" in hint(unasked=100, unsampled=100)
    large = replace(memory, weights=1000)
    assert "the model itself" in memory_hint(large, unasked=1099, unsampled=1099, gradient_checkpointing=False)


def test_checkpoints_that_will_not_find_room_are_said_before_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Prevents hours that end in a save that the plan knew to be too large."""
    warn_of_disk({"disk_bytes": 1}, tmp_path / "not" / "there")
    assert not caplog.records
    warn_of_disk({"disk_bytes": 10**18}, tmp_path / "not" / "there")
    assert "not/there: the run writes up to" in caplog.text
    assert "lower training.save_total_limit" in caplog.text
