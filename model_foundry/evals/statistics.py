"""Intervals of what was measured on rows, and of how two measurements on the same rows differ.

A metric is a function of sums over rows: a mean is a sum of values over a count, corpus BLEU is a function of summed
n-gram counts, perplexity one of summed losses and tokens. So one bootstrap serves them all: rows are drawn again,
their statistics summed, the metric computed of the sums (Efron and Tibshirani 1993). Percentiles are taken further out
for few rows, since the plain ones are too narrow then (Hesterberg 2015, "expanded percentile"). Shares of yes and no
get Wilson's interval (1927), their paired differences Newcombe's (1998, method 10): unlike a bootstrap, these know that
5 of 5 is not yet all. Knows numbers; nothing of texts or models.

Shapes: R rows, S statistics of a row, B resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
NUM_RESAMPLES = 4000
_BLOCK_COUNTS = 4_000_000

Interval = tuple[float, float]
Combine = Callable[[np.ndarray], np.ndarray]
"""From summed statistics float64 [..., S] to the metric, float64 [...]; NaN where no row counted."""


LEAST_ROWS = 6
"""Resamples never reach beyond the rows' own range, and fewer rows lie on one side by chance more than one time in
twenty: of two without any effect, half would change "for sure"."""


def interval(stats: np.ndarray, combine: Combine, *, seed: int = 0) -> Interval | None:
    """95 % bootstrap interval of the metric over float64 [R, S]; None for fewer than six rows that count."""
    used = counting(stats)
    if len(used) < LEAST_ROWS:
        return None
    return _percentiles(combine(_resampled_sums(used, seed=seed)), len(used))


def paired_interval(before: np.ndarray, after: np.ndarray, combine: Combine, *, seed: int = 0) -> Interval | None:
    """95 % interval of after minus before, the same rows drawn for both; None for fewer than six rows.

    Args:
        before, after: float64 [R, S] on the same rows in the same order. A row that counts on one side only still
            counts there.
    """
    kept = (before != 0).any(axis=1) | (after != 0).any(axis=1)
    if kept.sum() < LEAST_ROWS:
        return None
    both = np.concatenate([before[kept], after[kept]], axis=1)
    sums = _resampled_sums(both, seed=seed)
    width = before.shape[1]
    return _percentiles(combine(sums[:, width:]) - combine(sums[:, :width]), int(kept.sum()))


def counting(stats: np.ndarray) -> np.ndarray:
    """The rows that count: a row that a metric does not apply to is all zeros."""
    return stats[(stats != 0).any(axis=1)]


def share_interval(num_hits: float, num_cases: int) -> Interval:
    """Wilson's score interval of a share."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    share, spread = num_hits / num_cases, z * z / num_cases
    centre = share + spread / 2
    reach = (spread * (share * (1 - share) + spread / 4)) ** 0.5
    return max(0.0, (centre - reach) / (1 + spread)), min(1.0, (centre + reach) / (1 + spread))


def paired_share_interval(before: np.ndarray, after: np.ndarray) -> Interval:
    """95 % interval of a share's change on the same cases (Newcombe 1998, method 10).

    Args:
        before, after: 0 or 1 a case, float64 [R], R ≥ 1.
    """
    num = len(before)
    both, lost = float((before * after).sum()), float((before * (1 - after)).sum())
    gained = float(((1 - before) * after).sum())
    neither = num - both - lost - gained
    share_before, share_after = (both + lost) / num, (both + gained) / num
    (low_before, high_before), (low_after, high_after) = (
        share_interval(share * num, num) for share in (share_before, share_after)
    )
    phi = _correlation(both, lost, gained, neither)
    change = share_after - share_before

    def reach(own: float, other: float) -> float:
        return math.sqrt(max(0.0, own * own - 2 * phi * own * other + other * other))

    down = reach(share_after - low_after, high_before - share_before)
    up = reach(high_after - share_after, share_before - low_before)
    return max(-1.0, change - down), min(1.0, change + up)


def _correlation(both: float, lost: float, gained: float, neither: float) -> float:
    """Newcombe's phi, with his correction where the two answers go together."""
    margins = (both + lost) * (gained + neither) * (both + gained) * (lost + neither)
    if margins == 0:
        return 0.0
    product = both * neither - lost * gained
    if product > 0:
        product = max(product - (both + lost + gained + neither) / 2, 0.0)
    return product / math.sqrt(margins)


def _resampled_sums(stats: np.ndarray, *, seed: int) -> np.ndarray:
    """float64 [B, S]: sums over rows drawn with replacement."""
    num_rows = len(stats)
    source = np.random.Generator(np.random.Philox(key=seed))
    even = np.full(num_rows, 1 / num_rows)
    sums = np.empty((NUM_RESAMPLES, stats.shape[1]))
    block = max(1, _BLOCK_COUNTS // num_rows)
    for start in range(0, NUM_RESAMPLES, block):
        # How often each row was drawn, instead of which: one matrix product then gives every sum.
        size = min(block, NUM_RESAMPLES - start)
        sums[start : start + size] = source.multinomial(num_rows, even, size=size) @ stats
    return sums


def why_none(num_rows: int) -> str:
    """Why so many rows gave no interval."""
    if num_rows < LEAST_ROWS:
        return "one row alone has no interval" if num_rows == 1 else f"{num_rows} rows are too few for an interval"
    return "too few resamples gave a number"


def _percentiles(values: np.ndarray, num_rows: int) -> Interval | None:
    finite = values[np.isfinite(values)]
    if len(finite) < NUM_RESAMPLES / 2:
        return None
    tail = _expanded_tail(num_rows)
    low, high = np.quantile(finite, [tail, 1 - tail])
    return float(low), float(high)


@lru_cache(maxsize=256)
def _expanded_tail(num_rows: int) -> float:
    """The share of resamples to leave out at each end, so that few rows give no interval that is too narrow."""
    wider = math.sqrt(num_rows / (num_rows - 1)) * _student_quantile((1 + CONFIDENCE) / 2, num_rows - 1)
    return NormalDist().cdf(-wider)


def _student_quantile(probability: float, freedom: int) -> float:
    """The quantile of Student's t above one half, by bisection on its integrated density."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        points = np.linspace(0, middle, 2001)
        density = scale * (1 + points * points / freedom) ** (-(freedom + 1) / 2)
        low, high = (middle, high) if 0.5 + np.trapezoid(density, points) < probability else (low, middle)
    return (low + high) / 2
