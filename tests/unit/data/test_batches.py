"""Order, epochs and packing: pure functions of lengths, seed and position; every row once an epoch."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_foundry.data.batches import BatchPlan, pack_rows
from model_foundry.errors import DataError

LENGTHS = st.lists(st.integers(0, 64), min_size=1, max_size=80)
FLAGS = {
    "batch_size": st.integers(1, 9),
    "packing": st.booleans(),
    "shuffle": st.booleans(),
    "seed": st.integers(0, 2**32 - 1),
}


@given(lengths=LENGTHS, epoch=st.integers(0, 5), **FLAGS)
@settings(max_examples=80, deadline=None)
def test_every_row_comes_exactly_once_an_epoch(
    lengths: list[int], epoch: int, batch_size: int, packing: bool, shuffle: bool, seed: int
) -> None:
    plan = BatchPlan(lengths, batch_size=batch_size, max_length=64, packing=packing, shuffle=shuffle, seed=seed)
    first = plan.first_batch_of(epoch)
    batches = [plan.rows(position) for position in range(first, first + plan.num_batches_per_epoch)]
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert all(batches)
    assert {plan.epoch(position) for position in range(first, first + plan.num_batches_per_epoch)} == {epoch}


@given(lengths=LENGTHS, positions=st.lists(st.integers(0, 200), min_size=1, max_size=6), **FLAGS)
@settings(max_examples=60, deadline=None)
def test_rows_depend_on_seed_and_position_only(
    lengths: list[int], positions: list[int], batch_size: int, packing: bool, shuffle: bool, seed: int
) -> None:
    """A resumed run asks a fresh plan for one position and must get what the undisturbed run got there."""
    options = {"batch_size": batch_size, "max_length": 64, "packing": packing, "shuffle": shuffle, "seed": seed}
    straight = BatchPlan(lengths, **options)
    expected = [straight.rows(position) for position in range(max(positions) + 1)]
    for position in positions:
        assert BatchPlan(lengths, **options).rows(position) == expected[position]


@given(lengths=LENGTHS, capacity=st.integers(64, 200))
@settings(max_examples=80, deadline=None)
def test_packing_never_overfills(lengths: list[int], capacity: int) -> None:
    bins = pack_rows(np.array(lengths), capacity=capacity)
    assert np.bincount(bins, weights=lengths).max() <= capacity
    assert sorted(set(bins.tolist())) == list(range(int(bins.max()) + 1))


@given(lengths=LENGTHS)
@settings(max_examples=40, deadline=None)
def test_packed_batches_hold_at_most_their_room(lengths: list[int]) -> None:
    plan = BatchPlan(lengths, batch_size=3, max_length=64, packing=True, seed=1)
    for position in range(plan.num_batches_per_epoch):
        assert sum(lengths[row] for row in plan.rows(position)) <= 3 * 64


def test_packing_is_tight() -> None:
    lengths = np.random.default_rng(0).integers(10, 500, 5_000)
    plan = BatchPlan(lengths, batch_size=1, max_length=1024, packing=True)
    assert plan.fill > 0.99
    assert plan.num_bins <= 1.01 * lengths.sum() / 1024 + 1


def test_shuffling_changes_with_epoch_and_seed_and_stays_fixed_across_versions() -> None:
    """The order is part of what makes a run repeatable: a change of it is a change of every run."""
    plan = BatchPlan([1] * 8, batch_size=8, max_length=8, seed=7)
    assert plan.rows(0) == [4, 1, 6, 3, 2, 7, 5, 0]
    assert plan.rows(1) != plan.rows(0)
    assert BatchPlan([1] * 8, batch_size=8, max_length=8, seed=8).rows(0) != plan.rows(0)
    assert BatchPlan([1] * 8, batch_size=8, max_length=8, shuffle=False).rows(5) == list(range(8))


def test_the_last_short_batch_is_kept() -> None:
    plan = BatchPlan([1] * 10, batch_size=4, max_length=8, shuffle=False)
    assert plan.num_batches_per_epoch == 3
    assert plan.rows(2) == [8, 9]
    assert plan.rows(3) == [0, 1, 2, 3]


@given(lengths=LENGTHS, **FLAGS)
@settings(max_examples=40, deadline=None)
def test_longest_batch_is_found(lengths: list[int], batch_size: int, packing: bool, shuffle: bool, seed: int) -> None:
    plan = BatchPlan(lengths, batch_size=batch_size, max_length=64, packing=packing, shuffle=shuffle, seed=seed)
    totals = [sum(lengths[row] for row in plan.rows(p)) for p in range(plan.num_batches_per_epoch)]
    assert totals[plan.longest_batch_position()] == max(totals)
    weights = [length**2 for length in lengths]
    squares = [sum(weights[row] for row in plan.rows(p)) for p in range(plan.num_batches_per_epoch)]
    assert squares[plan.longest_batch_position(weights)] == max(squares)


def test_no_rows_and_rows_longer_than_a_bin_are_errors() -> None:
    with pytest.raises(DataError, match="no rows"):
        BatchPlan([], batch_size=1, max_length=8)
    with pytest.raises(DataError, match="row 1 has 9 tokens"):
        BatchPlan([1, 9], batch_size=1, max_length=8, packing=True)
    assert BatchPlan([1, 9], batch_size=1, max_length=8).num_batches_per_epoch == 2


def test_a_million_rows_are_planned_in_seconds() -> None:
    lengths = np.random.default_rng(0).integers(1, 1024, 1_000_000)
    start = time.thread_time()
    plan = BatchPlan(lengths, batch_size=8, max_length=1024, seed=3)
    plan.rows(plan.num_batches_per_epoch * 2 + 5)
    assert time.thread_time() - start < 2.0
