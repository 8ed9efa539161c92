"""What is flagged is what a person would point at in the curve, and nothing in a noisy one."""

from __future__ import annotations

import math
import random

from model_foundry.run.spikes import MIN_STEPS, find_spikes, is_spike


def falling(count: int, *, noise: float = 0.05, seed: int = 0) -> list[float]:
    chance = random.Random(seed)
    return [2 + 6 * math.exp(-step / 40) + chance.gauss(0, noise) for step in range(count)]


def test_a_noisy_curve_has_none() -> None:
    for seed in range(20):
        assert find_spikes(falling(300, seed=seed)) == []


def test_a_jump_is_found_where_it_is_and_the_way_back_is_not() -> None:
    losses: list[float] = [*falling(200)]
    losses[120] = 5.0
    losses[121] = 4.0
    assert find_spikes(losses) == [121, 122]


def test_what_is_no_number_is_a_spike() -> None:
    losses: list[float] = [*falling(60)]
    losses[40] = math.nan
    assert find_spikes(losses) == [41]
    assert is_spike(math.inf, falling(30))


def test_the_first_steps_are_never_judged() -> None:
    """A loss starts high and says nothing about spikes."""
    assert not is_spike(100.0, falling(MIN_STEPS - 1))
    assert find_spikes([9.0, 1.0, 9.0]) == []


def test_a_constant_loss_has_no_deviation_and_still_may_wobble() -> None:
    assert not is_spike(1.05, [1.0] * 40)
    assert is_spike(1.2, [1.0] * 40)
