"""The routes about several futures of a sampling session: which are done, cancelling one, joining a session."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from sqlalchemy import Connection, func, insert, select, update

from model_foundry.service import journal as tables
from model_foundry.service.bodies import Refusal, read_body, read_json, reply, text
from model_foundry.service.front import HOLD_SECONDS, Front
from model_foundry.service.requests import CLONE_BLOCK, RetrieveFutures

Route = Callable[[Front, Request], Awaitable[Response]]


def future_routes() -> dict[tuple[str, str], Route]:
    """(method, path below /api/v1) -> route."""
    return {
        ("POST", "retrieve_futures"): retrieve_many,
        ("POST", "cancel_future"): cancel,
        ("POST", "join_sampling_session"): join,
    }


async def retrieve_many(front: Front, request: Request) -> Response:
    """Which of a sampler's operations were finished after `prev_cursor`; held until one is, or for `timeout` seconds.

    A cursor is the time of the last one in microseconds, which a restart does not change.
    """
    tenant = front.tenant(request)
    asked = await read_body(request, RetrieveFutures, limit=front.limits.body_bytes)
    sampler = front.sampler(asked.target.sampling_session_id, tenant)
    clone, cursor = asked.target.cloned_sampler_id, asked.prev_cursor
    hold = HOLD_SECONDS if asked.timeout is None else min(asked.timeout, HOLD_SECONDS)
    deadline = asyncio.get_running_loop().time() + hold
    while True:
        # Before it is looked up: what is finished meanwhile is told by its event.
        events = [front.arrival(sampler.sampler_id)]
        events += [each.done for each in front.open.values() if each.lane == sampler.sampler_id]
        events = [event for event in events if not event.is_set()]
        found = await front.commit(
            lambda connection: _finished(connection, sampler.sampler_id, clone, cursor), durable=False
        )
        left = deadline - asyncio.get_running_loop().time()
        if found or left <= 0:
            return reply({"completions": found, "cursor": max([cursor, *(item.pop("cursor") for item in found)])})
        await _any_of(events, left)


async def _any_of(events: list[asyncio.Event], seconds: float) -> None:
    waiting = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()


def _finished(connection: Connection, lane: str, clone: int, cursor: int) -> list[dict[str, Any]]:
    table = tables.operations
    columns = (table.c.request_id, table.c.failed, table.c.finished, func.length(table.c.reply).label("size"))
    wanted = (
        table.c.lane == lane,
        table.c.finished >= cursor / 1e6,
        table.c.seq >= clone * CLONE_BLOCK,
        table.c.seq < (clone + 1) * CLONE_BLOCK,
    )
    rows = connection.execute(select(*columns).where(*wanted).order_by(table.c.finished)).all()
    found = []
    for row in rows:
        if (at := int(row.finished * 1e6)) > cursor:
            one = {"request_id": row.request_id, "state": "failed" if row.failed else "finished", "cursor": at}
            found.append(one if row.failed else {**one, "response_payload_uncompressed_size": row.size})
    return found


async def cancel(front: Front, request: Request) -> Response:
    """A sampling operation that has not begun is not done; one that has is finished, and nobody need ask for it."""
    tenant, values = front.tenant(request), await read_json(request, limit=front.limits.body_bytes)
    request_id = text(values, "request_id")
    operation = front.open.get(request_id)
    if operation is None:
        operation = await front.commit(front.books.read_operation(request_id), durable=False)
    if operation is None or tenant.sees not in (None, operation.owner):
        raise Refusal(404, f"there is no request {request_id}")
    if operation.kind != "asample":
        raise Refusal(400, f"{request_id} is {operation.kind}; only samples can be cancelled")
    operation.is_cancelled = True
    return Response(status_code=204)


async def join(front: Front, request: Request) -> Response:
    """A number for another client of a sampling session, which no other has; the first client's is 0."""
    tenant, values = front.tenant(request), await read_json(request, limit=front.limits.body_bytes)
    sampler = front.sampler(text(values, "sampling_session_id"), tenant)

    def count(connection: Connection) -> int:
        key = f"clients of {sampler.sampler_id}"
        row = connection.execute(select(tables.meta.c.value).where(tables.meta.c.key == key)).first()
        number = 1 if row is None else int(row.value) + 1
        change = (
            insert(tables.meta).values(key=key, value=str(number))
            if row is None
            else update(tables.meta).where(tables.meta.c.key == key).values(value=str(number))
        )
        connection.execute(change)
        return number

    return reply({"type": "join_sampling_session", "client_counter": await front.commit(count)})
