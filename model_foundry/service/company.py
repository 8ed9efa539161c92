"""Whose next pass is about to come, so that one that could be shared is worth a short wait.

Passes of several models at once are faster than one by one, but clients that were answered together do not ask again at
the same instant. A model is awaited where its client came back soon the last time. It does no waiting, and is not for
several threads: `worker` holds a lock around it. Times are seconds of one clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Set

LEAST_SECONDS = 0.015
SHARE = 0.1
"""So much of a pass's time is waited at most; two passes instead of one take more."""


class Company:
    """The models of the last two passes: whoever is answered while others compute asks again in the meantime."""

    def __init__(self) -> None:
        self._groups: deque[frozenset[str]] = deque(maxlen=2)
        self._answered: dict[str, float] = {}
        self._pauses: dict[str, float] = {}
        self._patience = LEAST_SECONDS

    def passed(self, lanes: Iterable[str], seconds: float) -> None:
        """These shared a pass, or one had it alone."""
        self._groups.append(frozenset(lanes))
        self._patience = max(LEAST_SECONDS, SHARE * seconds)
        known = self._known()
        self._answered = {lane: since for lane, since in self._answered.items() if lane in known}
        self._pauses = {lane: pause for lane, pause in self._pauses.items() if lane in known}

    def answered(self, lane: str, now: float) -> None:
        """Everything that a model was asked for is done."""
        if lane in self._known():
            self._answered[lane] = now

    def came(self, lane: str, now: float) -> None:
        """A model is asked for something."""
        if (since := self._answered.pop(lane, None)) is not None:
            self._pauses[lane] = now - since

    def awaited_seconds(self, present: Set[str], now: float) -> float:
        """How long the next pass may wait for models that are not in it yet; 0 where none is about to come."""
        ends = [
            since + self._patience
            for lane, since in self._answered.items()
            if lane not in present and self._pauses.get(lane, 0.0) <= self._patience
        ]
        return max(0.0, max(ends, default=now) - now)

    def _known(self) -> frozenset[str]:
        return frozenset().union(*self._groups)
