"""A stream's end is reached, however early its client goes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request

from model_foundry.server.streaming import stream


def test_a_client_that_is_gone_before_the_first_event_leaves_nothing_open() -> None:
    """Its events never begin, so what they would have done at their end never is: a place in the batch was lost."""
    scope: dict[str, Any] = {"type": "http", "path": "/generate/stream", "headers": [], "asgi": {"spec_version": "2.3"}}
    done: list[str] = []

    async def events() -> AsyncIterator[bytes]:
        try:
            yield b"data: 1\n\n"
        finally:
            done.append("events")

    async def close() -> None:
        done.append("close")

    async def gone() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        await asyncio.sleep(0)

    asyncio.run(stream(Request(scope), events(), close=close)(scope, gone, send))
    assert done == ["close"]
