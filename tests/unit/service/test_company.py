"""Whom a shared pass waits for, and how long."""

from __future__ import annotations

from model_foundry.service.company import LEAST_SECONDS, MOST_SECONDS, SHARE, Company, Group


def group(lanes: str, seconds: float = 1.0, *, kind: str = "forward_backward") -> Group:
    return Group(kind, dict.fromkeys(lanes, 32), seconds)


def company(seconds: float = 1.0) -> Company:
    """After a pass of three models, which were answered at 10."""
    made = Company()
    made.passed(group("abc", seconds))
    for lane in "abc":
        made.answered(lane, 10.0)
    return made


def awaited(made: Company, present: str, now: float, *, room: int = 32) -> float:
    return round(made.awaited_seconds("forward_backward", room, set(present), now), 9)


def test_those_who_were_answered_are_awaited_until_they_come() -> None:
    made = company()
    made.came("a", 10.01, is_pass=True)
    assert awaited(made, "a", 10.02) == SHARE - 0.02
    made.came("b", 10.03, is_pass=True)
    made.came("c", 10.03, is_pass=True)
    assert awaited(made, "abc", 10.03) == 0.0


def test_nobody_is_awaited_longer_than_a_share_of_the_pass() -> None:
    made = company()
    assert awaited(made, "", 10.0) == SHARE
    assert awaited(made, "", 10.0 + SHARE) == 0.0
    assert awaited(company(0.001), "", 10.0) == LEAST_SECONDS
    assert awaited(company(600.0), "", 10.0) == MOST_SECONDS


def test_a_short_pass_in_between_does_not_make_it_impatient() -> None:
    made = company()
    made.passed(group("d", 0.01))
    assert awaited(made, "d", 10.0) == SHARE


def test_who_was_slow_the_last_time_is_not_awaited_before_it_is_quick_again() -> None:
    made = company()
    made.came("a", 12.0, is_pass=True)
    made.passed(group("a"))
    made.answered("a", 13.0)
    assert awaited(made, "", 13.0) == 0.0
    made.came("a", 13.05, is_pass=True)
    made.passed(group("a"))
    made.answered("a", 14.0)
    assert awaited(made, "", 14.0) == SHARE


def test_a_step_that_comes_soon_does_not_make_a_slow_client_quick() -> None:
    """It asks for its step when its pass is answered, and looks at the results for a second then."""
    made = Company()
    made.passed(group("a"))
    made.answered("a", 10.0)
    made.came("a", 10.01, is_pass=False)
    assert awaited(made, "", 10.02) == 0.0
    made.answered("a", 10.02)
    made.came("a", 11.0, is_pass=True)
    made.passed(group("a"))
    made.answered("a", 12.0)
    made.came("a", 12.01, is_pass=False)
    made.answered("a", 12.02)
    assert awaited(made, "", 12.02) == 0.0


def test_who_would_not_fit_or_asks_for_something_else_is_not_awaited() -> None:
    made = company()
    assert awaited(made, "", 10.0, room=31) == 0.0
    assert made.awaited_seconds("forward", 32, set(), 10.0) == 0.0
    made.passed(group("b", kind="forward"))
    assert made.awaited_seconds("forward", 32, set(), 10.0) > 0.0


def test_two_groups_that_take_turns_meet() -> None:
    made = Company()
    made.passed(group("ab"))
    made.answered("a", 1.0)
    made.answered("b", 1.0)
    made.came("a", 1.05, is_pass=True)
    made.came("b", 1.06, is_pass=True)
    made.passed(group("cd"))
    made.answered("c", 2.0)
    made.answered("d", 2.0)
    assert awaited(made, "ab", 2.0) == SHARE


def test_who_was_in_neither_of_the_last_two_passes_is_forgotten() -> None:
    made = company()
    made.passed(group("a"))
    assert awaited(made, "a", 10.0) > 0
    made.passed(group("a"))
    assert awaited(made, "a", 10.0) == 0.0
    made.answered("b", 10.0)
    assert awaited(made, "a", 10.0) == 0.0


def test_before_the_first_pass_nobody_is_known() -> None:
    made = Company()
    made.answered("a", 0.0)
    made.came("a", 0.0, is_pass=True)
    assert awaited(made, "", 0.0) == 0.0
