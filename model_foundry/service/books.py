"""Who has what: sessions, models, samplers, checkpoints and operations, in memory and in the journal.

Memory answers, the journal remembers: a change is in memory when its transaction is committed. Reading whole tables
happens once, at the start. It knows nothing of HTTP or of the engine.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sqlalchemy import Connection, delete, exists, insert, select, update

from model_foundry.service import journal as tables
from model_foundry.service.journal import Journal, Work

SEGMENTS = {"training": "weights", "sampler": "sampler_weights", "external": "external_weights"}
"""Kind of checkpoint -> its part of a `tinker://` path."""


@dataclass(frozen=True, slots=True)
class Session:
    session_id: str
    owner: str
    created: float
    facts: Mapping[str, Any]
    finished: float | None = None


@dataclass(frozen=True, slots=True)
class Model:
    """`facts`: rank, seed, train_unembed, train_mlp, train_attn, user_metadata; `state`: live, failed, unloaded."""

    model_id: str
    session_id: str
    owner: str
    created: float
    last_request: float
    facts: Mapping[str, Any]
    state: str = "live"
    done_seq: int = -1


@dataclass(frozen=True, slots=True)
class Sampler:
    """`path` None samples from the base."""

    sampler_id: str
    session_id: str
    owner: str
    created: float
    path: str | None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    run_id: str
    kind: str
    name: str
    owner: str
    created: float
    size_bytes: int
    facts: Mapping[str, Any]
    expires: float | None = None
    public: bool = False

    @property
    def path(self) -> str:
        return f"tinker://{self.run_id}/{SEGMENTS[self.kind]}/{self.name}"

    @property
    def key(self) -> tuple[str, str, str]:
        return (self.run_id, self.kind, self.name)


@dataclass(slots=True, eq=False)
class Operation:
    """Something asked for that is answered later.

    Attributes:
        lane: the model or sampler whose operations it stands in line with.
        encoding: of `body`: json or proto.
        seed: drawn when it was accepted, for whatever the client left to chance.
        reply: JSON or protobuf by `reply_kind`; an error in JSON where it `failed`.
        loss, num_tokens: of a pass that leaves gradients.
        done: set when the reply is in the journal.
        is_cancelled: its client does not want it any more; where it has not begun, it is not done.
    """

    request_id: str
    lane: str
    owner: str
    kind: str
    encoding: str
    body: bytes
    seed: int
    seq: int | None = None
    created: float = field(default_factory=time.time)
    failed: bool = False
    reply_kind: str | None = None
    reply: bytes = b""
    loss: float | None = None
    num_tokens: int | None = None
    done: asyncio.Event = field(default_factory=asyncio.Event)
    is_cancelled: bool = False


_NOT_NEEDED = b""
"""In place of the body of an operation that was done and is no part of its model's state. None: it was, and a snapshot
has it."""


IS_OVER = exists().where(tables.models.c.model_id == tables.operations.c.lane, tables.models.c.state != "live")
"""Of an operation: its model is not there any more."""


def _changes_state(operation: Operation) -> bool:
    if operation.failed:
        return False
    if operation.kind == "forward_backward":
        return operation.loss is not None
    return operation.kind in ("optim_step", "load_weights")


class TakenError(Exception):
    """A model's id is another's already."""


Effect = Callable[[], None]


class Books:
    """Everything but results, which are read from the journal.

    Attributes:
        checkpoints: never changed, always replaced, so any thread may look through it.
    """

    def __init__(self, journal: Journal, *, clock: Callable[[], float] = time.time) -> None:
        self.journal = journal
        self.clock = clock
        self.sessions: dict[str, Session] = {}
        self.models: dict[str, Model] = {}
        self.samplers: dict[str, Sampler] = {}
        self.checkpoints: dict[tuple[str, str, str], Checkpoint] = {}
        self._changing = threading.Lock()
        journal.read(self._read)

    def _read(self, connection: Connection) -> None:
        for row in connection.execute(select(tables.sessions)):
            values = dict(row._mapping) | {"facts": json.loads(row.facts)}
            self.sessions[row.session_id] = Session(**values)
        for row in connection.execute(select(tables.models)):
            self.models[row.model_id] = Model(**(dict(row._mapping) | {"facts": json.loads(row.facts)}))
        for row in connection.execute(select(tables.samplers)):
            self.samplers[row.sampler_id] = Sampler(**row._mapping)
        for row in connection.execute(select(tables.checkpoints)):
            found = Checkpoint(**(dict(row._mapping) | {"facts": json.loads(row.facts)}))
            self.checkpoints[found.key] = found

    def unfinished(self) -> list[Operation]:
        """What was accepted and not answered, in order."""

        def read(connection: Connection) -> list[Operation]:
            table = tables.operations
            rows = connection.execute(select(table).where(table.c.finished.is_(None)).order_by(table.c.created))
            return [_operation(row) for row in rows]

        return self.journal.read(read)

    def done_after(self, model_id: str, seq: int) -> list[Operation]:
        """A model's operations after `seq` that its state is made of, in order; without a body where it is not kept."""

        def read(connection: Connection) -> list[Operation]:
            table = tables.operations
            wanted = (table.c.lane == model_id, table.c.seq > seq, table.c.finished.is_not(None), ~table.c.failed,
                      table.c.body.is_(None) | (table.c.body != _NOT_NEEDED))  # fmt: skip
            return [_operation(row) for row in connection.execute(select(table).where(*wanted).order_by(table.c.seq))]

        return self.journal.read(read)

    def read_operation(self, request_id: str) -> Work[Operation | None]:
        def read(connection: Connection) -> Operation | None:
            table = tables.operations
            row = connection.execute(select(table).where(table.c.request_id == request_id)).first()
            return None if row is None else _operation(row)

        return read

    def accept(self, operation: Operation, model: Model | None) -> Work[bool]:
        """Write an operation, and the model that it creates; False where it is a repeat, which changes nothing.

        The work raises TakenError where there is such a model, made by something else.
        """

        def write(connection: Connection) -> bool:
            table = tables.operations
            known = select(table.c.request_id).where(table.c.request_id == operation.request_id)
            if connection.execute(known).first() is not None:
                return False
            if model is not None and model_facts(connection, model.model_id) is not None:
                raise TakenError(model.model_id)
            connection.execute(
                insert(table).values(
                    request_id=operation.request_id,
                    lane=operation.lane,
                    seq=operation.seq,
                    owner=operation.owner,
                    kind=operation.kind,
                    encoding=operation.encoding,
                    body=operation.body,
                    seed=operation.seed,
                    created=operation.created,
                    failed=False,
                )
            )
            if model is not None:
                connection.execute(insert(tables.models).values(**_row(model)))
            return True

        return write

    def answer(self, operation: Operation, *changes: Work[Any]) -> Work[None]:
        """Write an operation's reply, together with what it changed; its body goes unless it may be done again."""
        body = {} if _changes_state(operation) else {"body": _NOT_NEEDED}

        def write(connection: Connection) -> None:
            for change in changes:
                change(connection)
            table = tables.operations
            connection.execute(
                update(table)
                .where(table.c.request_id == operation.request_id)
                .values(
                    finished=self.clock(),
                    failed=operation.failed,
                    reply_kind=operation.reply_kind,
                    reply=operation.reply,
                    loss=operation.loss,
                    num_tokens=operation.num_tokens,
                    **body,
                )
            )

        return write

    def training_so_far(self) -> list[tuple[str, str, float | None, int | None]]:
        """(model, kind, loss, tokens) of every pass and step of a live model that was done, a model's in order."""

        def read(connection: Connection) -> list[tuple[str, str, float | None, int | None]]:
            table = tables.operations
            wanted = (table.c.kind.in_(("forward_backward", "optim_step")), table.c.finished.is_not(None))
            columns = (table.c.lane, table.c.kind, table.c.loss, table.c.num_tokens)
            rows = connection.execute(
                select(*columns).where(*wanted, ~table.c.failed, ~IS_OVER).order_by(table.c.lane, table.c.seq)
            )
            return [(row.lane, row.kind, row.loss, row.num_tokens) for row in rows]

        return self.journal.read(read)

    def drop_bodies(self, model_id: str, seq: int) -> Work[None]:
        """Forget the bodies of operations that were done, up to `seq`: no snapshot that is kept needs them."""
        return lambda connection: _drop_bodies(connection, model_id, tables.operations.c.seq <= seq)

    def drop_operations(self, model_id: str) -> Work[None]:
        """Forget what was done on a model that is unloaded, but for results that can still be asked for: those go
        when they are old. That it was done, its `done_seq` says.
        """

        def write(connection: Connection) -> None:
            table = tables.operations
            connection.execute(delete(table).where(table.c.lane == model_id, table.c.reply_kind == "gone"))
            _drop_bodies(connection, model_id)

        return write

    def put(self, item: Session | Model | Sampler | Checkpoint) -> tuple[Work[None], Effect]:
        """Write a new or changed item, and what to do in memory when that is committed."""
        table, key = _place_of(item)

        def write(connection: Connection) -> None:
            connection.execute(_where_key(delete(table), table, key))
            connection.execute(insert(table).values(**_row(item)))

        def apply() -> None:
            match item:
                case Session():
                    self.sessions[item.session_id] = item
                case Model():
                    self.models[item.model_id] = item
                case Sampler():
                    self.samplers[item.sampler_id] = item
                case Checkpoint():
                    with self._changing:
                        self.checkpoints = {**self.checkpoints, item.key: item}

        return write, apply

    def change(self, found: Checkpoint, **values: Any) -> tuple[Work[bool], Effect]:
        """Change some of a checkpoint's columns. The work finds False, and changes nothing, where that checkpoint is
        deleted by then, or another has its name.
        """
        table = tables.checkpoints

        def write(connection: Connection) -> bool:
            return connection.execute(_where_it_is(update(table), found).values(**values)).rowcount > 0

        def apply() -> None:
            with self._changing:
                now = self.checkpoints.get(found.key)
                if now is not None and now.created == found.created:
                    self.checkpoints = {**self.checkpoints, found.key: replace(now, **values)}

        return write, apply

    def remove(self, found: Checkpoint) -> tuple[Work[bool], Effect]:
        """Forget a checkpoint; as `change` where another has its name by then."""

        def write(connection: Connection) -> bool:
            return connection.execute(_where_it_is(delete(tables.checkpoints), found)).rowcount > 0

        def apply() -> None:
            with self._changing:
                now = self.checkpoints.get(found.key)
                if now is not None and now.created == found.created:
                    self.checkpoints = {key: each for key, each in self.checkpoints.items() if key != found.key}

        return write, apply

    def checkpoint_at(self, path: str, owner: str | None) -> Checkpoint | None:
        """By `tinker://RUN/KIND/NAME`, where `owner` (None: anybody's) may see it."""
        parts = path.removeprefix("tinker://").split("/")
        kinds = {segment: kind for kind, segment in SEGMENTS.items()}
        if not path.startswith("tinker://") or len(parts) != 3 or parts[1] not in kinds:
            return None
        found = self.checkpoints.get((parts[0], kinds[parts[1]], parts[2]))
        if found is None or (found.expires is not None and found.expires <= self.clock()):
            return None
        return found if owner is None or found.public or found.owner == owner else None


