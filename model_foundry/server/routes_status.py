"""How the server is: /health, /ready, /stats, /metrics; and the page, out of memory."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from importlib.resources import files
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from model_foundry import __version__
from model_foundry.server.answering import Answering
from model_foundry.server.stats import Stats

PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/page/style.css": ("style.css", "text/css; charset=utf-8"),
    "/docs": ("docs.html", "text/html; charset=utf-8"),
    "/page/docs.js": ("docs.js", "text/javascript; charset=utf-8"),
}
"""Path -> (file in the package, its type). Nothing else is read for a client."""


class Health(BaseModel):
    status: str
    timestamp: str
    version: str


def router(answering: Answering, stats: Stats, *, is_draining: Callable[[], bool]) -> APIRouter:
    routes = APIRouter(tags=["status"])

    @routes.get("/health", response_model=Health, responses={503: {"model": Health}}, summary="Is it alive")
    async def health() -> Any:
        alive = answering.backend.alive()
        return JSONResponse(_health("healthy" if alive else "unhealthy"), 200 if alive else 503)

    @routes.get("/ready", response_model=Health, responses={503: {"model": Health}}, summary="Does it take requests")
    async def ready() -> Any:
        going = answering.backend.alive() and not is_draining()
        return JSONResponse(_health("ready" if going else "draining"), 200 if going else 503)

    @routes.get("/stats", summary="What it has done", responses={401: {"description": "no key"}})
    async def show_stats() -> dict[str, Any]:
        return stats.as_dict() | {
            "running": answering.admission.num_running,
            "waiting": answering.admission.num_waiting,
            "models": [model.name for model in answering.catalog],
            **answering.backend.gauges(),
            **answering.backend.describe(),
        }

    @routes.get("/metrics", response_class=Response, summary="The same for Prometheus")
    async def metrics() -> Response:
        return Response(stats.exposition(), media_type=CONTENT_TYPE_LATEST)

    for path, (name, media_type) in PAGE.items():
        _add_page(routes, path, (files("model_foundry.server") / "page" / name).read_bytes(), media_type)
    return routes


def _add_page(routes: APIRouter, path: str, content: bytes, media_type: str) -> None:
    async def page() -> Response:
        return Response(content, media_type=media_type)

    routes.add_api_route(path, page, methods=["GET"], include_in_schema=False)


def _health(status: str) -> dict[str, str]:
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")  # noqa: UP017
    return {"status": status, "timestamp": now, "version": __version__}
