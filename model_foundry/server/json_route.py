"""JSON as the standard has it: UTF-8, no NaN, no half characters, no bottomless nesting."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.routing import APIRoute


class JsonRequest(Request):
    async def json(self) -> Any:
        """Raises: json.JSONDecodeError, which FastAPI knows."""
        return orjson.loads(await self.body())


class StrictJsonRoute(APIRoute):
    """Reads bodies with orjson, which refuses what the standard library's reader lets through."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return strict
