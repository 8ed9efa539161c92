"""Requests to a training service, and waiting for what becomes of them.

Tried again is whatever may pass: no connection, 408, 429, 5xx. Every operation has a number of its own, by which the
service tells a repeat from something new, so trying again never does anything twice. It knows HTTP and nothing of
models.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

import httpx

from model_foundry.client.wire import PROTOBUF
from model_foundry.errors import RequestFailedError, ServiceError, ServiceUnreachableError

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.25, 10.0
_HELD_SECONDS = 45.0
"""How long a question after a result may be held by the service."""
_SHORTEST_HOLD_SECONDS = 0.1
"""A service that does not hold questions is not asked more often than this."""
HEARTBEAT_SECONDS = 10.0
logger = logging.getLogger(__name__)


class Connection:
    """To one service, used in one event loop.

    Args:
        transport: requests go through it instead of a socket, where there is one.
        patience_seconds: how long a service may be away before that is an error.
    """

    def __init__(
        self, url: str, *, api_key: str, transport: httpx.AsyncBaseTransport | None = None, patience_seconds: float
    ) -> None:
        self.url, self.patience_seconds = url, patience_seconds
        self._client = httpx.AsyncClient(
            base_url=f"{url.rstrip('/')}/api/v1/",
            headers={"X-API-Key": api_key},
            transport=transport,
            timeout=httpx.Timeout(30.0, read=_HELD_SECONDS + 15.0),
            # Every operation that is under way holds a question.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def get(self, path: str, **params: Any) -> dict[str, Any]:
        wanted = {name: value for name, value in params.items() if value is not None}
        return (await self.call("GET", path, params=wanted)).json()

    async def post(self, path: str, values: Mapping[str, Any]) -> dict[str, Any]:
        return (await self.call("POST", path, json=values)).json()

    async def call(
        self, method: str, path: str, *, patience_seconds: float | None = None, **request: Any
    ) -> httpx.Response:
        """An answer that is none of try-again.

        Raises:
            ServiceError: refused. ServiceUnreachableError: nobody answered for `patience_seconds`.
        """
        patience = self.patience_seconds if patience_seconds is None else patience_seconds
        deadline, pause = time.monotonic() + patience, _FIRST_PAUSE_SECONDS
        while True:
            answer: httpx.Response | None = None
            try:
                answer = await self._client.request(method, path, **request)
                if not _may_pass(answer):
                    break
                why = f"HTTP {answer.status_code}: {_said(answer)}"
            except httpx.TransportError as error:
                why = str(error) or type(error).__name__
            wait = _asked_pause(answer) or pause
            if time.monotonic() + wait > deadline:
                raise self._gave_up(answer, why, patience)
            await asyncio.sleep(wait)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        if answer.is_success:
            return answer
        raise ServiceError(_said(answer), where=f"{self.url}, {path}", status=answer.status_code)

    def _gave_up(self, answer: httpx.Response | None, why: str, patience: float) -> ServiceError:
        what = f"tried for {patience:.0f} seconds ({why})"
        if answer is not None:
            return ServiceError(what, where=self.url, status=answer.status_code)
        return ServiceUnreachableError(what, where=self.url, hint="Start it: foundry service base_model=NAME.")

    async def result(self, request_id: str) -> httpx.Response:
        """What became of an operation, as soon as it is known.

        Raises:
            RequestFailedError: it failed. ServiceError: nothing is known of it.
        """
        while True:
            began = time.monotonic()
            body = {"request_id": request_id, "allow_metadata_only": False}
            answer = await self._question(body)
            if answer is not None:
                values = {} if PROTOBUF in answer.headers.get("content-type", "") else answer.json()
                if values.get("error") is not None:
                    raise RequestFailedError(
                        str(values["error"]), where=request_id, category=values.get("category", "unknown")
                    )
                if values.get("type") != "try_again":
                    return answer
            await asyncio.sleep(max(0.0, _SHORTEST_HOLD_SECONDS - (time.monotonic() - began)))

    async def _question(self, body: Mapping[str, Any]) -> httpx.Response | None:
        """One question after a result; None: not yet."""
        try:
            answer = await self._client.post("retrieve_future", json=body, headers={"Accept": PROTOBUF})
        except httpx.TransportError:
            answer = None
        if answer is not None and answer.status_code == 408:
            return None
        if answer is not None and not _may_pass(answer) and answer.is_success:
            return answer
        # Whatever else it is, `call` knows how to be patient with it or what to say.
        return await self.call("POST", "retrieve_future", json=body, headers={"Accept": PROTOBUF})

    async def beat(self, session_id: str) -> None:
        """Let the service know of the session every few seconds, until it is over."""
        heard = time.monotonic()
        while True:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            try:
                answer = await self._client.post("session_heartbeat", json={"session_id": session_id})
            except httpx.TransportError:
                answer = None
            if answer is not None and answer.status_code == 410:
                return
            if answer is not None and answer.is_success:
                heard = time.monotonic()
            elif time.monotonic() - heard > 120:
                logger.warning("%s: the service has not answered for two minutes", self.url)
                heard = time.monotonic()


def _may_pass(answer: httpx.Response) -> bool:
    is_temporary = answer.status_code in (408, 429) or answer.status_code >= 500
    return is_temporary and answer.headers.get("x-should-retry") != "false"


def _asked_pause(answer: httpx.Response | None) -> float | None:
    asked = "" if answer is None else answer.headers.get("retry-after", "")
    return float(asked) if asked.isdecimal() else None


def _said(answer: httpx.Response) -> str:
    try:
        values = answer.json()
        return str(values.get("error") or values.get("detail"))
    except ValueError:
        return answer.text[:200] or answer.reason_phrase
