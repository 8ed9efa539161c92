"""The page at /: what it shows, live, and a checkpoint as one file.

It is plain HTML with a small script from here and nothing from elsewhere. Who sees what is as in the API: a key sees
its own. Without a key, and while a service on a loopback address takes every key, it shows everybody's.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from model_foundry.service.bodies import Refusal, reply
from model_foundry.service.downloads import as_tar
from model_foundry.service.front import Front
from model_foundry.service.keys import Tenant
from model_foundry.service.listing import shown_checkpoints

Route = Callable[[Front, Request], Awaitable[Response]]
_SAFE = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page/style.css": ("style.css", "text/css; charset=utf-8"),
}
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_MOST = 200
"""Of each kind, the newest."""


def page_routes() -> dict[str, Route]:
    """Path -> route; all are asked with GET."""
    return {
        **{path: _file(*each) for path, each in _FILES.items()},
        "/page/state.json": state,
        "/page/archive": archive,
    }


def _file(name: str, media_type: str) -> Route:
    content = (files("model_foundry.service") / "page" / name).read_bytes()

    async def send(front: Front, request: Request) -> Response:
        return Response(content, media_type=media_type, headers=_SAFE)

    return send


def _viewer(front: Front, request: Request) -> Tenant:
    """Who looks.

    Raises:
        Refusal: a key is needed. A foreign page that has its name point to this machine is asked for one as well.
    """
    if request.headers.get("x-api-key"):
        return front.tenant(request)
    host = request.headers.get("host", "").rsplit(":", 1)[0]
    if front.keys.takes_every_key and host in _LOOPBACK:
        return Tenant("page", "admin")
    raise Refusal(401, "this service wants a key: enter yours above")


async def state(front: Front, request: Request) -> Response:
    """Everything that the page shows."""
    sees = _viewer(front, request).sees
    books, host = front.books, front.executor.host
    names = {key.key_id: key.name for key in front.keys.list()}

    def mine(items: Any) -> list[Any]:
        found = [item for item in items if sees in (None, item.owner)]
        return sorted(found, key=lambda item: item.created, reverse=True)[:_MOST]

    sessions = [
        {"id": each.session_id, "tenant": names.get(each.owner, each.owner), "created": each.created,
         "finished": each.finished}
        for each in mine(books.sessions.values())
    ]  # fmt: skip
    models = [
        {"id": each.model_id, "tenant": names.get(each.owner, each.owner), "rank": each.facts.get("rank"),
         "state": each.state, "done": each.done_seq + 1, "in_memory": host.is_resident(each.model_id),
         "curve": _curve(front, each.model_id)}
        for each in mine(books.models.values())
    ]  # fmt: skip
    checkpoints = [
        {"path": each.path, "name": each.name, "bytes": each.size_bytes, "created": each.created,
         "expires": each.expires, "export": f"FOUNDRY_STATE_DIR={host.folder.resolve()} foundry export {each.path}"}
        for each in mine(shown_checkpoints(front))
    ]  # fmt: skip
    queues = [
        {"tenant": names.get(owner, owner), "waiting": each.waiting, "samples": each.samples, "seconds": each.seconds}
        for owner, each in sorted(front.worker.queues().items())
        if sees in (None, owner)
    ]
    found = {"base": front.executor.base_models[0], "sessions": sessions, "models": models,
             "checkpoints": checkpoints, "queues": queues}  # fmt: skip
    answer = reply(found)
    answer.headers.update(_SAFE)
    return answer


def _curve(front: Front, model_id: str) -> list[tuple[int, float]]:
    """JSON has no infinity."""
    return [point for point in front.executor.curves.of(model_id).points if math.isfinite(point[1])]


async def archive(front: Front, request: Request) -> Response:
    """A checkpoint as a tar file."""
    path = request.query_params.get("path", "")
    found = front.books.checkpoint_at(path, _viewer(front, request).sees)
    if found is None:
        raise Refusal(404, f"there is no checkpoint {path}")
    answer = await as_tar(front, found)
    answer.headers.update(_SAFE)
    return answer
