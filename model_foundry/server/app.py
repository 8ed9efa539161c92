"""The application: routes behind the guard, with errors in the shapes that clients expect."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from model_foundry import __version__
from model_foundry.config.serve import ServeConfig
from model_foundry.server import routes_admin, routes_generate, routes_openai, routes_status
from model_foundry.server.adapters import AdapterShelf, Follower
from model_foundry.server.admission import Admission
from model_foundry.server.answering import Answering
from model_foundry.server.closing_time import ClosingTime
from model_foundry.server.guard import LOCAL_NAMES, Guard
from model_foundry.server.opening import Opened
from model_foundry.server.problems import Problem, from_validation
from model_foundry.server.security import Keys
from model_foundry.server.stats import Stats
from model_foundry.server.streaming import ClientGoneError

logger = logging.getLogger(__name__)


def make_app(
    config: ServeConfig, opened: Opened, keys: Keys, *, closing: ClosingTime
) -> Callable[..., Awaitable[None]]:
    """An ASGI application for a model that has been opened."""
    stats = Stats()
    limits = config.limits
    admission = Admission(
        places=opened.backend.num_slots, waiting=limits.waiting, waiting_per_client=limits.waiting_per_client
    )
    answering = Answering(opened.backend, opened.catalog, admission, limits, stats, closing)
    stats.gauge("foundry_running", "Answers being computed", lambda: admission.num_running)
    stats.gauge("foundry_waiting", "Answers waiting for a place", lambda: admission.num_waiting)
    app = FastAPI(
        title="Model Foundry", version=__version__, docs_url=None, redoc_url=None, lifespan=_lifespan(opened.follower)
    )
    _handle_errors(app)
    shelf = AdapterShelf(opened.backend, opened.catalog, base=opened.base, folder=config.access.adapter_folder)
    app.include_router(routes_status.router(answering, stats, is_draining=closing.is_draining))
    app.include_router(routes_generate.router(answering, default_max_tokens=config.default_max_tokens))
    app.include_router(routes_openai.router(answering))
    app.include_router(routes_admin.router(shelf))
    hosts = None if keys else LOCAL_NAMES | {config.host} | set(config.access.allowed_hosts)
    guard = Guard(app, keys=keys, access=config.access, limits=limits, hosts=hosts, stats=stats)
    if not config.access.cors_origins:
        return guard
    return CORSMiddleware(
        guard,  # pyright: ignore[reportArgumentType]
        allow_origins=list(config.access.cors_origins),
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["Authorization", "Content-Type"],
    )


def _lifespan(follower: Follower | None) -> Any:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        task = None if follower is None else asyncio.create_task(follower.run(lambda: False))
        yield
        if task is not None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    return lifespan


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return from_validation(error.errors(), request.url.path)

    @app.exception_handler(Problem)
    async def problem(request: Request, error: Problem) -> Response:
        return error.response(request.url.path)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        response = Problem(error.status_code, str(error.detail)).response(request.url.path)
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(ClientGoneError)
    async def gone(_: Request, __: ClientGoneError) -> Response:
        return Response(status_code=499)

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> Response:
        logger.error("request %s failed", request.state.visit.id, exc_info=error)
        return Problem(500, "the server failed on this request; its log says why").response(request.url.path)
