"""Server-sent events, and waiting for an answer while watching whether anybody still waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

import orjson
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from model_foundry.server.problems import Problem, speaks_openai

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"


class ClientGoneError(Exception):
    """Nobody reads the answer any more."""


def event(value: Any) -> bytes:
    """One event with a JSON value."""
    return b"data: " + orjson.dumps(value) + b"\n\n"


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes away. The body must have been read.

    Raises:
        ClientGoneError: it went away.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        for each in (task, watcher):
            each.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await each


def stream(
    request: Request, events: AsyncIterator[bytes], *, close: Callable[[], Awaitable[None]]
) -> StreamingResponse:
    """A response of these events; an error on the way becomes the last one.

    Args:
        close: called at the end in any case. Where the client goes before the first event, `events` never begins, and
            nothing that it would do at its end is done.
    """
    return _Closing(close, _with_last_words(request.url.path, events))


class _Closing(StreamingResponse):
    def __init__(self, close: Callable[[], Awaitable[None]], events: AsyncIterator[bytes]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._close()


async def _with_last_words(path: str, events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    try:
        async for each in events:
            yield each
    except Problem as problem:
        yield event(
            problem.as_openai() if speaks_openai(path) else {"error": problem.message, "status": problem.status}
        )


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
