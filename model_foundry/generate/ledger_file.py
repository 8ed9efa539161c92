"""The file of a ledger: made whole, locked, checked when it is opened, and its errors in words.

SQLite in WAL mode with full syncs: a commit that has returned survives a power cut. A file that is empty, damaged or
half gone is named and left alone; it is never made anew in place. Knows nothing of what the rows mean.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from model_foundry.checkpoint.atomic import sync_directory
from model_foundry.checkpoint.lock import FileLock, LockHeldError
from model_foundry.errors import DataError, FoundryError

FORMAT = 1

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE batches (
    number INTEGER PRIMARY KEY,      -- ours, in the order of creation
    state TEXT NOT NULL,             -- creating, submitted, ended, refused, absent
    id TEXT UNIQUE,                  -- the API's, once it is known
    num_requests INTEGER NOT NULL,
    intended_at REAL NOT NULL,       -- seconds since 1970, by our clock
    seen TEXT NOT NULL,              -- ids of the newest batches right before it was created
    adopted INTEGER NOT NULL DEFAULT 0,        -- 1: found by looking; 2: its custom_ids proved that it is ours
    not_ours TEXT NOT NULL DEFAULT '[]',       -- ids that looked like it and were not
    expires_at TEXT,
    note TEXT NOT NULL DEFAULT ''
);
CREATE TABLE requests (
    position INTEGER PRIMARY KEY,    -- order of the corpus
    key TEXT NOT NULL UNIQUE,        -- content hash
    unit TEXT NOT NULL,              -- the piece of code, JSON: the answer is still here when the corpus is not
    state TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    tries_left INTEGER NOT NULL,
    custom_id TEXT UNIQUE,           -- of the latest attempt
    batch INTEGER REFERENCES batches (number),
    reserved INTEGER NOT NULL DEFAULT 0,       -- worst case of what has no answer yet
    lost INTEGER NOT NULL DEFAULT 0,           -- worst case of attempts given up without an answer
    cost INTEGER NOT NULL DEFAULT 0,
    input_tokens INTEGER, output_tokens INTEGER, cache_write_tokens INTEGER, cache_read_tokens INTEGER,
    model TEXT, stop_reason TEXT, reply TEXT,
    reason TEXT NOT NULL DEFAULT ''
);
CREATE INDEX requests_by_state ON requests (state, position);
CREATE INDEX requests_by_batch ON requests (batch);
"""


def open_ledger(path: Path, *, settings: Mapping[str, Any], read_only: bool) -> sqlite3.Connection:
    """A checked connection; the ledger is made where there is none.

    Raises:
        DataError: it is damaged, of another configuration, or (read-only) absent.
        FoundryError: the disk is full.
    """
    if not path.exists():
        if read_only:
            raise DataError("there is no ledger yet", where=str(path), hint="foundry generate CONFIG makes it")
        _create(path, settings)
    with in_words(path):
        connection = _connect(path, read_only=read_only)
        try:
            _check(path, connection, settings)
        except BaseException:
            connection.close()
            raise
    return connection


def lock_ledger(path: Path) -> FileLock:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock.acquire(path.with_name(f"{path.name}.lock"), wait_seconds=0.0)
    except LockHeldError as error:
        raise DataError(
            f"the ledger is in use by {error.holder}",
            where=str(path),
            hint="Wait for it, or look on with: foundry generate CONFIG --status",
        ) from error


def _create(path: Path, settings: Mapping[str, Any]) -> None:
    """A whole ledger under its name or none: a file that is there and empty is damage, never a beginning."""
    if path.with_name(f"{path.name}-wal").exists():
        with in_words(path):
            raise sqlite3.DatabaseError(f"it is gone, and {path.name}-wal still holds a part of it")
    temporary = path.with_name(f".tmp-{path.name}-{os.urandom(6).hex()}")
    try:
        with in_words(path), closing(sqlite3.connect(temporary, isolation_level=None)) as connection:
            connection.execute("PRAGMA synchronous = FULL")
            connection.executescript(_SCHEMA)
            values = {"format": str(FORMAT), "id": os.urandom(4).hex(), "settings": json.dumps(dict(settings))}
            connection.executemany("INSERT INTO meta VALUES (?, ?)", values.items())
            connection.execute("PRAGMA journal_mode = WAL")
        temporary.replace(path)
        sync_directory(path.parent)
    finally:
        for name in (temporary, *(temporary.with_name(temporary.name + end) for end in ("-wal", "-shm", "-journal"))):
            name.unlink(missing_ok=True)


def _connect(path: Path, *, read_only: bool) -> sqlite3.Connection:
    if path.stat().st_size == 0:
        raise sqlite3.DatabaseError("the file is empty")
    mode = "ro" if read_only else "rw"
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}", uri=True, isolation_level=None, timeout=10.0
    )
    connection.execute("PRAGMA synchronous = FULL")  # a commit has reached the disk, even through a power cut
    return connection


def _check(path: Path, connection: sqlite3.Connection, settings: Mapping[str, Any]) -> None:
    verdict = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
    if verdict != "ok":
        raise sqlite3.DatabaseError(verdict)
    stored = dict(connection.execute("SELECT key, value FROM meta").fetchall())
    if stored.get("format") != str(FORMAT):
        raise DataError(f"it is a ledger of format {stored.get('format')}, not {FORMAT}", where=str(path))
    before = json.loads(stored["settings"])
    differing = [
        f"{name}: {before.get(name)!r} there, {settings.get(name)!r} here"
        for name in dict.fromkeys([*before, *settings])
        if before.get(name) != settings.get(name)
    ]
    if differing:
        raise DataError(
            "the ledger belongs to another configuration: " + "; ".join(differing),
            where=str(path),
            hint="Give the new configuration its own output.file (and output.ledger), or undo the change",
        )


@contextmanager
def in_words(path: Path) -> Iterator[None]:
    """SQLite's errors as ours."""
    try:
        yield
    except (sqlite3.IntegrityError, sqlite3.ProgrammingError):
        raise  # a mistake of ours, not of the file
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", "") or ""
        if name.startswith(("SQLITE_FULL", "SQLITE_IOERR")):
            raise FoundryError(
                f"the ledger could not be written: {error}",
                where=str(path),
                hint="Free some space and run the command again: it goes on, and nothing is paid for twice",
            ) from error
        if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            raise DataError("the ledger is in use by another process", where=str(path)) from error
        if name.startswith(("SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_PERM")):
            raise DataError(f"the ledger cannot be opened: {error}", where=str(path)) from error
        raise DataError(
            f"the ledger is damaged: {error}",
            where=str(path),
            hint="Nothing was changed. Restore it from a copy; without it, what was paid for cannot be told from what "
            "was not. To start anew and pay again, move it away and choose another output.file",
        ) from error