def finished(session: Session, when: float, reason: Mapping[str, Any], detail: str | None = None) -> Session:
    """The session as it is from now on; the first reason stays."""
    if session.finished is not None:
        return session
    return replace(session, finished=when, facts={**session.facts, "finish_reason": reason, "finish_detail": detail})


def _drop_bodies(connection: Connection, model_id: str, *which: Any) -> None:
    table = tables.operations
    done = (table.c.lane == model_id, table.c.finished.is_not(None), table.c.body != _NOT_NEEDED)
    connection.execute(update(table).where(*done, *which).values(body=None))


def model_facts(connection: Connection, model_id: str) -> dict[str, Any] | None:
    """As they are in the journal; None of a model that is not there."""
    row = connection.execute(select(tables.models.c.facts).where(tables.models.c.model_id == model_id)).first()
    return None if row is None else json.loads(row.facts)


def _place_of(item: Any) -> tuple[Any, tuple[str, ...]]:
    """An item's table, and its primary key there."""
    match item:
        case Session():
            return tables.sessions, (item.session_id,)
        case Model():
            return tables.models, (item.model_id,)
        case Sampler():
            return tables.samplers, (item.sampler_id,)
        case _:
            return tables.checkpoints, item.key


def _where_it_is(statement: Any, found: Checkpoint) -> Any:
    """That checkpoint, and not another that took its name meanwhile."""
    table = tables.checkpoints
    return _where_key(statement, table, found.key).where(table.c.created == found.created)


def _where_key(statement: Any, table: Any, key: tuple[str, ...]) -> Any:
    columns = list(table.primary_key.columns)
    return statement.where(*(column == value for column, value in zip(columns, key, strict=True)))


def _row(item: Any) -> dict[str, Any]:
    values = {name: getattr(item, name) for name in item.__dataclass_fields__}
    return values | {"facts": json.dumps(values["facts"])} if "facts" in values else values


def _operation(row: Any) -> Operation:
    operation = Operation(
        request_id=row.request_id, lane=row.lane, owner=row.owner, kind=row.kind, encoding=row.encoding,
        body=row.body or b"", seed=row.seed, seq=row.seq, created=row.created, failed=row.failed,
        reply_kind=row.reply_kind, reply=row.reply or b"",
    )  # fmt: skip
    if row.finished is not None:
        operation.done.set()
    return operation
