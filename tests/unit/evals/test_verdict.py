"""What counts as a change, as falling behind, and as a reason not to ship."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from model_foundry.errors import DataError
from model_foundry.evals.measures import measured
from model_foundry.evals.results import SuiteResult
from model_foundry.evals.suite import Suite, load_suite
from model_foundry.evals.verdict import (
    BETTER,
    SAME,
    UNCLEAR,
    WORSE,
    changes,
    fell_behind,
    guard_check,
    judge,
    threshold_checks,
)
from model_foundry.recipes.suites import assess
from model_foundry.types import Check
from tests.unit.evals.scripted_target import ScriptedTarget
from tests.unit.evals.test_kinds import ask
from tests.unit.evals.test_suite import write


def suite_of(folder: Path, num_rows: int, **more) -> Suite:
    rows = [{"prompt": f"{n:02d}?", "answer": "yes"} for n in range(num_rows)]
    return load_suite(str(write(folder, rows, metrics=["exact", "f1"], **more)))


def right_below(limit: int) -> ScriptedTarget:
    return ScriptedTarget(lambda prompt, *_: "yes" if int(prompt[:2]) < limit else "no")


def compared(suite: Suite, before: int, after: int):
    return changes(ask(suite, right_below(before)), ask(suite, right_below(after)))


@pytest.mark.parametrize("before, after, verdict", [(20, 4, WORSE), (4, 20, BETTER), (10, 9, UNCLEAR), (10, 10, SAME)])
def test_a_change_is_for_sure_or_unclear(before: int, after: int, verdict: str, tmp_path: Path) -> None:
    change = compared(suite_of(tmp_path, 24), before, after)["exact"]
    assert change.verdict == verdict
    assert change.rows.count(WORSE) == max(0, before - after)
    assert change.rows.count(BETTER) == max(0, after - before)


def test_a_guarded_metric_that_fell_is_a_reason_with_its_figures(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, 24, guard={"exact": 0.05})
    check = guard_check(suite.name, suite.guard, compared(suite, 20, 4))
    assert check is not None
    assert not check.passed
    assert "83.3 % → 16.7 %" in check.evidence
    verdict = judge([check])
    assert (verdict.ship, verdict.text) == (False, "DON'T SHIP")
    assert "mine: not behind" in verdict.reasons[0]


def test_a_small_loss_that_luck_explains_does_not_stop_a_run(tmp_path: Path) -> None:
    """Prevents a gate that every honest run fails one time in two."""
    suite = suite_of(tmp_path, 24, guard={"exact": 0.0})
    check = guard_check(suite.name, suite.guard, compared(suite, 12, 11))
    assert check is not None
    assert check.passed


def test_what_is_borne_is_borne(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, 24, guard={"exact": 0.9})
    check = guard_check(suite.name, suite.guard, compared(suite, 20, 4))
    assert check is not None
    assert check.passed


def test_noise_swallows_a_change(tmp_path: Path) -> None:
    """Prevents what a second decoding moves as far from being called an effect of training."""
    suite = suite_of(tmp_path, 24)
    before = ask(suite, right_below(20))
    noisy = replace(before, noise={"exact": 0.7})
    found = changes(noisy, ask(suite, right_below(4)))
    assert (found["exact"].verdict, found["f1"].verdict) == (UNCLEAR, WORSE)


def test_one_row_gives_no_verdict_and_says_why(tmp_path: Path) -> None:
    found = compared(suite_of(tmp_path, 1), 0, 1)["exact"]
    assert (found.verdict, found.interval) == (UNCLEAR, None)
    assert "one row alone has no interval" in found.text()


def test_results_of_other_questions_are_not_compared(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    with pytest.raises(DataError, match="not of the same rows"):
        changes(ask(suite_of(tmp_path, 3), right_below(1)), ask(suite_of(tmp_path / "b", 4), right_below(1)))


def test_a_bound_that_fails_says_what_was_wanted_and_found(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, 10, thresholds={"exact": "> 50 %", "f1": ">= 30 %"})
    first, second = threshold_checks(suite.name, suite.thresholds, ask(suite, right_below(4)))
    assert (first.passed, first.name, first.bound) == (False, "mine.exact", "> 50 %")
    assert first.evidence.startswith("40.0 % over 10 rows (95 % interval 16.8 % to 68.7 %)")
    assert second.passed


def test_without_checks_nothing_is_judged() -> None:
    assert judge([]).ship is None
    assert judge([Check("a", True, 1.0, "b", "c")]).text == "SHIP"
    json.dumps(judge([]).reasons)


def test_an_answer_that_became_empty_is_not_passed_over(tmp_path: Path) -> None:
    """Prevents a run that answers nothing from being shipped, for nothing can be measured any more."""
    rows = [{"prompt": f"{n:02d}?", "answer": "yes"} for n in range(8)]
    guard = {"reading_ease": 1.0, "f1": 1.0}
    suite = load_suite(str(write(tmp_path, rows, metrics=["f1", "reading_ease"], guard=guard)))
    words = ScriptedTarget(lambda prompt, *_: "The cat sat on the mat. It was warm there, and it slept.")
    before, after = ask(suite, words), ask(suite, ScriptedTarget(lambda prompt, *_: ""))
    check = guard_check(suite.name, suite.guard, changes(before, after))
    assert check is not None
    assert not check.passed
    assert "reading_ease cannot be judged: it has no value any more" in check.evidence


def test_a_guarded_metric_that_one_side_lacks_is_said(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, 8, guard={"exact": 1.0})
    check = guard_check(suite.name, {**suite.guard, "margin": 0.0}, compared(suite, 4, 4))
    assert check is not None
    assert not check.passed
    assert "margin cannot be judged: it was not measured on both sides" in check.evidence


def test_a_bias_that_changes_sides_is_no_worse_than_it_is_far(tmp_path: Path) -> None:
    """Prevents -0.10 to +0.12 nats from counting as a move of 0.22 away from zero."""
    result = ask(suite_of(tmp_path, 12), right_below(6))

    def biased(mean: float) -> SuiteResult:
        spread = [(mean + 0.3 * ((n % 4) - 1.5), 1.0) for n in range(12)]
        return replace(result, metrics={"likelihood_bias": measured("likelihood_bias", spread)})

    change = changes(biased(-0.10), biased(0.12))["likelihood_bias"]
    assert change.delta == pytest.approx(0.02)
    assert change.verdict == UNCLEAR
    assert not fell_behind(change, borne=0.0)
    assert changes(biased(-0.1), biased(2.0))["likelihood_bias"].verdict == WORSE


def test_a_guard_of_which_nothing_could_be_measured_is_a_reason_too() -> None:
    """A server gives no likelihoods: nothing of `general` was measured, and its guard was gone without a word."""
    suite = load_suite("general")
    before = ask(suite, ScriptedTarget(likelihood=lambda asked, ending: -float(len(ending))))
    after = ask(suite, ScriptedTarget())
    found = assess([suite], after={"general": after}, before={"general": before}, bounds={})
    assert found.verdict.ship is False
    assert "accuracy cannot be judged: it only writes" in found.verdict.reasons[0]
