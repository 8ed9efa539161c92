"""Bounds are read with their units, or refused in words."""

from __future__ import annotations

import math

import pytest

from model_foundry.errors import ConfigError
from model_foundry.evals.bounds import parse_bound


@pytest.mark.parametrize("text, unit, value, holds", [
    ("> 30 %", "share", 0.31, True), ("> 30 %", "share", 0.30, False), ("at least 80%", "share", 0.8, True),
    ("> 0.3", "share", 0.31, True), ("< 15 grade", "grade", 14.9, True),
    ("below 1.2 bits/byte", "bits/byte", 1.3, False),
    ("≤ 20", "", 20.0, True), ("<= 20", "", math.nan, False), ("over -1.5", "nats", -1.0, True),
])  # fmt: skip
def test_a_bound_by_example(text: str, unit: str, value: float, holds: bool) -> None:
    assert parse_bound(text, unit=unit, where="x").holds(value) is holds


def test_within_fails_only_where_the_whole_interval_is_outside() -> None:
    """Prevents a bias check that fails on noise, and one that a wide interval would always fail."""
    bound = parse_bound("within 0.25 nats", unit="nats", where="x")
    assert bound.holds(0.9, interval=(-0.1, 1.9))
    assert not bound.holds(0.9, interval=(0.3, 1.5))
    assert not bound.holds(-0.9, interval=(-1.5, -0.3))
    assert not bound.holds(0.9)


@pytest.mark.parametrize("text, words", [
    ("> 30 nats", "the unit of '> 30 nats' is nats, and the metric is a share"), ("about 3", "is no bound"),
    ("0.3", "is no bound"), ("> 3 %", "in grade"), ("within -0.5", "bounds nothing"),
])  # fmt: skip
def test_what_cannot_be_meant_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_bound(text, unit="share" if "nats" in text else "grade", where="criteria.metrics.a.b")


def test_sixty_of_a_share_is_sixty_percent_forgotten() -> None:
    """Prevents a bound that nothing can meet from being found out after the whole training."""
    with pytest.raises(ConfigError, match="bounds nothing") as caught:
        parse_bound("> 60", unit="share", where="x")
    assert "> 60 %" in str(caught.value)


@pytest.mark.parametrize("text, span", [
    ("< 150 %", (0, 1)), ("> -0.5", (0, 1)), ("> 100 %", (0, 1)), (">= 0", (0, 1)), ("<= 1", (0, 1)), ("< 0", (0, 1)),
    ("within 1", (-1, 1)), ("> 150 %", (-1, 1)),
])  # fmt: skip
def test_a_bound_that_every_value_meets_or_none_is_refused(text: str, span: tuple[float, float]) -> None:
    """A bound that cannot fail is no check, and one that cannot hold is found out after the whole training."""
    with pytest.raises(ConfigError, match="bounds nothing"):
        parse_bound(text, unit="share", where="x", span=span)


def test_bounds_within_the_span_stay() -> None:
    for text in ("> 0", ">= 1", "< 1", "<= 0", "within 0.1"):
        parse_bound(text, unit="share", where="x", span=(0, 1))
    parse_bound("within 0.1", unit="share", where="x", span=(-1, 1))
    parse_bound("> -0.5", unit="share", where="x", span=(-1, 1))
    with pytest.raises(ConfigError, match="from 0 to 1: no value"):
        parse_bound("> 30", unit="", where="x", span=(0, 1))
