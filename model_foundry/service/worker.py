"""The one thread that does operations, and how their replies come to whoever waits for them.

An operation's reply and what it changed are in the journal before anybody hears of it. Snapshots are taken after that,
so that none ever holds the effect of an operation that would be done again.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace

import orjson
from sqlalchemy.exc import SQLAlchemyError

from model_foundry.errors import CheckpointError, DataError, EngineError, FoundryError, ModelError, OutOfMemoryError
from model_foundry.service.books import Books, Model, Operation
from model_foundry.service.execute import Executor, Outcome
from model_foundry.service.lanes import Lanes

_RETRY_SECONDS = 1.0
logger = logging.getLogger(__name__)


class Worker:
    """Takes operations from any thread, does them in its own, and sets their `done` in the loop's."""

    def __init__(self, executor: Executor, books: Books, loop: asyncio.AbstractEventLoop) -> None:
        self.executor, self.books, self.loop = executor, books, loop
        self._lanes = Lanes()
        self._changed = threading.Condition()
        self._calls: deque[Callable[[], None]] = deque()
        self._is_open = True
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)

    def start(self, unfinished: Iterable[Operation]) -> None:
        """Begin, with what was accepted before and not answered."""
        for operation in unfinished:
            self.submit(operation)
        self._thread.start()

    def submit(self, operation: Operation) -> None:
        model = self.books.models.get(operation.lane)
        with self._changed:
            self._lanes.add(operation, next_seq=None if model is None else model.done_seq + 1)
            self._changed.notify()

    def waiting_for(self, operation: Operation) -> str | None:
        with self._changed:
            return self._lanes.waiting_for(operation)

    def num_waiting(self, owner: str) -> int:
        with self._changed:
            return self._lanes.num_waiting(owner)

    def free_seq(self, model: Model) -> int:
        """A sequence id after everything of a model that has come."""
        with self._changed:
            last = self._lanes.last_seq(model.model_id)
        return (model.done_seq if last is None else max(last, model.done_seq)) + 1

    def call(self, work: Callable[[], None]) -> None:
        """Do this between two operations; its errors are logged."""
        with self._changed:
            self._calls.append(work)
            self._changed.notify()

    def stop(self) -> None:
        """Finish what is being done, and write every model down."""
        with self._changed:
            self._is_open = False
            self._changed.notify()
        self._thread.join()

    def _tidy(self, work: Callable[[], None]) -> None:
        try:
            work()
        except (FoundryError, OSError) as error:
            logger.warning("tidying up failed: %s", error)

    def _run(self) -> None:
        operation: Operation | None = None
        while True:
            with self._changed:
                while self._is_open and not self._calls and (operation := self._lanes.take()) is None:
                    self._changed.wait()
                if not self._is_open:
                    break
                work = self._calls.popleft() if self._calls else None
            if work is not None:
                self._tidy(work)
                continue
            began = time.perf_counter()
            assert operation is not None
            self._do(operation)
            with self._changed:
                self._lanes.charge(operation, time.perf_counter() - began)
        try:
            self.executor.host.snapshot_all()
        except FoundryError as error:
            logger.warning(
                "not every model was written down; the next start does their last operations again (%s)", error
            )

    def _do(self, operation: Operation) -> None:
        began = time.perf_counter()
        try:
            outcome = self.executor.execute(operation)
        except Exception as error:
            outcome = self._failure(operation, error)
        operation.reply_kind, operation.reply = outcome.reply_kind, outcome.reply
        self._note_done(operation, outcome)
        self._write(operation, outcome)
        self._after(operation, time.perf_counter() - began)
        self.loop.call_soon_threadsafe(operation.done.set)

    def _failure(self, operation: Operation, error: Exception) -> Outcome:
        operation.failed = True
        category = _category(error)
        if isinstance(error, FoundryError):
            text = str(error)
        else:
            text = f"the service failed on this ({type(error).__name__}); its log says more"
            logger.error("%s failed", operation.request_id, exc_info=error)
        return Outcome("json", orjson.dumps({"error": text, "category": category}))

    def _note_done(self, operation: Operation, outcome: Outcome) -> None:
        """A model knows how far it has come."""
        model = outcome.model or self.books.models.get(operation.lane)
        if model is None:
            return
        if operation.failed and operation.seq == 0:
            model = replace(model, state="failed")
        done_seq = model.done_seq if operation.seq is None else max(model.done_seq, operation.seq)
        outcome.add(self.books.put(replace(model, done_seq=done_seq, last_request=operation.created)))

    def _write(self, operation: Operation, outcome: Outcome) -> None:
        """Into the journal; while the disk is full, nobody hears of it, and nothing else is begun."""
        while True:
            try:
                self.books.journal.run(self.books.answer(operation, *outcome.changes), durable=False).result()
                break
            except SQLAlchemyError as error:
                logger.error("the journal cannot be written (%s); trying again", error)
                time.sleep(_RETRY_SECONDS)
        for effect in outcome.effects:
            effect()

    def _after(self, operation: Operation, seconds: float) -> None:
        host = self.executor.host
        if operation.lane not in self.books.models:
            return
        try:
            host.note(operation.lane, seq=operation.seq, seconds=seconds, body_bytes=len(operation.body))
            host.snapshot_if_due(operation.lane)
        except FoundryError as error:
            logger.warning("%s could not be written down; it stays in the journal (%s)", operation.lane, error)


def _category(error: Exception) -> str:
    """Whose fault it is, as the protocol puts it."""
    if isinstance(error, OutOfMemoryError | CheckpointError):
        return "server"
    return "user" if isinstance(error, DataError | EngineError | ModelError) else "server"
