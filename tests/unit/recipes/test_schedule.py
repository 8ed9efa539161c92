"""Learning rates hold their shape for every length of run."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_foundry.recipes.schedule import SHAPES, LearningRate


@st.composite
def rates(draw: st.DrawFn, shapes: tuple[str, ...] = tuple(SHAPES)) -> LearningRate:
    total = draw(st.integers(1, 300))
    warmup = draw(st.integers(0, total - 1))
    return LearningRate(
        peak=draw(st.floats(1e-6, 1.0)),
        shape=draw(st.sampled_from(shapes)),
        warmup_steps=warmup,
        total_steps=total,
        decay_steps=draw(st.integers(0, total - warmup)),
        min_ratio=draw(st.floats(0.0, 1.0)),
    )


@given(rates())
def test_every_rate_lies_between_zero_and_the_peak_and_trains(rate: LearningRate) -> None:
    """Prevents a last or first step at 0, which would train nothing, and a rate over the one asked for."""
    values = [rate.at(step) for step in range(1, rate.total_steps + 1)]
    assert all(0.0 < value <= rate.peak * (1 + 1e-12) for value in values)


@given(rates())
def test_the_rate_climbs_to_the_peak_and_never_climbs_again(rate: LearningRate) -> None:
    """Prevents an off-by-one at the end of the warm-up: a dip, or a peak that is never reached."""
    values = [rate.at(step) for step in range(1, rate.total_steps + 1)]
    warm, rest = values[: rate.warmup_steps], values[rate.warmup_steps :]
    assert all(a < b for a, b in itertools.pairwise(warm))
    assert all(a >= b - 1e-12 * rate.peak for a, b in itertools.pairwise(rest))
    if rate.shape != "wsd" or rate.decay_steps < len(rest):
        assert rest[0] == pytest.approx(rate.peak)


@given(rates(("linear", "cosine", "wsd")))
def test_the_rate_falls_to_its_floor_right_after_the_last_step(rate: LearningRate) -> None:
    """Prevents a schedule that stops half-way down or reaches its floor early."""
    floor = rate.peak * rate.min_ratio
    values = [rate.at(step) for step in range(rate.warmup_steps + 1, rate.total_steps + 1)]
    assert all(value >= floor - 1e-12 for value in values)
    if rate.shape != "wsd" or rate.decay_steps:
        assert rate.at(rate.total_steps + 1) == pytest.approx(floor, abs=1e-12)


@given(rates(("wsd",)))
def test_the_stable_stretch_is_flat_and_the_decay_has_its_length(rate: LearningRate) -> None:
    """Prevents a decay over the wrong number of steps."""
    falling = [s for s in range(rate.warmup_steps + 1, rate.total_steps + 1) if rate.at(s) < rate.peak * (1 - 1e-12)]
    assert len(falling) == (0 if math.isclose(rate.min_ratio, 1.0) else rate.decay_steps)


def test_known_values() -> None:
    """Prevents a change of shape that all properties allow."""
    cosine = LearningRate(peak=1.0, shape="cosine", warmup_steps=2, total_steps=6)
    assert [round(cosine.at(step), 4) for step in range(1, 7)] == [0.5, 1.0, 1.0, 0.8536, 0.5, 0.1464]
    linear = LearningRate(peak=1.0, shape="linear", warmup_steps=0, total_steps=4, min_ratio=0.2)
    assert [round(linear.at(step), 4) for step in range(1, 5)] == [1.0, 0.8, 0.6, 0.4]
    wsd = LearningRate(peak=1.0, shape="wsd", warmup_steps=1, total_steps=6, decay_steps=3)
    assert [wsd.at(step) for step in range(1, 7)] == [1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert LearningRate(peak=0.3, shape="constant", warmup_steps=0, total_steps=9).at(9) == 0.3
