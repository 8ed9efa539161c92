"""What every request passes before a route sees it: host, key, rate, size; and the line in the log that it leaves.

A plain ASGI middleware: nothing is read of a body that is not going to be answered.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException

from model_foundry.config.serve import AccessSection, LimitsSection
from model_foundry.server.problems import Problem
from model_foundry.server.routes_status import PAGE
from model_foundry.server.security import Buckets, Key, Keys, with_defaults
from model_foundry.server.stats import Stats

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

access_log = logging.getLogger("model_foundry.server.access")

OPEN_PATHS = frozenset({"/health", "/ready", "/openapi.json", *PAGE})
"""Answered without a key: nothing in them depends on a model or a client."""
UNCOUNTED = OPEN_PATHS | {"/stats", "/metrics"}
LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
)


@dataclass(slots=True)
class Visit:
    """One request, as far as the log is concerned. Routes add what they know."""

    id: str
    client: str = "-"
    key: Key | None = None
    model: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    status: int = 0


class Guard:
    """The gate.

    Args:
        app: what comes behind it.
        hosts: Host names that are answered; None answers every one (a key protects the server).
    """

    def __init__(
        self,
        app: Callable[..., Awaitable[None]],
        *,
        keys: Keys,
        access: AccessSection,
        limits: LimitsSection,
        hosts: Iterable[str] | None,
        stats: Stats,
        buckets: Buckets | None = None,
    ) -> None:
        self.app, self.keys, self.access, self.limits, self.stats = app, keys, access, limits, stats
        self.hosts = None if hosts is None else frozenset(host.lower() for host in hosts)
        self.buckets = buckets or Buckets()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        visit = Visit(id=uuid.uuid4().hex[:16])
        scope.setdefault("state", {})["visit"] = visit
        started = time.monotonic()

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.status = message["status"]
                headers = [*message.get("headers", ()), *HEADERS, (b"x-request-id", visit.id.encode())]
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self._pass(scope, receive, send_on, visit)
        finally:
            self._note(scope, visit, time.monotonic() - started)

    async def _pass(self, scope: Scope, receive: Receive, send: Send, visit: Visit) -> None:
        path = scope["path"]
        try:
            self._check_length(scope)
            self._check_host(scope)
            if path not in OPEN_PATHS and scope["method"] != "OPTIONS":
                self._check_key(scope, visit)
                self._check_rate(visit)
        except Problem as problem:
            await problem.response(path)(scope, receive, send)
            return
        await self.app(scope, self._bounded(receive), send)

    def _check_host(self, scope: Scope) -> None:
        """A web page that has its name point to this machine must not reach a server without a key (DNS rebinding)."""
        if self.hosts is None:
            return
        given = _header(scope, b"host") or ""
        name = given.rsplit(":", 1)[0] if not given.endswith("]") else given
        if name.lower() not in self.hosts:
            raise Problem(403, "this Host is not answered here; see access.allowed_hosts", code="host_not_allowed")

    def _check_key(self, scope: Scope, visit: Visit) -> None:
        client = scope.get("client")
        visit.client = f"address {client[0]}" if client else "address unknown"
        if not self.keys:
            return
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, presented = (values[0].decode("latin-1") if len(values) == 1 else "").partition(" ")
        if not values:
            raise Problem(401, "a key is needed: Authorization: Bearer KEY", code="missing_api_key")
        if scheme.lower() != "bearer" or not presented.strip() or len(presented) > 512:
            raise Problem(401, "the Authorization header is not of the form Bearer KEY", code="malformed_api_key")
        key = self.keys.find(presented.strip())
        if key is None:
            raise Problem(401, "the key is not one of this server's", code="invalid_api_key")
        visit.client, visit.key = f"key {key.name}", key

    def _check_rate(self, visit: Visit) -> None:
        key = with_defaults(
            visit.key or Key(visit.client, "", ""), rate=self.access.requests_per_minute, burst=self.access.burst
        )
        if key.requests_per_minute is None or key.burst is None:
            return
        wait = self.buckets.take(visit.client, per_minute=key.requests_per_minute, burst=key.burst)
        if wait > 0:
            what = f"more than {key.requests_per_minute:g} requests a minute"
            raise Problem(429, what, code="rate_limit_exceeded", retry_after=wait)

    def _check_length(self, scope: Scope) -> None:
        size = len(scope["raw_path"]) + len(scope["query_string"])
        if size + sum(len(name) + len(value) + 4 for name, value in scope["headers"]) > self.limits.header_bytes:
            what = f"the request line and headers may have {self.limits.header_bytes} bytes"
            raise Problem(431, what, code="headers_too_large")
        declared = _header(scope, b"content-length")
        if declared is not None and (not declared.isdigit() or int(declared[:20]) > self.limits.body_bytes):
            raise self._too_large()

    def _bounded(self, receive: Receive) -> Receive:
        taken = 0

        async def bounded() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.limits.body_bytes:
                raise HTTPException(413, self._too_large().message)  # the one error that reading a body may raise
            return message

        return bounded

    def _too_large(self) -> Problem:
        return Problem(413, f"a body may have {self.limits.body_bytes} bytes", code="body_too_large")

    def _note(self, scope: Scope, visit: Visit, seconds: float) -> None:
        """One line of JSON. The route's template stands for the path: a path may hold anything."""
        route = getattr(scope.get("route"), "path", None)
        path = route or (scope["path"] if scope["path"] in UNCOUNTED else "(none)")
        method = scope["method"] if scope["method"] in ("GET", "POST", "DELETE", "OPTIONS", "HEAD") else "(other)"
        status = visit.status or 499
        self.stats.answered(
            route=path, method=method, status=status, seconds=seconds, counts=scope["path"] not in UNCOUNTED
        )
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": "request", "id": visit.id,
            "client": visit.client, "method": method, "route": path, "status": status, "seconds": round(seconds, 4),
        }  # fmt: skip
        if visit.model is not None:
            line |= {
                "model": visit.model,
                "prompt_tokens": visit.prompt_tokens,
                "completion_tokens": visit.completion_tokens,
            }
        access_log.info(json.dumps(line))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _header(scope: Scope, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)
