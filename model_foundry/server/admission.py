"""Who is computed next: a bounded queue, fair between clients. Runs in the event loop's thread; knows no HTTP.

The next place goes to the client that holds the fewest; among equals, to the one whose last turn is longest ago. So a
client that asks for a thousand answers at once delays another by its turn, and not by its queue.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from model_foundry.errors import FoundryError


class OverloadedError(FoundryError):
    """No room to wait. `scope` says whether this client waits too much already, or all of them together."""

    def __init__(self, scope: Literal["client", "server"], what: str) -> None:
        super().__init__(what)
        self.scope = scope


@dataclass(slots=True, eq=False)
class Ticket:
    """So many places in the batch, to be given back with `Admission.leave`."""

    client: str
    units: int
    order: int
    granted: asyncio.Event = field(default_factory=asyncio.Event)
    left: bool = False


class Admission:
    """Places in the batch.

    Args:
        places: answers computed together.
        waiting: answers that may wait, of all clients.
        waiting_per_client: answers that one client may have waiting.
    """

    def __init__(self, *, places: int, waiting: int, waiting_per_client: int) -> None:
        self.places, self.max_waiting, self.max_waiting_per_client = places, waiting, waiting_per_client
        self._free = places
        self._queue: list[Ticket] = []
        self._running: Counter[str] = Counter()
        self._waiting: Counter[str] = Counter()
        self._orders = itertools.count()
        self._turns: dict[str, int] = {}  # when clients that are here got their last place

    @property
    def num_running(self) -> int:
        return self.places - self._free

    @property
    def num_waiting(self) -> int:
        return self._waiting.total()

    async def enter(self, client: str, units: int = 1) -> Ticket:
        """Wait for `units` places (at most `places`).

        Raises:
            OverloadedError: the queue is full, or full for this client.
        """
        ticket = Ticket(client, units, next(self._orders))
        if self._queue or units > self._free:
            if self._waiting[client] + units > self.max_waiting_per_client:
                raise OverloadedError("client", f"{self._waiting[client]} answers are waiting for this client already")
            if self.num_waiting + units > self.max_waiting:
                raise OverloadedError("server", f"{self.num_waiting} answers are waiting already")
        self._queue.append(ticket)
        self._waiting[client] += units
        self._grant()
        try:
            await ticket.granted.wait()
        except BaseException:
            self.leave(ticket)
            raise
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Give the places back, or stop waiting for them. Doing it twice does no harm."""
        if ticket.left:
            return
        ticket.left = True
        if ticket.granted.is_set():
            self._free += ticket.units
            self._take(self._running, ticket)
        else:
            self._queue.remove(ticket)
            self._take(self._waiting, ticket)
        self._grant()

    def _grant(self) -> None:
        while self._queue:
            ticket = min(self._queue, key=self._rank)
            if ticket.units > self._free:
                return  # a large request is not overtaken for ever by small ones
            self._queue.remove(ticket)
            self._take(self._waiting, ticket)
            self._free -= ticket.units
            self._running[ticket.client] += ticket.units
            self._turns[ticket.client] = next(self._orders)
            ticket.granted.set()

    def _rank(self, ticket: Ticket) -> tuple[int, int, int]:
        return self._running[ticket.client], self._turns.get(ticket.client, -1), ticket.order

    def _take(self, counter: Counter[str], ticket: Ticket) -> None:
        counter[ticket.client] -= ticket.units
        if counter[ticket.client] <= 0:
            del counter[ticket.client]
        if ticket.client not in self._running and ticket.client not in self._waiting:
            self._turns.pop(ticket.client, None)
