"""SIGTERM and Ctrl-C: the training loop saves and leaves; anywhere else there is nothing to save, and we leave at once.

Handlers can only be set by a process's main thread; a run in another thread is stopped by whoever started it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from model_foundry.engine.ranks import current

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def leave_on_signals() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as Ctrl-C does, so that whatever is open is closed in order."""

    def leave(number: int, frame: Any) -> None:
        if not _is_ending():
            raise KeyboardInterrupt

    with _handling(leave):
        yield


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Yields whether a signal has come: the loop saves after the step it is in. A second Ctrl-C leaves at once."""
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if _is_ending():
            return
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)
        # A handler may run in the middle of a write to a buffered stream or of a log call, so neither is used here.
        with suppress(OSError, ValueError):
            os.write(sys.stderr.fileno(), f"{signal.Signals(number).name}: saving after this step\n".encode())

    with _handling(ask):
        yield lambda: bool(asked)


def _is_ending() -> bool:
    """Whether another process of the run is gone: the launcher then stops the rest, which are about to say so."""
    ranks = current()
    return ranks is not None and ranks.broken


@contextmanager
def _handling(handler: Callable[[int, Any], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, earlier in before.items():
            # Who gave a signal another meaning meanwhile means it to last: a lost rank ignores its launcher.
            if signal.getsignal(number) is handler:
                signal.signal(number, earlier)
