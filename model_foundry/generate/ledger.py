"""The ledger: one row a request, written before anything is sent and never forgotten after.

It is the only way to a paid call: `intend_*` reserves the worst case of what is about to be sent, refuses when that
could pass the ceiling, and is on the disk before it returns. What was intended and has no answer stays reserved until
somebody finds out what became of it. Knows nothing of HTTP, prompts or prices; money is whole nano-dollars.

    planned ──► submitted ──► succeeded ──► rejected            (no row of the data set came of it)
                    │  ├────► errored · expired · canceled ──► submitted again, as often as allowed; none is billed
                    │  └────► uncertain                         (one by one: the answer was lost; never sent again
                    └─ its batch: creating ─► submitted ─► ended          unless asked)
                                     ├─► refused, absent        (the requests are planned again)
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from model_foundry.checkpoint.lock import FileLock
from model_foundry.generate.ledger_file import in_words, lock_ledger, open_ledger

STATES = ("planned", "submitted", "succeeded", "rejected", "errored", "expired", "canceled", "uncertain")
_SENDABLE = "(state = 'planned' OR (state IN ('errored', 'expired') AND tries_left > 0))"


class CeilingReachedError(Exception):
    """What was about to be sent could pass the ceiling; nothing was changed. `needed` would have sufficed."""

    def __init__(self, *, needed: int) -> None:
        super().__init__(needed)
        self.needed = needed


@dataclass(frozen=True, slots=True)
class Money:
    """Nano-dollars: billed, reserved for what has no answer yet, and the worst case of what was given up."""

    spent: int
    reserved: int
    lost: int

    @property
    def committed(self) -> int:
        """What the ceiling is compared with."""
        return self.spent + self.reserved + self.lost


@dataclass(frozen=True, slots=True)
class Planned:
    """A request that may be sent."""

    key: str
    unit: str
    attempts: int


@dataclass(frozen=True, slots=True)
class Intent:
    """A request about to be sent: `worst_case` nano-dollars are reserved for it."""

    key: str
    custom_id: str
    worst_case: int


@dataclass(frozen=True, slots=True)
class Reply:
    """A billed answer. `cost` None: the API's usage could not be read, so the reserved worst case counts."""

    text: str
    cost: int | None
    input_tokens: int = 0
    output_tokens: int = 0
    cache_write_tokens: int = 0
    cache_read_tokens: int = 0
    model: str = ""
    stop_reason: str = ""


