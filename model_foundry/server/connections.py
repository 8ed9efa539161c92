"""Connections that send nothing, or send for ever: closed in time, and never in the way of the next client.

uvicorn's h11 protocol with three rules more. A connection must send its headers in `header_seconds` and its body in
`body_seconds`; and when `most` are open, the one that has waited longest without a request makes room.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


class ConnectionBook:
    """The open connections of one server, and which of them have no request under way (oldest first)."""

    def __init__(self, *, most: int, header_seconds: float, body_seconds: float) -> None:
        self.most, self.header_seconds, self.body_seconds = most, header_seconds, body_seconds
        self.num_open = self.num_closed_early = 0
        self.idle: OrderedDict[GuardedProtocol, None] = OrderedDict()

    def protocol(self, *args: Any, **kwargs: Any) -> GuardedProtocol:
        """What uvicorn calls for each connection."""
        return GuardedProtocol(self, *args, **kwargs)


class GuardedProtocol(H11Protocol):
    def __init__(self, book: ConnectionBook, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._book = book
        self._timer: asyncio.TimerHandle | None = None
        self._waits_for: str | None = None

    def connection_made(self, transport: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        book = self._book
        if book.num_open >= book.most:
            if not book.idle:
                book.num_closed_early += 1
                transport.abort()
            else:
                next(iter(book.idle)).give_up()
        book.num_open += 1
        self._wait_for("headers")

    def connection_lost(self, exc: Exception | None) -> None:
        self._book.num_open -= 1
        self._wait_for(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def give_up(self) -> None:
        """Close now; nothing was promised to this client."""
        self._book.num_closed_early += 1
        self._wait_for(None)
        if self.transport is not None and not self.transport.is_closing():
            self.transport.close()

    def _look(self) -> None:
        """What this connection owes us."""
        if self.transport is None or self.transport.is_closing():
            self._wait_for(None)
        elif self.conn.their_state is h11.IDLE:
            self._wait_for("headers")
        elif self.conn.their_state is h11.SEND_BODY:
            self._wait_for("body")
        else:
            self._wait_for(None)

    def _wait_for(self, what: str | None) -> None:
        if what == self._waits_for:
            return  # the clock runs since it was first owed, however often a byte comes
        self._waits_for = what
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._book.idle.pop(self, None)
        if what is None:
            return
        seconds = self._book.header_seconds
        if what == "body":
            seconds = self._book.body_seconds
        else:
            self._book.idle[self] = None
        self._timer = self.loop.call_later(seconds, self.give_up)
