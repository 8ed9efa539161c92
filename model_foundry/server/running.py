"""The server as a process: the port first, then the model, then requests until a signal; and a look at its health."""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import uvicorn

from model_foundry.config.serve import ServeConfig
from model_foundry.errors import UsageError
from model_foundry.server.app import make_app
from model_foundry.server.closing_time import ClosingTime
from model_foundry.server.connections import ConnectionBook
from model_foundry.server.guard import is_loopback
from model_foundry.server.opening import open_model
from model_foundry.server.security import Keys, load_keys

logger = logging.getLogger(__name__)
Say = Callable[[str], None]
LAST_WORDS_SECONDS = 2.0
"""After the drain, for answers that were cut off to be written and read."""


def serve(config: ServeConfig, environ: Mapping[str, str], *, say: Say) -> None:
    """Serve until SIGTERM or SIGINT, then let running requests end.

    Raises:
        UsageError: the address cannot be listened on, or would be open to everybody. FoundryError: as `open_model`.
    """
    keys = load_keys(config.access.keys_file, environ)
    refuse_open_address(config, keys)
    listener = listen(config.host, config.port)
    try:
        opened = open_model(config)
        server = make_server(config, opened, keys)
        say(f"serving {', '.join(model.name for model in opened.catalog)} at {url_of(listener)}")
        if not keys:
            say("no key is set: whoever can reach this address on this machine may ask (foundry serve keys add NAME)")
        try:
            server.run(sockets=[listener])
        finally:
            opened.backend.close()
    finally:
        listener.close()


def make_server(config: ServeConfig, opened: Any, keys: Keys) -> Server:
    """uvicorn around the application, with our connections and our way of stopping."""
    limits = config.limits
    book = ConnectionBook(
        most=allowed_connections(limits.connections),
        header_seconds=limits.header_seconds,
        body_seconds=limits.body_seconds,
    )
    closing = ClosingTime(lambda: server.should_exit)
    server = Server(
        uvicorn.Config(
            app=lambda: make_app(config, opened, keys, closing=closing),
            factory=True,
            http=book.protocol,  # pyright: ignore[reportArgumentType]
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=limits.header_bytes,
            timeout_keep_alive=int(limits.header_seconds) + 1,
            timeout_graceful_shutdown=limits.drain_seconds + LAST_WORDS_SECONDS,  # pyright: ignore[reportArgumentType]  it is awaited: fractions count
        ),
        closing,
        drain_seconds=limits.drain_seconds,
    )
    return server


class Server(uvicorn.Server):
    """uvicorn, whose process ends with 0 after SIGTERM and SIGINT: it did what it was told."""

    def __init__(self, config: uvicorn.Config, closing: ClosingTime, *, drain_seconds: float) -> None:
        super().__init__(config)
        self._closing, self._drain_seconds = closing, drain_seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answers that run may end; then they are told that they can't, and after that connections are closed."""
        asyncio.get_running_loop().call_later(self._drain_seconds, self._closing.end)
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        before: dict[signal.Signals, Any] = {}
        with suppress(ValueError):  # not the main thread: a test, which stops it by should_exit
            for each in (signal.SIGTERM, signal.SIGINT):
                before[each] = signal.signal(each, self.handle_exit)
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)


def refuse_open_address(config: ServeConfig, keys: Keys) -> None:
    """Raises: UsageError: others could reach the server, and no key is set."""
    if keys or is_loopback(config.host):
        return
    hint = "Make a key with: foundry serve keys add NAME (and access.keys_file=keys.json), or set FOUNDRY_API_KEY."
    raise UsageError("others can reach this address, so it is not served without a key", where=config.host, hint=hint)


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound, so that a port in use is told before a model is loaded.

    Raises:
        UsageError: the address is taken, or is none of this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UsageError(f"not an address ({error.strerror or error})", where=f"{host}:{port}") from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        hint = "Set another with port=PORT; port=0 takes a free one."
        raise UsageError(f"cannot be listened on ({error.strerror})", where=f"{host}:{port}", hint=hint) from error
    return listener


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def allowed_connections(wanted: int) -> int:
    """Raise this process's limit of open files for so many connections, and say when it stays below."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + 200
    if soft != resource.RLIM_INFINITY and soft < needed:
        target = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
        soft = target
    allowed = wanted if soft == resource.RLIM_INFINITY else max(16, min(wanted, soft - 200))
    if allowed < wanted:
        logger.warning("only %s connections may be open at once here (ulimit -n), not %s", allowed, wanted)
    return allowed


def check_health(config: ServeConfig, environ: Mapping[str, str], *, say: Say) -> bool:
    """Whether the server at host:port is healthy and takes requests."""
    host = "127.0.0.1" if config.host in ("0.0.0.0", "::") else config.host
    url = f"http://{f'[{host}]' if ':' in host else host}:{config.port}"
    healthy = True
    for path in ("/health", "/ready"):
        try:
            answer = httpx.get(url + path, timeout=10, trust_env=False)
            status = answer.json().get("status", "?")
        except (httpx.HTTPError, ValueError, AttributeError) as error:
            say(f"{url}{path}: no answer ({error})")
            return False
        say(f"{url}{path}: {answer.status_code} {status}")
        healthy = healthy and answer.status_code == 200
    return healthy


def try_model(config: ServeConfig, environ: Mapping[str, str], *, say: Say) -> bool:
    """Load the model, serve it on a free port, ask it once over HTTP, and stop: whether it answered."""
    listener = listen("127.0.0.1", 0)
    url = url_of(listener)
    opened = open_model(config)
    server = make_server(config, opened, Keys({}))

    async def ask() -> bool:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            async with httpx.AsyncClient(
                base_url=url, timeout=config.limits.request_seconds, trust_env=False
            ) as client:
                answer = await client.post("/generate", json={"prompt": "Hello", "max_tokens": 4})
                health = await client.get("/health")
            say(f"/generate: {answer.status_code}, /health: {health.status_code} {health.json()['status']}")
            return answer.status_code == health.status_code == 200
        except httpx.HTTPError as error:
            say(f"no answer ({error})")
            return False
        finally:
            server.should_exit = True
            await serving

    try:
        return asyncio.run(ask())
    finally:
        opened.backend.close()
        listener.close()


def log_as_json(level: int = logging.INFO) -> None:
    """Everything the server says goes to stderr, a JSON object a line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    for name in ("model_foundry", "uvicorn.error"):
        logger_ = logging.getLogger(name)
        logger_.handlers[:] = [handler]
        logger_.setLevel(level if name == "model_foundry" else logging.ERROR)
        logger_.propagate = False


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if record.name == "model_foundry.server.access":
            return message
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "event": "log", "level": record.levelname.lower(), "logger": record.name, "message": message,
        }  # fmt: skip
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)
