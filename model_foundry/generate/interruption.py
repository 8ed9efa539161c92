"""Ctrl-C and SIGTERM: at once where nothing can be lost, after the answer where one is on its way.

Handlers can only be set by a process's main thread; elsewhere whoever started the run stops it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def leave_on_signals() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""

    def leave(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    with _handling(leave):
        yield


@contextmanager
def shielded() -> Iterator[None]:
    """A signal waits for the end of the block; a second Ctrl-C does not."""
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)
        # A handler may run in the middle of a write to a buffered stream, so none is used here.
        with suppress(OSError, ValueError):
            os.write(sys.stderr.fileno(), b"waiting for the answer that is on its way; again to leave without it\n")

    with _handling(ask):
        yield
    if asked:
        raise KeyboardInterrupt


@contextmanager
def _handling(handler: Callable[[int, Any], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
