"""A training service in this process, for clients that have no URL: the same parts, without a socket.

Its clients share it: a state folder belongs to one service at a time. It ends with the last of them, or with the
process; what it accepted is on the disk either way.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model_foundry.client.futures import LoopThread
from model_foundry.errors import MissingExtraError, UsageError


@dataclass(slots=True, eq=False)
class InProcess:
    """A service at work: requests through `transport`, from `loop`."""

    base_model: str
    state_dir: Path
    options: Mapping[str, Any]
    loop: LoopThread
    transport: Any = None
    num_clients: int = 0
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)


_running: dict[Path, InProcess] = {}
_lock = threading.Lock()


def join(base_model: str, *, state_dir: Path, options: Mapping[str, Any]) -> InProcess:
    """The service over a state folder, started where this process has none.

    Raises:
        UsageError: the one that is running is over another base, or was started otherwise.
        RunError, ModelError, ConfigError: it cannot be started.
    """
    place = state_dir.resolve()
    with _lock:
        found = _running.get(place)
        if found is None:
            found = _started(base_model, place, options)
            _running[place] = found
        elif (found.base_model, found.options) != (base_model, dict(options)):
            what = f"a client of this process has it open with base_model={found.base_model}, {dict(found.options)}"
            raise UsageError(what, where=str(state_dir), hint="Close that client, or choose another state_dir.")
        found.num_clients += 1
        return found


def leave(service: InProcess) -> None:
    """One client fewer; the last one writes every model down and ends the service."""
    with _lock:
        service.num_clients -= 1
        if service.num_clients <= 0 and _running.pop(service.state_dir, None) is not None:
            _stop(service)


def _started(base_model: str, place: Path, options: Mapping[str, Any]) -> InProcess:
    try:
        from model_foundry.service.embedded import embedded
    except ModuleNotFoundError as error:
        raise MissingExtraError(str(error.name), "service") from error
    service = InProcess(base_model, place, dict(options), LoopThread("training service"))

    async def enter() -> Any:
        return await service.stack.enter_async_context(embedded(base_model, state_dir=place, options=options))

    try:
        service.transport = service.loop.run(enter())
    except BaseException:
        service.loop.stop()
        raise
    return service


def _stop(service: InProcess) -> None:
    service.loop.run(service.stack.aclose())
    service.loop.stop()


@atexit.register
def _stop_all() -> None:
    for service in list(_running.values()):
        _stop(service)
    _running.clear()
