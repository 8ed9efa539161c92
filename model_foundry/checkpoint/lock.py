"""A lock on a file that vanishes with the process holding it, however that process ends.

flock and not a file that says "locked": after SIGKILL nobody is left to delete such a file. Knows nothing of what is
locked; the caller words the refusal.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import platform
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

logger = logging.getLogger(__name__)

_UNSUPPORTED_ERRNOS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS})
_PAUSE_SECONDS = 0.02


class LockHeldError(Exception):
    """Somebody else holds the lock; `holder` says who, for the caller's message."""

    def __init__(self, holder: str) -> None:
        super().__init__(holder)
        self.holder = holder


class FileLock:
    """An exclusive lock, held until `release` or the end of the process. Not inherited by a forked child."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        _held.add(self)

    @classmethod
    def acquire(cls, path: Path, *, wait_seconds: float, sleep: Callable[[float], None] = time.sleep) -> Self:
        """Take the lock, waiting up to `wait_seconds` for whoever has it.

        Raises:
            LockHeldError: another process, or another part of this one, still holds it.
            OSError: the file cannot be made.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            for _ in range(max(1, round(wait_seconds / _PAUSE_SECONDS))):
                if _try_exclusive(descriptor, path):
                    _write_holder(descriptor)
                    return cls(descriptor)
                sleep(_PAUSE_SECONDS)
            raise LockHeldError(_holder(descriptor))
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def on_folder(cls, path: Path) -> Self:
        """Take the lock of a folder that nobody else writes yet, to show `is_held` that somebody does.

        Raises:
            OSError: it is not there.
        """
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        _try_exclusive(descriptor, path)
        return cls(descriptor)

    def release(self) -> None:
        if self._descriptor >= 0:
            # Closing alone would leave the lock with a child that was forked while it was held.
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            self._close()

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __del__(self) -> None:
        self._close()


def is_held(path: Path) -> bool:
    """Whether some process holds the lock. Looks for an instant with a shared lock; `acquire` waits that out."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in _UNSUPPORTED_ERRNOS:
            raise
    finally:
        os.close(descriptor)
    return False


def _try_exclusive(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED_ERRNOS:
            raise
        logger.warning("%s: this file system has no locks, so a second writer would go unnoticed", path.parent)
    return True


def _write_holder(descriptor: int) -> None:
    text = json.dumps({"process": os.getpid(), "host": platform.node()})
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)


def _holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {holder['process']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


_held: weakref.WeakSet[FileLock] = weakref.WeakSet()


def _forget_in_child() -> None:
    # A forked child shares the lock and would keep it alive after its parent was killed.
    for lock in list(_held):
        lock._close()


os.register_at_fork(after_in_child=_forget_in_child)