@dataclass(frozen=True, slots=True)
class Failure:
    """An answer that is not billed. state: errored, expired or canceled; `final` ones are never sent again."""

    state: str
    reason: str = ""
    final: bool = False


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch in the ledger, as its columns."""

    number: int
    state: str
    id: str | None
    num_requests: int
    intended_at: float
    seen: tuple[str, ...]
    adopted: int
    not_ours: tuple[str, ...]
    expires_at: str | None


@dataclass(frozen=True, slots=True)
class Answered:
    """A request that has a reply, for making rows of it."""

    key: str
    unit: str
    custom_id: str
    batch_id: str | None
    model: str
    stop_reason: str
    reply: str


class Ledger:
    """An open ledger. One process at a time may write; `read_only` looks on while another works."""

    def __init__(self, path: Path, connection: sqlite3.Connection, lock: FileLock | None) -> None:
        self.path = path
        self._connection = connection
        self._lock = lock
        self.id = self.meta("id")

    @classmethod
    def open(cls, path: Path, *, settings: Mapping[str, Any], read_only: bool = False) -> Self:
        """Open a ledger, made new where there is none.

        Args:
            settings: what its requests have in common; a ledger of other settings is refused.

        Raises:
            DataError: it is damaged, of another configuration, in use by another process, or (read-only) absent.
            FoundryError: the disk is full.
        """
        path = Path(path)
        lock = None if read_only else lock_ledger(path)
        try:
            return cls(path, open_ledger(path, settings=settings, read_only=read_only), lock)
        except BaseException:
            if lock is not None:
                lock.release()
            raise

    def close(self) -> None:
        with suppress(sqlite3.Error):
            self._connection.close()
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # what there is

    def meta(self, key: str) -> str:
        row = self._one("SELECT value FROM meta WHERE key = ?", key)
        return "" if row is None else str(row[0])

    def counts(self) -> dict[str, int]:
        """State -> requests, every state named."""
        found = dict(self._all("SELECT state, COUNT(*) FROM requests GROUP BY state"))
        return {state: found.get(state, 0) for state in STATES}

    def money(self) -> Money:
        row = self._one("SELECT TOTAL(0), SUM(cost), SUM(reserved), SUM(lost) FROM requests")
        _, spent, reserved, lost = row or (0, 0, 0, 0)
        return Money(spent or 0, reserved or 0, lost or 0)

    def usage(self) -> dict[str, int]:
        names = ("input_tokens", "output_tokens", "cache_write_tokens", "cache_read_tokens")
        row = self._one(f"SELECT {', '.join(f'SUM({name})' for name in names)} FROM requests")
        return {name: value or 0 for name, value in zip(names, row or (), strict=True)}

    def reasons(self) -> Counter[str]:
        """Why requests failed or were rejected -> how many."""
        rows = self._all("SELECT state || ': ' || reason, COUNT(*) FROM requests WHERE reason != '' GROUP BY 1")
        return Counter(dict(rows))

    def keys(self) -> set[str]:
        return {row[0] for row in self._all("SELECT key FROM requests")}

    def num_sendable(self) -> int:
        return self._one(f"SELECT COUNT(*) FROM requests WHERE {_SENDABLE}")[0]  # type: ignore[index]

    def sendable(self) -> Iterator[Planned]:
        """Requests that may be sent now, in the order of the corpus."""
        after = -1
        while rows := self._all(
            f"SELECT position, key, unit, attempts FROM requests WHERE {_SENDABLE} AND position > ? "
            "ORDER BY position LIMIT 1000",
            after,
        ):
            for after, key, unit, attempts in rows:  # noqa: B007
                yield Planned(key, unit, attempts)

    def unsettled(self) -> Batch | None:
        """The batch whose creation has no known outcome. There is never more than one."""
        return next(iter(self._batches("state = 'creating'")), None)

    def open_batches(self) -> list[Batch]:
        """Batches known to the API whose results are not all here."""
        return self._batches("state = 'submitted'")

    def batches(self) -> list[Batch]:
        return self._batches("1")

    def custom_ids(self, number: int) -> set[str]:
        """The requests of a batch that have no answer yet."""
        rows = self._all("SELECT custom_id FROM requests WHERE batch = ? AND state = 'submitted'", number)
        return {row[0] for row in rows}

    def answered(self) -> Iterator[Answered]:
        """Every request that has a reply, in the order of the corpus."""
        after = -1
        while rows := self._all(
            "SELECT position, key, unit, custom_id, b.id, model, stop_reason, reply FROM requests "
            "LEFT JOIN batches b ON b.number = requests.batch WHERE reply IS NOT NULL AND position > ? "
            "ORDER BY position LIMIT 1000",
            after,
        ):
            for row in rows:
                after = row[0]
                yield Answered(*row[1:])

    # what changes it

    def add_requests(self, requests: Iterable[tuple[str, str]], *, tries: int) -> int:
        """Plan requests (key, unit JSON) that are not here yet; how many were new."""
        with self._transaction():
            before = self._connection.total_changes
            self._connection.executemany(
                "INSERT OR IGNORE INTO requests (key, unit, state, tries_left) VALUES (?, ?, 'planned', ?)",
                ((key, unit, tries) for key, unit in requests),
            )
            return self._connection.total_changes - before

    def begin_run(self, *, tries: int, resend_uncertain: bool) -> int:
        """What a new run may do again; how many requests whose answer was lost while one process sent them.

        Canceled requests are planned again, unanswered ones (one by one) become uncertain. With `resend_uncertain`
        those are planned again too; the worst case of the lost attempt counts against the ceiling for good.
        """
        with self._transaction():
            self._run("UPDATE requests SET state = 'planned' WHERE state = 'canceled'")
            self._run("UPDATE requests SET tries_left = ? WHERE state IN ('planned', 'errored', 'expired')"
                      " AND tries_left >= 0", tries)  # fmt: skip
            orphans = self._run(
                "UPDATE requests SET state = 'uncertain', reason = 'the run ended before its answer came'"
                " WHERE state = 'submitted' AND batch IS NULL"
            )
            if resend_uncertain:
                self._run(
                    "UPDATE requests SET state = 'planned', lost = lost + reserved, reserved = 0, batch = NULL,"
                    " custom_id = NULL, reason = '', tries_left = ? WHERE state = 'uncertain'",
                    tries,
                )
            return orphans

    def intend_batch(self, intents: Sequence[Intent], *, ceiling: int, seen: Sequence[str], now: float) -> int:
        """Write down that a batch is about to be created; its number. Afterwards it may be sent.

        Raises:
            CeilingReachedError: its worst case would pass the ceiling.
        """
        with self._transaction():
            if self.unsettled() is not None:
                raise AssertionError("a batch was about to be created while another one is unsettled")
            self._reserve(sum(intent.worst_case for intent in intents), ceiling)
            number = self._connection.execute(
                "INSERT INTO batches (state, num_requests, intended_at, seen) VALUES ('creating', ?, ?, ?)",
                (len(intents), now, json.dumps(list(seen))),
            ).lastrowid
            assert number is not None
            for intent in intents:
                self._submit(intent, number)
            return number

    def intend_message(self, intent: Intent, *, ceiling: int) -> None:
        """Write down that one request is about to be sent by itself.

        Raises:
            CeilingReachedError: its worst case would pass the ceiling.
        """
        with self._transaction():
            self._reserve(intent.worst_case, ceiling)
            self._submit(intent, None)

    def batch_created(self, number: int, id: str, *, expires_at: str | None, adopted: bool = False) -> None:
        """The API knows the batch by this id."""
        with self._transaction():
            self._run(
                "UPDATE batches SET state = 'submitted', id = ?, expires_at = ?, adopted = ? WHERE number = ?",
                id, expires_at, int(adopted), number,
            )  # fmt: skip

    def batch_not_created(self, number: int, *, state: str, note: str) -> None:
        """It was refused, or is proved absent: its requests are planned again."""
        with self._transaction():
            self._run("UPDATE batches SET state = ?, note = ? WHERE number = ?", state, note, number)
            self._run(
                "UPDATE requests SET state = 'planned', tries_left = tries_left + 1, batch = NULL, custom_id = NULL,"
                " reserved = 0 WHERE batch = ? AND state = 'submitted'",
                number,
            )

    def batch_not_ours(self, number: int, id: str) -> None:
        """What was adopted holds none of our custom_ids: look for the right one again."""
        with self._transaction():
            batch = self._batches(f"number = {int(number)}")[0]
            self._run(
                "UPDATE batches SET state = 'creating', id = NULL, adopted = 0, not_ours = ? WHERE number = ?",
                json.dumps([*batch.not_ours, id]), number,
            )  # fmt: skip

    def batch_proved(self, number: int) -> None:
        """One of its results carried a custom_id of ours."""
        with self._transaction():
            self._run("UPDATE batches SET adopted = 2 WHERE number = ? AND adopted = 1", number)

    def batch_ended(self, number: int, *, missing: str = "") -> int:
        """Every result that there is has been taken; how many requests have none.

        Those become uncertain for the reason `missing`: they may have been billed, so nothing sends them again unasked.
        """
        with self._transaction():
            self._run("UPDATE batches SET state = 'ended' WHERE number = ?", number)
            return self._run(
                "UPDATE requests SET state = 'uncertain', reason = ? WHERE batch = ? AND state = 'submitted'",
                missing, number,
            )  # fmt: skip

    def plan_canceled(self, number: int) -> None:
        """What an earlier run canceled of a batch may be sent again by this one."""
        with self._transaction():
            self._run("UPDATE requests SET state = 'planned' WHERE batch = ? AND state = 'canceled'", number)

    def record(self, outcomes: Iterable[tuple[str, Reply | Failure]], *, batch: int | None = None) -> Counter[str]:
        """Write down answers by custom_id, all or none.

        Returns:
            How many were `recorded`, `repeated` (the request had its answer) or `unknown` (no request of that batch).
        """
        told: Counter[str] = Counter()
        with self._transaction():
            for custom_id, outcome in outcomes:
                told[self._record(custom_id, outcome, batch)] += 1
        return told

    def message_not_sent(self, custom_id: str) -> None:
        """The API did not do it: the request is planned again and nothing is reserved for it."""
        with self._transaction():
            self._run(
                "UPDATE requests SET state = 'planned', tries_left = tries_left + 1, custom_id = NULL, reserved = 0"
                " WHERE custom_id = ?",
                custom_id,
            )

    def message_uncertain(self, custom_id: str, reason: str) -> None:
        """Its answer was lost: the worst case stays reserved."""
        with self._transaction():
            self._run("UPDATE requests SET state = 'uncertain', reason = ? WHERE custom_id = ?", reason, custom_id)

    def judge(self, verdicts: Iterable[tuple[str, str | None]]) -> None:
        """For requests (by key) that have a reply: None when rows came of it, or why none did."""
        with self._transaction():
            self._connection.executemany(
                "UPDATE requests SET state = ?, reason = ? WHERE key = ? AND reply IS NOT NULL",
                (("succeeded" if why is None else "rejected", why or "", key) for key, why in verdicts),
            )

    # how

    def _reserve(self, amount: int, ceiling: int) -> None:
        needed = self.money().committed + amount
        if needed > ceiling:
            raise CeilingReachedError(needed=needed)

    def _submit(self, intent: Intent, batch: int | None) -> None:
        changed = self._run(
            "UPDATE requests SET state = 'submitted', attempts = attempts + 1, tries_left = tries_left - 1,"
            f" custom_id = ?, batch = ?, reserved = ?, reason = '' WHERE key = ? AND {_SENDABLE}",
            intent.custom_id, batch, intent.worst_case, intent.key,
        )  # fmt: skip
        if changed != 1:
            raise AssertionError(f"request {intent.key} was about to be sent and is not one that may be")

    def _record(self, custom_id: str, outcome: Reply | Failure, batch: int | None) -> str:
        row = self._one("SELECT state, batch, reserved FROM requests WHERE custom_id = ?", custom_id)
        if row is None or row[1] != batch:
            return "unknown"
        # A success after a failure under the same custom_id is taken: it is what was billed.
        if row[0] != "submitted" and not (isinstance(outcome, Reply) and row[0] in ("errored", "expired", "canceled")):
            return "repeated"
        if isinstance(outcome, Failure):
            self._run(
                "UPDATE requests SET state = ?, reserved = 0, reason = ?,"
                " tries_left = CASE WHEN ? THEN -1 ELSE tries_left END WHERE custom_id = ?",
                outcome.state, outcome.reason, outcome.final, custom_id,
            )  # fmt: skip
        else:
            self._run(
                "UPDATE requests SET state = 'succeeded', reserved = 0, cost = cost + ?, input_tokens = ?,"
                " output_tokens = ?, cache_write_tokens = ?, cache_read_tokens = ?, model = ?, stop_reason = ?,"
                " reply = ?, reason = '' WHERE custom_id = ?",
                row[2] if outcome.cost is None else outcome.cost, outcome.input_tokens, outcome.output_tokens,
                outcome.cache_write_tokens, outcome.cache_read_tokens, outcome.model, outcome.stop_reason,
                outcome.text, custom_id,
            )  # fmt: skip
        return "recorded"

    def _batches(self, where: str) -> list[Batch]:
        rows = self._all(
            "SELECT number, state, id, num_requests, intended_at, seen, adopted, not_ours, expires_at FROM batches"
            f" WHERE {where} ORDER BY number"
        )
        return [
            Batch(number, state, id, count, at, tuple(json.loads(seen)), adopted, tuple(json.loads(not_ours)), expires)
            for number, state, id, count, at, seen, adopted, not_ours, expires in rows
        ]

    def _one(self, sql: str, *values: Any) -> tuple[Any, ...] | None:
        with in_words(self.path):
            return self._connection.execute(sql, values).fetchone()

    def _all(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        with in_words(self.path):
            return self._connection.execute(sql, values).fetchall()

    def _run(self, sql: str, *values: Any) -> int:
        return self._connection.execute(sql, values).rowcount

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing, and on the disk when the block is left."""
        with in_words(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                # A failed COMMIT (a full disk) may have ended the transaction already.
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
