"""A service from a configuration: its parts put together, started, watched over, and stopped with everything kept."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn

from model_foundry.checkpoint.lock import FileLock, LockHeldError
from model_foundry.config.service import ServiceConfig
from model_foundry.engine.torch_engine import TorchEngine
from model_foundry.errors import RunError
from model_foundry.models.finder import KNOWN_MODELS, ModelSource, resolve_model
from model_foundry.service.app import make_app
from model_foundry.service.books import Books
from model_foundry.service.execute import Executor
from model_foundry.service.front import Front, Limits
from model_foundry.service.host import Host
from model_foundry.service.janitor import Janitor
from model_foundry.service.journal import Journal
from model_foundry.service.keys import Keys
from model_foundry.service.sampling import Texts
from model_foundry.service.worker import Worker

logger = logging.getLogger(__name__)


def serve(config: ServiceConfig, *, announce: Callable[[str], None]) -> None:
    """Run until SIGINT or SIGTERM.

    Args:
        announce: gets the address when the service is ready.

    Raises:
        RunError: the state folder is another service's, in use, or not to be read; or the address is taken.
        ModelError: the base cannot be loaded.
    """
    lock = _lock(config.state_dir)
    try:
        journal = Journal(config.state_dir)
        try:
            asyncio.run(_serve(config, journal, announce))
        finally:
            journal.close()
    finally:
        lock.release()


async def _serve(config: ServiceConfig, journal: Journal, announce: Callable[[str], None]) -> None:
    books = Books(journal)
    source = resolve_model(config.base_model)
    host = _host(config, books, source)
    journal.claim("base", host.fingerprint, what="models trained over another base")
    executor = Executor(books, host, Texts(source.folder), _names(config, source))
    worker = Worker(executor, books, asyncio.get_running_loop())
    unfinished = books.unfinished()
    front = Front(
        books, worker, executor, Keys(journal, is_open=_is_loopback(config.host)),
        Limits(config.max_body_bytes, config.max_waiting_per_key, config.max_models_per_key),
        open={operation.request_id: operation for operation in unfinished},
    )  # fmt: skip
    listener = _listen(config.host, config.port)
    if not front.keys.takes_every_key and not front.keys.list():
        logger.warning("no key was minted, and %s is no loopback address: nobody can use this service; "
                       "foundry service keys mint NAME --state-dir %s", config.host, config.state_dir)  # fmt: skip
    if unfinished:
        logger.info("%s operations were accepted before and not done; doing them now", len(unfinished))
    worker.start(unfinished)
    janitor = Janitor(front, session_timeout=config.session_timeout_seconds, result_seconds=config.result_hours * 3600)
    watching = asyncio.create_task(janitor.run())
    try:
        await _answer(front, listener, announce)
    finally:
        watching.cancel()
        await asyncio.to_thread(worker.stop)


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


def _host(config: ServiceConfig, books: Books, source: ModelSource) -> Host:
    engine = TorchEngine(
        device=config.device,
        dtype=config.dtype,
        num_threads=config.num_threads,
        micro_batch_tokens=config.micro_batch_tokens,
    )
    return Host(
        books, engine, source, folder=config.state_dir,
        max_models=config.max_resident_models, snapshot_seconds=config.snapshot_seconds,
    )  # fmt: skip


def _names(config: ServiceConfig, source: ModelSource) -> tuple[str, ...]:
    """Every name the base may be asked for by; the one to tell first."""
    known = KNOWN_MODELS.get(config.base_model.lower())
    names = [*config.model_names, config.base_model, str(source.folder), str(source.folder.resolve())]
    return tuple(dict.fromkeys([*names, *([known.repository] if known else [])]))


def _lock(state_dir: Path) -> FileLock:
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        return FileLock.acquire(state_dir / ".lock", wait_seconds=5.0)
    except LockHeldError as error:
        hint = "Stop it, or choose another state_dir."
        raise RunError(f"{error.holder} serves from here", where=str(state_dir), hint=hint) from None
    except OSError as error:
        raise RunError(f"cannot be written ({error.strerror})", where=str(state_dir)) from error


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
