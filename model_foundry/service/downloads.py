"""The routes by which bytes leave: files of a checkpoint, a checkpoint as one tar, a session's timeline.

A client is given an address that is signed and good for an hour, and fetches it without a key.
"""

from __future__ import annotations

import asyncio
import io
import tarfile
from collections.abc import Awaitable, Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import quote

import orjson
from fastapi import Request
from fastapi.responses import FileResponse, Response, StreamingResponse
from sqlalchemy import Connection, select

from model_foundry.checkpoint.manifest import MANIFEST_NAME
from model_foundry.checkpoint.store import Checkpoint as StoredCheckpoint
from model_foundry.errors import CheckpointError
from model_foundry.service import journal as tables
from model_foundry.service.bodies import Refusal, reply
from model_foundry.service.books import Checkpoint
from model_foundry.service.front import Front

Route = Callable[[Front, Request], Awaitable[Response]]
GOOD_SECONDS = 3600
_BLOCK_BYTES = 1 << 20


def download_routes() -> dict[tuple[str, str], Route]:
    """(method, path below /api/v1) -> route."""
    at = "training_runs/{run_id}/checkpoints/{segment}/{name}"
    return {
        ("GET", f"{at}/archive"): archive,
        ("GET", f"{at}/external_weights_urls"): external_weights_urls,
        ("GET", "sessions/{session_id}/trace_export"): trace_export,
        ("GET", "downloads/{what:path}"): download,
    }


def _address(front: Front, request: Request, what: str) -> tuple[str, datetime]:
    expires = int(front.books.clock()) + GOOD_SECONDS
    query = f"expires={expires}&signature={front.signer.sign(f'{what} {expires}')}"
    url = f"{str(request.base_url).rstrip('/')}/api/v1/downloads/{quote(what)}?{query}"
    return url, datetime.fromtimestamp(expires, timezone.utc)  # noqa: UP017


def _readable(front: Front, request: Request) -> Checkpoint:
    """The checkpoint of a path: this client's, or a published one."""
    tenant, given = front.tenant(request), request.path_params
    path = f"tinker://{given['run_id']}/{given['segment']}/{given['name']}"
    found = front.books.checkpoint_at(path, tenant.sees)
    if found is None:
        raise Refusal(404, f"there is no checkpoint {path}")
    return found


async def archive(front: Front, request: Request) -> Response:
    """Where the whole checkpoint is, as a tar."""
    url, expires = _address(front, request, f"archive/{_readable(front, request).path.removeprefix('tinker://')}")
    gmt = expires.strftime("%a, %d %b %Y %H:%M:%S GMT")
    return Response(status_code=302, headers={"Location": url, "Expires": gmt})


async def external_weights_urls(front: Front, request: Request) -> Response:
    found = _readable(front, request)
    place = found.path.removeprefix("tinker://")
    folder = (await asyncio.to_thread(opened, front, found)).path / "adapter"
    addresses = {file.name: _address(front, request, f"file/{place}/{file.name}") for file in sorted(folder.iterdir())}
    expires = max(when for _, when in addresses.values())
    return reply({"urls": {name: url for name, (url, _) in addresses.items()}, "expires": expires.isoformat()})


async def trace_export(front: Front, request: Request) -> Response:
    """A session's operations as a timeline that ui.perfetto.dev and chrome://tracing open."""
    session = front.session(request.path_params["session_id"], front.tenant(request))
    url, _ = _address(front, request, f"trace/{session.session_id}")
    return reply({"status": "ready", "url": url})


async def download(front: Front, request: Request) -> Response:
    what, query = request.path_params["what"], request.query_params
    expires, signature = query.get("expires", ""), query.get("signature", "")
    if not expires.isdecimal() or not front.signer.made(f"{what} {expires}", signature):
        raise Refusal(403, "this address was not made by this service")
    if int(expires) < front.books.clock():
        raise Refusal(403, "this address is not good any more; ask for another")
    kind, _, rest = what.partition("/")
    if kind == "trace":
        events = await front.commit(lambda connection: _timeline(connection, rest), durable=False)
        return Response(orjson.dumps({"traceEvents": events}), media_type="application/json")
    run, segment, name, *file = rest.split("/")
    found = front.books.checkpoint_at(f"tinker://{run}/{segment}/{name}", None)
    if found is None:
        raise Refusal(404, "the checkpoint is gone")
    if kind == "file":
        return FileResponse((await asyncio.to_thread(opened, front, found)).path / "adapter" / file[0])
    return await as_tar(front, found)


async def as_tar(front: Front, found: Checkpoint) -> Response:
    """A checkpoint as one file.

    Raises:
        Refusal: it is damaged.
    """
    folder = (await asyncio.to_thread(opened, front, found)).path
    headers = {"Content-Disposition": f'attachment; filename="{found.name}.tar"'}
    return StreamingResponse(_tar(folder), media_type="application/x-tar", headers=headers)


def opened(front: Front, found: Checkpoint) -> StoredCheckpoint:
    """Every byte verified, so nothing damaged is handed out.

    Raises:
        Refusal: it is damaged.
    """
    try:
        return front.executor.host.open(found)
    except CheckpointError as error:
        raise Refusal(410, str(error)) from error


def _tar(folder: Path) -> Iterator[bytes]:
    """The adapter's files at the top, the optimizer's beside them, a block at a time."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST_NAME]
    for path in files:
        parts = path.relative_to(folder).parts
        entry = tarfile.TarInfo("/".join(parts[1:] if parts[0] == "adapter" else parts))
        entry.size, entry.mtime = path.stat().st_size, int(path.stat().st_mtime)
        yield entry.tobuf()
        with open(path, "rb") as file:
            while block := file.read(_BLOCK_BYTES):
                yield block
        yield bytes(-entry.size % tarfile.BLOCKSIZE)
    end = io.BytesIO()
    tarfile.open(fileobj=end, mode="w").close()
    yield end.getvalue()


def _timeline(connection: Connection, session_id: str) -> list[dict[str, Any]]:
    """One bar an operation, from its acceptance to its answer; a lane is a thread."""
    table = tables.operations
    columns = (table.c.lane, table.c.kind, table.c.request_id, table.c.created, table.c.finished, table.c.failed)
    mine = table.c.lane.startswith(f"{session_id}:", autoescape=True)
    rows = connection.execute(select(*columns).where(mine).order_by(table.c.created)).all()
    lanes = {lane: number for number, lane in enumerate(dict.fromkeys(row.lane for row in rows))}
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": number, "args": {"name": lane}}
        for lane, number in lanes.items()
    ]
    for row in rows:
        bar = {"ph": "X", "name": row.kind, "pid": 1, "tid": lanes[row.lane], "ts": row.created * 1e6,
               "args": {"request_id": row.request_id, "failed": bool(row.failed)}}  # fmt: skip
        events.append(bar | {"dur": ((row.finished or row.created) - row.created) * 1e6})
    return events
