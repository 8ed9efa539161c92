"""When time is over: a request's own deadline, or the end of what the server waits for after it was told to stop.

Requests that run then end with words that a client can read, where their connections would break off. Knows nothing of
signals and answers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from model_foundry.server.problems import Problem


class ClosingTime:
    """One server's.

    Args:
        is_draining: whether it was told to stop.
    """

    def __init__(self, is_draining: Callable[[], bool] = lambda: False) -> None:
        self.is_draining = is_draining
        self._is_over = False
        self._clocks: set[asyncio.Timeout] = set()

    @asynccontextmanager
    async def until(self, deadline: float, *, seconds: float) -> AsyncIterator[None]:
        """What is done in this block is given up at the deadline, of `time.monotonic`, or when the server ends.

        Args:
            seconds: what the deadline left a request, for the words.

        Raises:
            Problem: time is over.
        """
        left = 0.0 if self._is_over else max(0.0, deadline - time.monotonic())
        clock = asyncio.timeout(left)
        try:
            async with clock:
                self._clocks.add(clock)
                yield
        except TimeoutError:
            if self._is_over:
                what = "the server stops, and this answer was not done in time; the request may be sent again"
                raise Problem(503, what, code="stopping", retry_after=1.0) from None
            raise Problem(504, f"not answered within {seconds:g} seconds", code="timeout") from None
        finally:
            self._clocks.discard(clock)

    def end(self) -> None:
        """Nothing goes on from now. Called in the event loop."""
        self._is_over = True
        now = asyncio.get_running_loop().time()
        for clock in self._clocks:
            if not clock.expired():
                clock.reschedule(now)
