"""Criteria: each passes on what it promises, fails on what it must catch, and says what it saw."""

from __future__ import annotations

import math

import numpy as np
import pytest

from model_foundry.evals.before_after import compare
from model_foundry.evals.criteria import (
    answers_improved,
    artefacts_load,
    loss_fall,
    memory_saving,
    parameters_changed,
    replay_identical,
)
from model_foundry.types import Check

NUM = 40
EXPECTED = [f"unique{index} word{index}" for index in range(NUM)]
RAMBLING = [f"nothing about {index} here" for index in range(NUM)]


def require_words(check: Check) -> None:
    assert check.name
    assert check.bound
    assert len(check.evidence) > 10


def test_a_falling_loss_passes() -> None:
    check = loss_fall([3.0 - 0.02 * step for step in range(100)], bound=0.05)
    assert check.passed
    assert isinstance(check.value, float)
    assert check.value == pytest.approx((3.0 - 0.19 - (3.0 - 0.02 * 89.5)) / (3.0 - 0.19))
    assert "mean of 20 steps" in check.evidence


def test_one_lucky_batch_does_not_make_a_fall() -> None:
    """First against last step would call this a fall of 90 %."""
    losses = [2.0] * 99 + [0.2]
    assert not loss_fall(losses, bound=0.05).passed


def test_a_rising_or_flat_loss_fails() -> None:
    assert not loss_fall([1.0] * 50, bound=0.0).passed
    assert not loss_fall([1.0 + step for step in range(50)], bound=0.05).passed


@pytest.mark.parametrize("losses", [[], [1.0], [None, math.nan, 2.0], [0.0] * 10])
def test_a_loss_that_cannot_be_judged_fails_and_says_so(losses: list[float | None]) -> None:
    """NaN compares false with everything: written the other way round, a diverged run would pass."""
    check = loss_fall(losses, bound=0.05)
    assert not check.passed
    assert "Cannot be measured" in check.evidence


def test_skipped_losses_are_counted() -> None:
    check = loss_fall([3.0, None, 1.0, math.inf, 1.0], bound=0.05)
    assert check.passed
    assert "2 steps had no finite loss" in check.evidence


def test_learned_answers_pass_with_the_floor_stated() -> None:
    comparison = compare(EXPECTED, expected=EXPECTED, before=RAMBLING, after=EXPECTED[:30] + RAMBLING[30:])
    check = answers_improved(comparison, bound=0.3)
    assert check.passed
    assert check.value == pytest.approx(0.75)
    assert "noise floor" in check.bound
    assert "30 of 40" in check.evidence
    assert "0 % → 75 %" in check.evidence


def test_too_few_improved_answers_fail() -> None:
    comparison = compare(EXPECTED, expected=EXPECTED, before=RAMBLING, after=EXPECTED[:10] + RAMBLING[10:])
    assert not answers_improved(comparison, bound=0.3).passed


def test_an_improved_share_inside_the_noise_fails() -> None:
    """Half better, half worse is above 30 %, and nothing was learned."""
    mixed = [own if index % 2 else other for index, (own, other) in enumerate(zip(EXPECTED, RAMBLING, strict=True))]
    swapped = [other if index % 2 else own for index, (own, other) in enumerate(zip(EXPECTED, RAMBLING, strict=True))]
    comparison = compare(EXPECTED, expected=EXPECTED, before=mixed, after=swapped)
    assert comparison.improved == 0.5
    assert not answers_improved(comparison, bound=0.3).passed


def test_memory_is_judged_from_both_measurements() -> None:
    check = memory_saving(lora_bytes=600 << 20, full_bytes=1000 << 20, bound=0.3, how="fresh processes, same batch")
    assert check.passed
    assert check.value == pytest.approx(0.4)
    assert "600 MiB with LoRA" in check.evidence
    assert "fresh processes, same batch" in check.evidence
    assert not memory_saving(lora_bytes=800 << 20, full_bytes=1000 << 20, bound=0.3, how="x").passed


