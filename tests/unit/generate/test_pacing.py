"""Waiting: as long as the API asks up to a bound, twice as long each time otherwise, and not forever."""

from __future__ import annotations

import pytest

from model_foundry.errors import ConfigError, FoundryError
from model_foundry.generate.client import AnswerLostError, RefusedError
from model_foundry.generate.pacing import Clock, Pacing


def busy(retry_after: float | None) -> RefusedError:
    return RefusedError(429, "rate_limit_error", "slow down", code=None, retry_after=retry_after)


def paced(errors: list[Exception], **options: int) -> tuple[object, list[float]]:
    waits: list[float] = []
    pacing = Pacing(clock=Clock(sleep=waits.append), max_wait_seconds=60.0, **options)  # type: ignore[arg-type]

    def call() -> str:
        if errors:
            raise errors.pop(0)
        return "done"

    return pacing.repeat(call, "calling"), waits


def test_retry_after_is_followed_up_to_a_bound() -> None:
    """Prevents a wait of a day because a header says so (the SDK would)."""
    assert paced([busy(7.0), busy(90_000.0), busy(None)]) == ("done", [7.0, 60.0, 8.0])


def test_waits_double() -> None:
    assert paced([AnswerLostError("x")] * 6)[1] == [2.0, 4.0, 8.0, 16.0, 32.0, 60.0]


def test_it_is_given_up_in_the_end() -> None:
    with pytest.raises(FoundryError, match=r"failed 3 times in a row.*goes on where it is"):
        paced([AnswerLostError("x")] * 9, max_tries=3)


@pytest.mark.parametrize(
    "status, kind, words",
    [
        (401, ConfigError, "ANTHROPIC_API_KEY"),
        (404, ConfigError, "generation.model"),
        (400, ConfigError, "generation"),
        (402, FoundryError, "account"),
    ],
)
def test_what_waiting_does_not_help_ends_at_once(status: int, kind: type[FoundryError], words: str) -> None:
    error = RefusedError(status, "some_error", "model: claude-x", code=None, retry_after=None)
    with pytest.raises(kind, match=words):
        paced([error])
