"""How bytes reach the disk: whole or not at all, and never in place of the only good copy.

Knows files and directories; knows nothing of checkpoints, manifests or runs. `.tmp-*` beside a target is work in
progress (safe to delete when nobody writes), `.old-NAME` is NAME while it is being replaced.
Errors of the system are left as OSError: only the caller knows what the bytes were for.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

TEMPORARY_PREFIX = ".tmp-"
REPLACED_PREFIX = ".old-"
FULL_DISK_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write a file so that a reader sees the old bytes or the new ones, after a power cut too.

    Raises:
        OSError: the disk is full, the folder is missing or not writable; the old file is untouched.
    """
    with atomic_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a file to write; when the block ends well, its bytes are on the disk under `path`, else nothing changed.

    Raises:
        OSError: as `atomic_write`. Whatever the block raises is passed on.
    """
    temporary = _temporary_beside(path)
    try:
        # os.open and not tempfile: the result must carry the user's umask, not mode 0600.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with open(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`; when the block ends well, it is on the disk under that name.

    A folder that already has the name is replaced: at every moment one of the two is there, as `path` or as its
    `.old-` name (see `settle_replaced`). When the block raises, the folder is removed and `path` is as it was.

    Raises:
        OSError: as `atomic_write`. Whatever the block raises is passed on.
    """
    settle_replaced(path)
    temporary = _temporary_beside(path)
    temporary.mkdir()
    try:
        yield temporary
        sync_tree(temporary)
        _put_in_place(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(path.parent)
    shutil.rmtree(replaced_name(path), ignore_errors=True)


def _put_in_place(temporary: Path, path: Path) -> None:
    aside = replaced_name(path)
    if not path.exists():
        temporary.rename(path)
        return
    path.rename(aside)
    try:
        temporary.rename(path)
    except BaseException:
        aside.rename(path)
        raise


def settle_replaced(path: Path) -> None:
    """Finish or undo a replacement of `path` that a kill cut short. Only the writer may call this."""
    aside = replaced_name(path)
    if not aside.is_dir():
        return
    if path.exists():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        aside.rename(path)


def replaced_name(path: Path) -> Path:
    """Where the old folder lies while a new one takes the name."""
    return path.with_name(f"{REPLACED_PREFIX}{path.name}")


def remove_directory(path: Path) -> None:
    """Delete a folder so that a kill half-way leaves no folder that looks whole."""
    temporary = _temporary_beside(path)
    path.rename(temporary)
    sync_directory(path.parent)
    shutil.rmtree(temporary)


def remove_leftovers(folder: Path) -> list[str]:
    """Delete what killed writers left in `folder`; the names. Only the one writer of `folder` may call this."""
    leftovers = sorted(entry.name for entry in os.scandir(folder) if entry.name.startswith(TEMPORARY_PREFIX))
    for name in leftovers:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name, ignore_errors=True)
        else:
            (folder / name).unlink(missing_ok=True)
    return leftovers


def sync_tree(folder: Path) -> None:
    """fsync every file below `folder` and every folder, deepest first."""
    for directory, _, names in os.walk(folder, topdown=False):
        for name in names:
            _sync_path(Path(directory, name))
        sync_directory(Path(directory))


def sync_directory(folder: Path) -> None:
    """fsync a folder, so that a rename in it survives a power cut."""
    try:
        _sync_path(folder, os.O_DIRECTORY)
    except OSError as error:
        # Some network and user-space file systems cannot sync a folder, and have nothing to sync.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def _sync_path(path: Path, flags: int = 0) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_line(descriptor: int, line: bytes) -> None:
    """Append one line (without its newline) in a single write where the system allows it."""
    data = memoryview(line + b"\n")
    while data:
        data = data[os.write(descriptor, data) :]


def cut_torn_line(path: Path) -> bytes:
    """Remove an unfinished last line, which a kill in mid-write leaves behind; the bytes that were removed."""
    with open(path, "r+b") as file:
        end = file.seek(0, os.SEEK_END)
        kept = _end_of_last_line(file.fileno(), end)
        if kept == end:
            return b""
        file.seek(kept)
        torn = file.read()
        file.truncate(kept)
        os.fsync(file.fileno())
    return torn


def _end_of_last_line(descriptor: int, end: int, block_bytes: int = 65536) -> int:
    while end > 0:
        start = max(0, end - block_bytes)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write to the file system of `path` (its nearest existing parent)."""
    while not path.exists() and path != path.parent:
        path = path.parent
    with suppress(OSError):
        return shutil.disk_usage(path).free
    return 0


def _temporary_beside(path: Path) -> Path:
    # Random, because process ids repeat (every container's first is 1) and a killed one's folder may still lie here.
    return path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{os.urandom(6).hex()}")