@pytest.mark.parametrize("lora, full", [(None, 5), (5, None), (0, 5), (5, 0)])
def test_a_missing_measurement_fails(lora: int | None, full: int | None) -> None:
    check = memory_saving(lora_bytes=lora, full_bytes=full, bound=0.3, how="fresh processes")
    assert not check.passed
    assert "no measured peak" in check.evidence


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    source = np.random.default_rng(seed)
    return {"a": source.normal(size=(4, 8)).astype(np.float32), "b": np.zeros((8, 4), dtype=np.float32)}


def test_changed_elements_are_counted_one_by_one() -> None:
    """A tensor with one changed element is not a trained tensor."""
    before, after = weights(), weights()
    after["a"] += 1
    check = parameters_changed(before, after, bound=0.8)
    assert not check.passed
    assert check.value == 0.5
    assert "1 of 2 tensors did not move" in check.evidence
    after["b"][:] = 1e-30
    assert parameters_changed(before, after, bound=0.8).value == 1.0


def test_weight_decay_is_not_taken_for_training() -> None:
    """Decay shrinks every element that is not 0, also in a model that received no gradient at all."""
    before = weights()
    decayed = {name: array * np.float32(0.99) for name, array in before.items()}
    assert parameters_changed(before, decayed, bound=0.4).passed
    assert not parameters_changed(before, decayed, bound=0.4, weight_decay=0.01).passed
    decayed["b"] += 1
    check = parameters_changed(before, decayed, bound=0.8, weight_decay=0.01)
    assert check.passed
    assert "32 of 32" in check.evidence


def test_broken_parameters_fail() -> None:
    """NaN differs from everything, so a ruined adapter would count as fully changed."""
    before = weights()
    for name, damage in (("a", math.nan), ("b", math.inf)):
        after = weights()
        after[name][0, 0] = damage
        assert not parameters_changed(before, after, bound=0.0).passed
    assert "one side only" in parameters_changed(before, {"a": before["a"]}, bound=0.0).evidence
    assert "shape" in parameters_changed(before, {**before, "b": np.zeros((2, 2))}, bound=0.0).evidence
    assert not parameters_changed({}, {}, bound=0.0).passed
    assert not parameters_changed({"a": np.ones(3)}, {"a": np.zeros(3)}, bound=0.0, weight_decay=0.1).passed


def test_every_artefact_must_load() -> None:
    assert artefacts_load({"adapter": None, "state": None}).passed
    check = artefacts_load({"adapter": None, "state": "differs from its manifest"})
    assert not check.passed
    assert check.value == "1 of 2"
    assert "state: differs from its manifest" in check.evidence
    assert not artefacts_load({}).passed


def test_a_replay_is_identical_or_not() -> None:
    options = {"from_step": 90, "num_steps": 10, "compared": ["adapter weights", "metrics"]}
    assert replay_identical(**options, differences=[]).passed
    check = replay_identical(**options, differences=["adapter weights"])
    assert not check.passed
    assert "adapter weights" in check.evidence
    assert not replay_identical(from_step=90, num_steps=0, compared=["metrics"], differences=[]).passed
    assert not replay_identical(from_step=90, num_steps=5, compared=[], differences=[]).passed


def test_every_check_says_something() -> None:
    comparison = compare(EXPECTED, expected=EXPECTED, before=RAMBLING, after=EXPECTED)
    for check in (
        loss_fall([2.0, 1.0], bound=0.05),
        answers_improved(comparison, bound=0.3),
        memory_saving(lora_bytes=1, full_bytes=2, bound=0.3, how="measured"),
        parameters_changed(weights(0), weights(1), bound=0.8),
        artefacts_load({"adapter": None}),
        replay_identical(from_step=1, num_steps=1, compared=["metrics"], differences=[]),
    ):
        require_words(check)
