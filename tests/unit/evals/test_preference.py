"""The criterion of pairs: what was held out decides, and a run without measurements fails."""

from __future__ import annotations

from typing import Any

import pytest

from model_foundry.evals.preference import pairs_preferred


def record(kind: str, step: int, accuracy: float) -> dict[str, Any]:
    return {"kind": kind, "step": step, "rewards/accuracies": accuracy, "rewards/margins": accuracy - 0.5}


STEPS = [record("step", step, 0.9) for step in range(1, 21)]


@pytest.mark.parametrize("accuracy, passed", [(0.61, True), (0.6, False), (0.0, False)])
def test_the_last_measurement_of_what_was_held_out_decides(accuracy: float, passed: bool) -> None:
    """Prevents a run that learnt its training pairs by heart from passing."""
    check = pairs_preferred([*STEPS, record("validation", 10, 1.0), record("validation", 20, accuracy)], bound=0.6)
    assert (check.name, check.passed, check.value) == ("pairs_preferred", passed, accuracy)
    assert "validation pairs" in check.evidence
    assert check.bound == "> 60 %"


def test_without_held_out_pairs_the_last_steps_count_and_are_named() -> None:
    check = pairs_preferred([record("step", 1, 0.0), *STEPS[1:]], bound=0.6)
    assert check.passed
    assert check.value == pytest.approx(0.9)
    assert "none were held out" in check.evidence


def test_no_measurement_is_no_success() -> None:
    assert not pairs_preferred([{"kind": "step", "step": 1, "loss": 0.1}], bound=0.0).passed
