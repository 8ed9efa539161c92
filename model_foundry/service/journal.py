"""What the service has accepted, on the disk before it is answered: one database, written by one thread.

Works that wait for the disk together share one transaction and one sync. A work that only records what could be
computed again (`durable=False`) is written without waiting for the disk: it survives the death of the process, and
after a power cut it is computed again. It knows tables and transactions; what they mean is `books`.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.exc import DatabaseError

from model_foundry.errors import RunError
from model_foundry.service.databases import FILE_NAME as FILE_NAME
from model_foundry.service.databases import database

T = TypeVar("T")
Work = Callable[[Connection], T]
SCHEMA_VERSION = 5
_MIGRATIONS: dict[int, tuple[str, ...]] = {
    1: ("ALTER TABLE operations ADD COLUMN loss FLOAT", "ALTER TABLE operations ADD COLUMN num_tokens INTEGER"),
    2: (),
    3: ("CREATE INDEX by_finished_kept ON operations (finished) WHERE reply_kind != 'gone'",),
    4: (
        "DELETE FROM operations WHERE reply_kind = 'gone' AND EXISTS"
        " (SELECT 1 FROM models WHERE models.model_id = operations.lane AND models.state != 'live')",
    ),
}
"""Version -> what makes the next one of it."""
_POSTGRES_MIGRATIONS: dict[int, tuple[str, ...]] = {
    2: (
        "ALTER TABLE operations ALTER COLUMN seq TYPE BIGINT",
        "ALTER TABLE models ALTER COLUMN done_seq TYPE BIGINT",
    ),
}
"""What it takes there besides; every integer of SQLite has 64 bits."""
logger = logging.getLogger(__name__)

IS_KEPT = text("reply_kind != 'gone'")
"""Of an operation that was answered: its reply can be asked for. As it stands in the index, which is used for it so."""
metadata = MetaData()
meta = Table("meta", metadata, Column("key", String, primary_key=True), Column("value", String, nullable=False))
keys = Table(
    "keys", metadata,
    Column("key_id", String, primary_key=True), Column("digest", String, nullable=False, unique=True),
    Column("name", String, nullable=False), Column("role", String, nullable=False),
    Column("created", Float, nullable=False), Column("revoked", Float),
)  # fmt: skip
sessions = Table(
    "sessions", metadata,
    Column("session_id", String, primary_key=True), Column("owner", String, nullable=False),
    Column("created", Float, nullable=False), Column("finished", Float), Column("facts", Text, nullable=False),
)  # fmt: skip
models = Table(
    "models", metadata,
    Column("model_id", String, primary_key=True), Column("session_id", String, nullable=False),
    Column("owner", String, nullable=False), Column("created", Float, nullable=False),
    Column("state", String, nullable=False), Column("done_seq", BigInteger, nullable=False),
    Column("last_request", Float, nullable=False), Column("facts", Text, nullable=False),
)  # fmt: skip
samplers = Table(
    "samplers", metadata,
    Column("sampler_id", String, primary_key=True), Column("session_id", String, nullable=False),
    Column("owner", String, nullable=False), Column("created", Float, nullable=False), Column("path", String),
)  # fmt: skip
checkpoints = Table(
    "checkpoints", metadata,
    Column("run_id", String, primary_key=True), Column("kind", String, primary_key=True),
    Column("name", String, primary_key=True), Column("owner", String, nullable=False),
    Column("created", Float, nullable=False), Column("expires", Float), Column("public", Boolean, nullable=False),
    Column("size_bytes", BigInteger, nullable=False), Column("facts", Text, nullable=False),
)  # fmt: skip
operations = Table(
    "operations", metadata,
    Column("request_id", String, primary_key=True), Column("lane", String, nullable=False),
    Column("seq", BigInteger), Column("owner", String, nullable=False), Column("kind", String, nullable=False),
    Column("encoding", String, nullable=False), Column("body", LargeBinary), Column("seed", BigInteger, nullable=False),
    Column("created", Float, nullable=False), Column("finished", Float),
    Column("failed", Boolean, nullable=False), Column("reply_kind", String), Column("reply", LargeBinary),
    Column("loss", Float), Column("num_tokens", Integer),
    Index("by_lane", "lane", "seq"), Index("by_finished", "finished"),
    # What was let go is never looked through again.
    Index("by_finished_kept", "finished", sqlite_where=IS_KEPT, postgresql_where=IS_KEPT),
)  # fmt: skip


class Journal:
    """The database, and the thread that writes it.

    Args:
        url: of a PostgreSQL database; None: a SQLite file in the folder.
        exclusive: no other service may be at work in a PostgreSQL database.

    Raises:
        RunError: it was written by a newer version, cannot be opened, or is another service's at work.
        UsageError: the URL is not one of PostgreSQL.
    """

    def __init__(self, folder: Path, *, url: str | None = None, exclusive: bool = False) -> None:
        self._database = database(folder, url, exclusive=exclusive)
        self.where = self._database.where
        self._engine = self._database.open()
        self._queue: queue.SimpleQueue[tuple[Work[Any], bool, Future[Any]] | None] = queue.SimpleQueue()
        try:
            self._connection = self._engine.connect()
            self._bring_up_to_date()
        except DatabaseError as error:
            raise RunError(f"cannot be opened ({str(error.orig).strip()})", where=self.where) from error
        self._thread = threading.Thread(target=self._write, name="journal", daemon=True)
        self._thread.start()

    def run(self, work: Work[T], *, durable: bool = True) -> Future[T]:
        """Do `work` in a transaction; the future is done when it is committed, and synced where `durable`.

        A work that is cancelled before its turn is not done.
        """
        future: Future[T] = Future()
        self._queue.put((work, durable, future))
        return future

    def read(self, work: Work[T]) -> T:
        """What `work` finds.

        Raises:
            RunError: the database is damaged.
        """
        try:
            return self.run(work, durable=False).result()
        except DatabaseError as error:
            hint = "Put back a copy of the state folder; its checkpoints are whole without the journal."
            raise RunError(f"cannot be read ({str(error.orig).strip()})", where=self.where, hint=hint) from error

    def close(self) -> None:
        """Write what was handed over, and stop."""
        self._queue.put(None)
        self._thread.join()
        self._connection.close()
        self._engine.dispose()

    def _bring_up_to_date(self) -> None:
        """Make the tables, or change those of an older version, in one transaction."""
        with self._connection.begin():
            meta.create(self._connection, checkfirst=True)
            row = self._connection.execute(select(meta.c.value).where(meta.c.key == "schema")).first()
            if row is None:
                metadata.create_all(self._connection)
                self._connection.execute(insert(meta).values(key="schema", value=str(SCHEMA_VERSION)))
                return
            if int(row.value) > SCHEMA_VERSION:
                what = f"the journal has schema {row.value}, and this version reads up to {SCHEMA_VERSION}"
                raise RunError(what, where=self.where, hint="Start it with the version that wrote it.")
            for version in range(int(row.value), SCHEMA_VERSION):
                is_postgres = self._connection.dialect.name == "postgresql"
                more = _POSTGRES_MIGRATIONS.get(version, ()) if is_postgres else ()
                for statement in (*_MIGRATIONS[version], *more):
                    self._connection.execute(text(statement))
            self._connection.execute(update(meta).where(meta.c.key == "schema").values(value=str(SCHEMA_VERSION)))

    def claim(self, key: str, value: str, *, what: str) -> None:
        """Note a fact on first use.

        Raises:
            RunError: another value was noted before; `what` says what that means.
        """

        def write(connection: Connection) -> str:
            row = connection.execute(select(meta.c.value).where(meta.c.key == key)).first()
            if row is None:
                connection.execute(insert(meta).values(key=key, value=value))
            return value if row is None else row.value

        if self.run(write).result() != value:
            hint = "Start it with the base that it had, or choose another state_dir."
            raise RunError(f"this state holds {what}", where=self.where, hint=hint)

    def _write(self) -> None:
        is_open = True
        while is_open:
            batch = [self._queue.get()]
            while not self._queue.empty():
                batch.append(self._queue.get())
            is_open = None not in batch
            # Nobody waits any more for one that was cancelled; from here on none can be.
            works = [item for item in batch if item is not None and item[2].set_running_or_notify_cancel()]
            if works:
                self._commit(works)

    def _commit(self, works: list[tuple[Work[Any], bool, Future[Any]]]) -> None:
        try:
            durable = any(durable for _, durable, _ in works)
            self._database.before(self._connection, durable=durable)
            with self._connection.begin():
                self._database.within(self._connection, durable=durable)
                results = [work(self._connection) for work, _, _ in works]
        except Exception as error:
            if len(works) == 1:
                works[0][2].set_exception(error)
                return
            # One of them failed, and took the others' transaction with it: each for itself.
            for work in works:
                self._commit([work])
            return
        for (_, _, future), result in zip(works, results, strict=True):
            future.set_result(result)
