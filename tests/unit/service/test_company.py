"""Whom a shared pass waits for, and how long."""

from __future__ import annotations

from model_foundry.service.company import LEAST_SECONDS, SHARE, Company


def company(seconds: float = 1.0) -> Company:
    """After a pass of three models, which were answered at 10."""
    made = Company()
    made.passed(["a", "b", "c"], seconds)
    for lane in "abc":
        made.answered(lane, 10.0)
    return made


def close(found: float, want: float) -> bool:
    return abs(found - want) < 1e-9


def test_those_who_were_answered_are_awaited_until_they_come() -> None:
    made = company()
    made.came("a", 10.01)
    assert close(made.awaited_seconds({"a"}, 10.02), SHARE - 0.02)
    made.came("b", 10.03)
    made.came("c", 10.03)
    assert made.awaited_seconds({"a", "b", "c"}, 10.03) == 0.0


def test_nobody_is_awaited_longer_than_a_share_of_the_pass() -> None:
    made = company()
    assert close(made.awaited_seconds(set(), 10.0), SHARE)
    assert made.awaited_seconds(set(), 10.0 + SHARE) == 0.0
    assert close(company(0.001).awaited_seconds(set(), 10.0), LEAST_SECONDS)


def test_who_was_slow_the_last_time_is_not_awaited_before_it_is_quick_again() -> None:
    made = company()
    made.came("a", 12.0)
    made.passed(["a"], 1.0)
    made.answered("a", 13.0)
    assert made.awaited_seconds(set(), 13.0) == 0.0
    made.came("a", 13.05)
    made.passed(["a"], 1.0)
    made.answered("a", 14.0)
    assert close(made.awaited_seconds(set(), 14.0), SHARE)


def test_two_groups_that_take_turns_meet() -> None:
    made = Company()
    made.passed(["a", "b"], 1.0)
    made.answered("a", 1.0)
    made.answered("b", 1.0)
    made.came("a", 1.05)
    made.came("b", 1.06)
    made.passed(["c", "d"], 1.0)
    made.answered("c", 2.0)
    made.answered("d", 2.0)
    assert close(made.awaited_seconds({"a", "b"}, 2.0), SHARE)


def test_who_was_in_neither_of_the_last_two_passes_is_forgotten() -> None:
    made = company()
    made.passed(["a"], 1.0)
    assert made.awaited_seconds({"a"}, 10.0) > 0
    made.passed(["a"], 1.0)
    assert made.awaited_seconds({"a"}, 10.0) == 0.0
    made.answered("b", 10.0)
    assert made.awaited_seconds({"a"}, 10.0) == 0.0


def test_before_the_first_pass_nobody_is_known() -> None:
    made = Company()
    made.answered("a", 0.0)
    made.came("a", 0.0)
    assert made.awaited_seconds(set(), 0.0) == 0.0
