"""Intervals cover what they say they cover, and say nothing where there is nothing to say."""

from __future__ import annotations

import numpy as np
import pytest

from model_foundry.evals import statistics as st
from model_foundry.evals.measures import MEASURES, measured


def mean_of(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def rows_of(values: np.ndarray) -> np.ndarray:
    return np.stack([values, np.ones_like(values)], axis=1)


@pytest.mark.slow
@pytest.mark.parametrize("num_rows, draw", [(8, "normal"), (30, "normal"), (40, "exponential")])
def test_the_bootstrap_covers_the_truth_as_often_as_it_says(num_rows: int, draw: str) -> None:
    """Prevents intervals that are too narrow for few rows: plain percentiles cover some 88 % at eight rows."""
    random = np.random.default_rng(3)
    hits, rounds = 0, 300
    for number in range(rounds):
        values = random.normal(2, 1, num_rows) if draw == "normal" else random.exponential(2, num_rows)
        low, high = st.interval(rows_of(values), mean_of, seed=number) or (0.0, 0.0)
        hits += low <= 2 <= high
    assert 0.91 <= hits / rounds <= 0.985


@pytest.mark.slow
@pytest.mark.parametrize("correlation", [0.0, 0.9])
def test_a_paired_interval_covers_the_change_and_gains_from_pairing(correlation: float) -> None:
    """Prevents two unpaired intervals, which hide changes on rows that differ more from each other than in time."""
    random = np.random.default_rng(4)
    hits, widths = 0, []
    for number in range(200):
        common = random.normal(0, 1, 25)
        own = [correlation**0.5 * common + (1 - correlation) ** 0.5 * random.normal(0, 1, 25) for _ in range(2)]
        before, after = rows_of(own[0] + 5), rows_of(own[1] + 5.5)
        low, high = st.paired_interval(before, after, mean_of, seed=number) or (0.0, 0.0)
        hits += low <= 0.5 <= high
        widths.append(high - low)
    assert 0.91 <= hits / 200 <= 0.99
    assert np.mean(widths) < (1.3 if correlation == 0 else 0.45)


@pytest.mark.parametrize(
    "num_rows, before, gain, loss", [(20, 0.9, 0.5, 0.05), (40, 0.5, 0.1, 0.1), (12, 0.2, 0.0, 0.0)]
)
def test_newcombe_s_interval_covers_a_share_s_change(num_rows: int, before: float, gain: float, loss: float) -> None:
    """Prevents an interval of no width where not one of a few answers happened to change."""
    random = np.random.default_rng(5)
    truth = (1 - before) * gain - before * loss
    hits = 0
    for _ in range(500):
        first = (random.random(num_rows) < before).astype(float)
        flips = random.random(num_rows) < np.where(first == 1, loss, gain)
        second = np.where(flips, 1 - first, first)
        low, high = st.paired_share_interval(first, second)
        assert high > low
        hits += low <= truth <= high
    assert hits / 500 >= 0.93


def test_wilson_s_interval_by_published_example() -> None:
    """Newcombe 1998, table I: 81 of 263 and 0 of 20."""
    assert st.share_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert st.share_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


@pytest.mark.parametrize("freedom, quantile", [(1, 12.706), (4, 2.776), (9, 2.262), (29, 2.045), (1000, 1.962)])
def test_student_s_quantiles_by_table(freedom: int, quantile: float) -> None:
    assert st._student_quantile(0.975, freedom) == pytest.approx(quantile, abs=2e-3)


def test_one_row_and_no_row_have_no_interval_and_say_so() -> None:
    """Prevents an interval from one row, which would look like certainty."""
    assert st.interval(rows_of(np.array([3.0])), mean_of) is None
    one = measured("f1", [(0.4, 1.0)])
    assert (one.value, one.interval) == (0.4, None)
    assert one.why == "one row alone has no interval"
    none = measured("f1", [None, None])
    assert np.isnan(none.value)
    assert none.as_dict()["value"] is None
    assert none.why == "no row has what it needs"


def test_rows_that_a_metric_does_not_apply_to_count_for_nothing() -> None:
    counted = [(0.5, 1.0), (1.0, 1.0)] * 3
    with_gaps = measured("keywords", [counted[0], None, *counted[1:], None])
    without = measured("keywords", counted)
    assert without.interval is not None
    assert (with_gaps.value, with_gaps.interval, with_gaps.num_rows) == (without.value, without.interval, 6)
    assert with_gaps.row_values() == [0.5, None, 1.0, 0.5, 1.0, 0.5, 1.0, None]


@pytest.mark.parametrize("num_rows", [2, 3, 5, 6])
def test_so_few_rows_that_luck_moves_them_all_are_not_for_sure(num_rows: int) -> None:
    """Prevents a run that is stopped because two rows of two lost a hundredth."""
    before = np.ones((num_rows, 2))
    after = before - [[0.01, 0.0]] * num_rows
    found = st.paired_interval(before, after, mean_of)
    assert (found is None) == (num_rows < 6)


def test_all_right_of_a_few_is_not_certain() -> None:
    found = measured("exact", [(1.0, 1.0)] * 5)
    assert found.interval is not None
    assert found.interval[0] == pytest.approx(0.5655, abs=1e-3)


def test_a_text_s_perplexity_is_of_all_its_tokens_and_no_mean_over_rows() -> None:
    """Prevents a short window from counting as much as a long one."""
    found = measured("perplexity", [(2.0, 1.0), (10.0, 99.0)])
    assert found.value == pytest.approx(np.exp(12 / 100))
    bits = measured("bits_per_byte", [(np.log(2) * 8, 4.0), (np.log(2) * 2, 6.0)])
    assert bits.value == pytest.approx(1.0)


def test_the_same_seed_gives_the_same_interval() -> None:
    values = rows_of(np.random.default_rng(1).normal(size=20))
    assert st.interval(values, mean_of, seed=7) == st.interval(values, mean_of, seed=7)
    assert st.interval(values, mean_of, seed=7) != st.interval(values, mean_of, seed=8)


def test_every_metric_says_its_unit_and_direction() -> None:
    assert {each.better for each in MEASURES.values()} == {"higher", "lower", "zero"}
    assert all(name == each.name and each.about for name, each in MEASURES.items())
