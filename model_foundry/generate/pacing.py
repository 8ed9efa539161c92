"""When to try again, and when to stop trying: for calls that may be repeated without a cost.

Follows Retry-After up to a bound of ours (the SDK follows it without one), otherwise waits twice as long each time.
Clock and sleep are handed in.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from model_foundry.errors import ConfigError, FoundryError
from model_foundry.generate.client import AnswerLostError, NotSentError, RefusedError

T = TypeVar("T")

FIRST_WAIT_SECONDS = 2.0


@dataclass(frozen=True)
class Clock:
    """Time, as the world has it or as a test gives it. `now` is seconds since 1970, `monotonic` never goes back."""

    now: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


@dataclass(frozen=True)
class Pacing:
    """How long to wait between tries and how many there are.

    Attributes:
        max_wait_seconds: longest wait between two tries, whatever Retry-After says.
        max_tries: calls in a row that may fail before it is given up.
        say: told about every wait.
    """

    clock: Clock = field(default_factory=Clock)
    max_wait_seconds: float = 300.0
    max_tries: int = 8
    say: Callable[[str], None] = lambda line: None

    def wait(self, failures: int, error: Exception, doing: str) -> None:
        """Wait after the `failures`-th failure in a row.

        Raises:
            FoundryError: that was the last try, or waiting does not help.
        """
        if isinstance(error, RefusedError) and not error.passes:
            raise refusal(error, doing) from error
        if failures >= self.max_tries:
            raise FoundryError(
                f"{doing} failed {failures} times in a row: {error}",
                hint="Run the command again: it goes on where it is, and nothing is paid for twice",
            ) from error
        asked = error.retry_after if isinstance(error, RefusedError) else None
        backoff = FIRST_WAIT_SECONDS * 2 ** (failures - 1)
        seconds = min(self.max_wait_seconds, asked if asked is not None else backoff)
        self.say(f"{doing}: {error}; trying again in {seconds:.0f} s")
        self.clock.sleep(seconds)

    def repeat(self, call: Callable[[], T], doing: str) -> T:
        """The result of a call that may be repeated without harm.

        Raises:
            FoundryError: it failed too often, or the API refused it for good.
        """
        failures = 0
        while True:
            try:
                return call()
            except (NotSentError, AnswerLostError, RefusedError) as error:
                failures += 1
                self.wait(failures, error, doing)


def refusal(error: RefusedError, doing: str) -> FoundryError:
    """An error of the API that waiting does not help, with what does."""
    if error.status == 401:
        hint = "Check ANTHROPIC_API_KEY"
        return ConfigError(f"the API does not accept the key ({error.message})", where="ANTHROPIC_API_KEY", hint=hint)
    if error.status == 404 and "model" in error.message:
        return ConfigError(f"the API has no such model ({error.message})", where="generation.model")
    if error.status in (402, 403) or error.code == "enforced_spend_limit_reached":
        return FoundryError(
            f"the API refuses: {error}", hint="See to the account; running the command again goes on where it is"
        )
    return ConfigError(f"{doing} was refused: {error}", hint="Check generation.* and prompt.*")
