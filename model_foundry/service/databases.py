"""Where the journal lies: a SQLite file in the state folder, or PostgreSQL by URL; what differs, and only that.

It knows how a transaction is made durable and how one service keeps others out. It knows no tables.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, OperationalError

from model_foundry.errors import RunError, UsageError

FILE_NAME = "journal.sqlite"
_LOCK_NUMBER = 7_405_924_318
"""Of the advisory lock that a running service holds on its PostgreSQL database."""


class Database(Protocol):
    """Attributes:
    where: for messages; without a password.
    """

    where: str

    def open(self) -> Engine: ...

    def before(self, connection: Connection, *, durable: bool) -> None:
        """Called before a transaction begins."""
        ...

    def within(self, connection: Connection, *, durable: bool) -> None:
        """Called when it has begun."""
        ...


def database(folder: Path, url: str | None, *, exclusive: bool) -> Database:
    """By URL, or in the state folder.

    Args:
        exclusive: refuse a PostgreSQL database in which another service is at work. A folder has its own lock.

    Raises:
        UsageError: the URL is not one of PostgreSQL.
    """
    if url is None:
        return _Sqlite(folder / FILE_NAME)
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise UsageError("journal_url cannot be read as a URL", hint=_URL_HINT) from None
    if parsed.get_backend_name() != "postgresql":
        raise UsageError(f"journal_url names {parsed.get_backend_name()}", hint=_URL_HINT)
    return _Postgres(parsed, exclusive=exclusive)


_URL_HINT = "Write postgresql://USER@HOST:PORT/NAME, with the password in PGPASSWORD or ~/.pgpass; or leave it out."


class _Sqlite:
    def __init__(self, path: Path) -> None:
        self.path, self.where = path, str(path)
        self._is_durable = True

    def open(self) -> Engine:
        engine = create_engine(f"sqlite:///{self.path}", connect_args={"check_same_thread": False})
        event.listen(engine, "connect", self._configure)
        event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
        return engine

    def _configure(self, connection: Any, _: Any) -> None:
        # SQLAlchemy begins transactions itself, so that none is begun behind its back.
        connection.isolation_level = None
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=10000"):
            connection.execute(f"PRAGMA {pragma}")

    def before(self, connection: Connection, *, durable: bool) -> None:
        if durable != self._is_durable:
            # Past SQLAlchemy, which would begin a transaction first, and in one it may not be changed.
            raw: Any = connection.connection.driver_connection
            raw.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
            self._is_durable = durable

    def within(self, connection: Connection, *, durable: bool) -> None:
        pass


class _Postgres:
    def __init__(self, url: Any, *, exclusive: bool) -> None:
        self._url, self._exclusive = url.set(drivername="postgresql+psycopg"), exclusive
        self.where = url.render_as_string(hide_password=True)

    def open(self) -> Engine:
        try:
            engine = create_engine(self._url)
        except (ImportError, NoSuchModuleError) as error:
            hint = "pip install 'model-foundry[postgres]'"
            raise RunError(f"its driver is not installed ({error})", where=self.where, hint=hint) from error
        # On every connection: after a lost one, too.
        event.listen(engine, "connect", self._lock)
        return engine

    def _lock(self, connection: Any, _: Any) -> None:
        if not self._exclusive:
            return
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_try_advisory_lock(%s)", (_LOCK_NUMBER,))
            (is_held,) = cursor.fetchone()
        connection.commit()
        if not is_held:
            what = "another service is at work in this database"
            raise OperationalError(what, None, RuntimeError(what))

    def before(self, connection: Connection, *, durable: bool) -> None:
        pass

    def within(self, connection: Connection, *, durable: bool) -> None:
        connection.execute(text(f"SET LOCAL synchronous_commit TO {'on' if durable else 'off'}"))
