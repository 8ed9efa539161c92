"""Console and file logging of one run, on the logger `model_foundry` alone.

Everything is attached when a run starts and gone when it ends: the root logger and the loggers of libraries are never
touched, and two runs in one process write neither each other's lines nor any line twice. Knows nothing of training.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime, timezone
from pathlib import Path
from typing import TextIO

from model_foundry.errors import RunError

PACKAGE_LOGGER = "model_foundry"
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

_current_run: ContextVar[object | None] = ContextVar("current_run", default=None)
_attaching = threading.Lock()
_num_attached = 0
_before: tuple[int, bool] = (logging.NOTSET, True)


@contextmanager
def run_logging(
    log_path: Path | None = None, *, level: str = "info", stream: TextIO | None = None, console: bool = True
) -> Iterator[None]:
    """Log to the console from `level` up and to `log_path` everything, until the block ends.

    While a console handler is attached, lines do not also go to the application's own handlers; with
    `console=False` they do.

    Args:
        log_path: the run's own log, appended to.
        stream: where the console is; default whatever stderr is when a line is written.

    Raises:
        RunError: the log file cannot be opened.
    """
    logger = logging.getLogger(PACKAGE_LOGGER)
    key = object()
    token = _current_run.set(key)
    handlers = []
    try:
        if log_path is not None:
            handlers.append(_file_handler(log_path, key))
        if console:
            handlers.append(_console_handler(stream, LEVELS[level], key))
        _attach(logger, handlers, console=console)
        try:
            yield
        finally:
            _detach(logger, handlers)
    finally:
        _current_run.reset(token)


class _RunFilter(logging.Filter):
    """Lets through what this run logs, and what is logged where no run is known (a library's own thread)."""

    def __init__(self, key: object) -> None:
        super().__init__()
        self._key = key

    def filter(self, record: logging.LogRecord) -> bool:
        return _current_run.get() in (self._key, None)


class _ConsoleHandler(logging.StreamHandler):
    """Finds stderr when a line is written: a progress bar or a test may have replaced it since."""

    def __init__(self, stream: TextIO | None) -> None:
        logging.Handler.__init__(self)
        self._fixed = stream

    @property
    def stream(self) -> TextIO:
        return self._fixed if self._fixed is not None else sys.stderr


class _ConsoleFormatter(logging.Formatter):
    """The message alone, with the level before it where it matters; tracebacks stay in the file."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        return f"{record.levelname.lower()}: {message}" if record.levelno >= logging.WARNING else message


class _FileFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        moment = datetime.fromtimestamp(record.created, tz=timezone.utc)  # noqa: UP017
        return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _console_handler(stream: TextIO | None, level: int, key: object) -> logging.Handler:
    handler = _ConsoleHandler(stream)
    handler.setLevel(level)
    handler.setFormatter(_ConsoleFormatter())
    handler.addFilter(_RunFilter(key))
    return handler


def _file_handler(path: Path, key: object) -> logging.Handler:
    try:
        _end_torn_line(path)
        handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise RunError(f"cannot be written ({error.strerror or error})", where=str(path)) from error
    handler.setLevel(logging.DEBUG)
    handler.setFormatter(_FileFormatter())
    handler.addFilter(_RunFilter(key))
    return handler


def _end_torn_line(path: Path) -> None:
    """A log is for people: what a kill left of the last line stays, and the next line begins on its own."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")


def _attach(logger: logging.Logger, handlers: list[logging.Handler], *, console: bool) -> None:
    global _num_attached, _before
    with _attaching:
        if _num_attached == 0:
            _before = (logger.level, logger.propagate)
        _num_attached += 1
        logger.setLevel(logging.DEBUG)
        logger.propagate = logger.propagate and not console
        for handler in handlers:
            logger.addHandler(handler)


def _detach(logger: logging.Logger, handlers: list[logging.Handler]) -> None:
    global _num_attached
    with _attaching:
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()
        _num_attached -= 1
        if _num_attached == 0:
            logger.setLevel(_before[0])
            logger.propagate = _before[1]
