"""A service on an address: started from a configuration, and stopped with everything kept."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import sys
from collections.abc import Callable

import uvicorn

from model_foundry.config.service import ServiceConfig
from model_foundry.errors import RunError
from model_foundry.service.app import make_app
from model_foundry.service.front import Front
from model_foundry.service.running import running

_SWITCH_SECONDS = 0.0005
logger = logging.getLogger(__name__)


def serve(config: ServiceConfig, *, announce: Callable[[str], None]) -> None:
    """Run until SIGINT or SIGTERM.

    Args:
        announce: gets the address when the service is ready.

    Raises:
        RunError: the state folder is another service's, in use, or not to be read; or the address is taken.
        ModelError: the base cannot be loaded.
    """
    asyncio.run(_serve(config, announce))


async def _serve(config: ServiceConfig, announce: Callable[[str], None]) -> None:
    # The worker computes in Python between its products: the loop must not wait 5 ms, the default, each time it does.
    sys.setswitchinterval(_SWITCH_SECONDS)
    async with running(config, every_key=_is_loopback(config.host)) as front:
        listener = _listen(config.host, config.port)
        if not front.keys.takes_every_key and not front.keys.list():
            logger.warning("no key was minted, and %s is no loopback address: nobody can use this service; "
                           "foundry service keys mint NAME --state-dir %s", config.host, config.state_dir)  # fmt: skip
        await _answer(front, listener, announce)


async def _answer(front: Front, listener: socket.socket, announce: Callable[[str], None]) -> None:
    options = uvicorn.Config(
        make_app(front), log_level="warning", access_log=False, lifespan="off",
        timeout_keep_alive=120, timeout_graceful_shutdown=1, server_header=False,
    )  # fmt: skip
    server = uvicorn.Server(options)
    host, port = listener.getsockname()[:2]
    ready = asyncio.create_task(_say_when_ready(server, lambda: announce(f"http://{_in_url(host)}:{port}")))
    await server.serve(sockets=[listener])
    ready.cancel()


async def _say_when_ready(server: uvicorn.Server, say: Callable[[], None]) -> None:
    while not server.started:
        await asyncio.sleep(0.01)
    say()


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        raise RunError(f"cannot listen on {host}:{port} ({error})", hint="Choose another host or port.") from error
    # Connections inherit it. asyncio sets it by itself, but not on those of a listener that it did not make: an answer
    # then waits 40 ms for the acknowledgement of its own head.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
