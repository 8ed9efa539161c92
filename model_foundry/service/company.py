"""Whose next pass is about to come, so that one that could be shared is worth a short wait.

Passes of several models at once are faster than one by one, but clients that were answered together do not ask again at
the same instant. A model is awaited where its next pass came soon the last time. It does no waiting, and is not for
several threads: `worker` holds a lock around it. Times are seconds of one clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Set
from dataclasses import dataclass

LEAST_SECONDS, MOST_SECONDS = 0.015, 0.5
SHARE = 0.1
"""So much of a pass's time is waited at most; two passes instead of one take more."""


@dataclass(frozen=True, slots=True)
class Group:
    """A pass: its kind, the tokens that each model had in it, and the seconds that it took."""

    kind: str
    num_tokens: Mapping[str, int]
    seconds: float


class Company:
    """The models of the last two passes: whoever is answered while others compute asks again in the meantime."""

    def __init__(self) -> None:
        self._groups: deque[Group] = deque(maxlen=2)
        self._answered: dict[str, float] = {}
        self._pauses: dict[str, float] = {}

    def passed(self, group: Group) -> None:
        """Models shared a pass, or one had it alone."""
        self._groups.append(group)
        self._answered = {lane: since for lane, since in self._answered.items() if self._last(lane) is not None}
        self._pauses = {lane: pause for lane, pause in self._pauses.items() if self._last(lane) is not None}

    def answered(self, lane: str, now: float) -> None:
        """Everything that a model was asked for is done."""
        if self._last(lane) is not None:
            self._answered[lane] = now

    def came(self, lane: str, now: float, *, is_pass: bool) -> None:
        """A model is asked for something; what is not a pass says nothing of when its next pass comes."""
        since = self._answered.pop(lane, None)
        if since is not None and is_pass:
            self._pauses[lane] = now - since

    def awaited_seconds(self, kind: str, room_tokens: int, present: Set[str], now: float) -> float:
        """How long the next pass may wait for models that are not in it; 0 where none is about to come that would fit.

        A model is expected with what it had the last time.
        """
        longest = max((group.seconds for group in self._groups), default=0.0)
        patience = min(max(LEAST_SECONDS, SHARE * longest), MOST_SECONDS)
        ends = [
            since + patience
            for lane, since in self._answered.items()
            if lane not in present
            and self._pauses.get(lane, 0.0) <= patience
            and (last := self._last(lane)) is not None
            and last.kind == kind
            and last.num_tokens[lane] <= room_tokens
        ]
        return max(0.0, max(ends, default=now) - now)

    def _last(self, lane: str) -> Group | None:
        return next((group for group in reversed(self._groups) if lane in group.num_tokens), None)
