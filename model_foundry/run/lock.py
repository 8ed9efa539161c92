"""A lock on a file that vanishes with the process holding it, however that process ends.

flock and not a file that says "locked": after SIGKILL nobody is left to delete such a file. Knows nothing of runs.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
import weakref
from pathlib import Path

from model_foundry.errors import RunError

logger = logging.getLogger(__name__)

_UNSUPPORTED_ERRNOS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS})
_TRIES, _PAUSE_SECONDS = 10, 0.02


class FileLock:
    """An exclusive lock, held until `release` or the end of the process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        _held.add(self)

    @classmethod
    def acquire(cls, path: Path, *, what: str) -> FileLock:
        """Take the lock, or say who has it.

        Raises:
            RunError: another process (or another part of this one) holds it.
            OSError: the file cannot be made.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if not _try_exclusive(descriptor, path):
                raise RunError(f"{what} is being written by {_holder(descriptor)}", where=str(path.parent))
            _write_holder(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(descriptor)

    def release(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.release()


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
    for attempt in range(_TRIES):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            # A reader may be looking this very instant.
            if attempt + 1 < _TRIES:
                time.sleep(_PAUSE_SECONDS)
        except OSError as error:
            if error.errno not in _UNSUPPORTED_ERRNOS:
                raise
            logger.warning("%s: this file system has no locks, so a second writer would go unnoticed", path.parent)
            return True
    return False


def _write_holder(descriptor: int) -> None:
    text = json.dumps({"process": os.getpid(), "host": socket.gethostname()})
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
        lock.release()


os.register_at_fork(after_in_child=_forget_in_child)
