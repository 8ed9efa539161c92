"""The one thread that does operations, and how their replies come to whoever waits for them.

Operations on models are done one after the other, but for short passes of several models, which are one pass. Samples
of all clients share a batch, which gets a token further between two operations, and between two pieces of a long one,
whenever its owners have used less time.

An operation's reply and what it changed are in the journal before anybody hears of it. Snapshots are taken after that,
so that none ever holds the effect of an operation that would be done again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import orjson
from sqlalchemy.exc import SQLAlchemyError

from model_foundry.errors import CheckpointError, DataError, EngineError, FoundryError, ModelError, OutOfMemoryError
from model_foundry.service.books import Books, Model, Operation
from model_foundry.service.company import Company, Group
from model_foundry.service.execute import Executor, Outcome
from model_foundry.service.lanes import PASSES, Lanes
from model_foundry.service.tensors import Pass

_RETRY_SECONDS = 1.0
STEPS_SECONDS = 0.05
"""So long the first of several steps waits for the others, that its reply is written down with theirs."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Queue:
    """What an owner has: operations that wait, samples in the batch, seconds of computing so far."""

    waiting: int
    samples: int
    seconds: float


class Worker:
    """Takes operations from any thread, does them in its own, and sets their `done` in the loop's."""

    def __init__(self, executor: Executor, books: Books, loop: asyncio.AbstractEventLoop) -> None:
        self.executor, self.books, self.loop = executor, books, loop
        self._lanes = Lanes()
        self._changed = threading.Condition()
        self._calls: deque[Callable[[], None]] = deque()
        self._is_open = True
        self._current: Operation | None = None
        self._since = self._spent = 0.0
        self._company = Company()
        self._places: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)

    def start(self, unfinished: Iterable[Operation]) -> None:
        """Begin, with what was accepted before and not answered."""
        for operation in unfinished:
            self.submit(operation)
        self._thread.start()

    def submit(self, operation: Operation) -> None:
        with self._changed:
            # Read with the lock held: a lane that was left a moment ago begins again after what was done last.
            model = self.books.models.get(operation.lane)
            self._lanes.add(operation, next_seq=None if model is None else model.done_seq + 1)
            self._company.came(operation.lane, time.perf_counter(), is_pass=operation.kind in PASSES)
            if model is not None and model.state != "live":
                self._calls.append(partial(self._fail_waiting, operation.lane, "there is no such model any more"))
            self._changed.notify()

    def waiting_for(self, operation: Operation) -> str | None:
        with self._changed:
            return self._lanes.waiting_for(operation)

    def num_waiting(self, owner: str) -> int:
        with self._changed:
            return self._lanes.num_waiting(owner)

    def queues(self) -> dict[str, Queue]:
        """By owner."""
        with self._changed:
            return {
                owner: Queue(self._lanes.num_waiting(owner), self._places[owner], self._lanes.used(owner))
                for owner in self._lanes.owners()
            }

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

    def unload(self, model_id: str, *, unless: Callable[[], bool]) -> None:
        """Let a model go whose client has gone, unless something that was accepted can be done on it, or `unless` holds
        by then. What waits for an operation that never came fails."""

        def unload() -> None:
            stays = unless()
            with self._changed:
                stays = stays or self._lanes.is_ready(model_id)
            if stays:
                return
            self.executor.let_go(model_id)
            self._fail_waiting(
                model_id, "the model was unloaded, while this waited for an operation before it that never came"
            )

        self.call(unload)

    def _fail_waiting(self, model_id: str, what: str) -> None:
        """Nothing is done any more on a model that is not there: not what came afterwards, not what a gap is before."""
        with self._changed:
            waiting = self._lanes.abandon(model_id)
        for operation in waiting:
            self._finish([(operation, DataError(what, where=model_id), 0.0)])

    def stop(self) -> None:
        """Finish what is being done, and write every model down."""
        with self._changed:
            self._is_open = False
            self._changed.notify()
        self._thread.join()

    def _tidy(self, work: Callable[[], None]) -> None:
        try:
            work()
        except (FoundryError, OSError, SQLAlchemyError) as error:
            logger.warning("tidying up failed: %s", error)

    def _run(self) -> None:
        self.executor.host.engine.between_pieces = self._between
        try:
            while (turn := self._next()) is not None:
                turn()
        except Exception:
            # Nobody would be answered any more. What was accepted is in the journal, for the next start.
            logger.critical("the worker failed, and nothing can be done without it; the process ends", exc_info=True)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        try:
            self.executor.host.snapshot_all()
        except FoundryError as error:
            logger.warning(
                "not every model was written down; the next start does their last operations again (%s)", error
            )

    def _next(self) -> Callable[[], None] | None:
        """What to do now, waited for; None at the end."""
        samples = self.executor.samples
        with self._changed:
            while self._is_open:
                if self._calls:
                    return partial(self._tidy, self._calls.popleft())
                if (operation := self._lanes.take_sample(samples.takes)) is not None:
                    return partial(self._begin_sample, operation)
                if samples.is_active and self._are_samples_next(self._lanes.least_used()):
                    return self._step_samples
                if (operation := self._lanes.take(samples=not samples.may_batch)) is not None:
                    # Of a base that is not sampled in a batch, samples stand in the line.
                    return partial(self._begin_sample if operation.kind == "asample" else self._do, operation)
                self._changed.wait()
        return None

    def _are_samples_next(self, others: float | None) -> bool:
        """Whether the batch's owners have used less, taken together, than the one who would be next otherwise."""
        owners = self.executor.samples.owners()
        return others is None or sum(self._lanes.used(owner) for owner in owners) <= others * len(owners)

    def _between(self) -> None:
        """A piece of a pass is done: samples that have come begin, and go on until their owners are level with its."""
        operation, samples = self._current, self.executor.samples
        if operation is None:
            return
        self._charge_current()
        self._current = None
        while self._is_open:
            with self._changed:
                found = self._lanes.take_sample(samples.takes)
                others = self._lanes.used(operation.owner)
                goes_on = samples.is_active and self._are_samples_next(others)
            if found is not None:
                self._begin_sample(found)
            elif goes_on:
                self._step_samples()
            else:
                break
        self._current, self._since = operation, time.perf_counter()

    def _charge_current(self) -> None:
        """Time since the last look goes to the operation at hand."""
        now = time.perf_counter()
        assert self._current is not None
        with self._changed:
            self._lanes.charge(self._current, now - self._since)
        self._spent += now - self._since
        self._since = now

    def _begin_sample(self, operation: Operation) -> None:
        began = time.perf_counter()
        outcome: Outcome | Exception | None
        try:
            outcome = self.executor.begin_sample(operation)
        except Exception as error:
            outcome = error
        if outcome is not None:
            self._finish([(operation, outcome, 0.0)])
        with self._changed:
            self._lanes.charge(operation, time.perf_counter() - began)
            self._lanes.settle(operation)
            self._places = self.executor.samples.owners()

    def _step_samples(self) -> None:
        """A token for every sample; its time is shared by their owners, place by place."""
        began, owners = time.perf_counter(), self.executor.samples.owners()
        with self._changed:
            self._lanes.reached(min((self._lanes.used(owner) for owner in owners), default=0.0))
        self._finish([(operation, outcome, 0.0) for operation, outcome in self.executor.step_samples()])
        seconds = time.perf_counter() - began
        with self._changed:
            for owner, places in owners.items():
                self._lanes.charge_owner(owner, seconds * places / owners.total())
            self._places = self.executor.samples.owners()

    def _do(self, operation: Operation) -> None:
        if operation.kind == "optim_step":
            self._do_steps(operation)
            return
        self._current, self._since, self._spent = operation, time.perf_counter(), 0.0
        outcome: Outcome | Exception
        try:
            asked = self.executor.read_pass(operation)
            if asked is not None and self.executor.can_join(operation, asked):
                self._do_together(operation, asked)
                return
            outcome = self.executor.execute(operation) if asked is None else self.executor.run_pass(operation, asked)
        except Exception as error:
            outcome = error
        self._charge_current()
        self._finish([(operation, outcome, self._spent)])
        self._charge_current()
        self._current = None
        with self._changed:
            self._lanes.settle(operation)

    def _do_together(self, operation: Operation, asked: Pass) -> None:
        """A pass, with those of other models that wait for their turn; it raises nothing."""
        self._current, host = None, self.executor.host
        host.kept = {operation.lane}
        group = self._gather(operation, asked)
        began = time.perf_counter()
        outcomes: list[Outcome | Exception]
        try:
            outcomes = self.executor.run_passes([each for each, _ in group], [each for _, each in group])
        except Exception as error:
            outcomes = [error] * len(group)
        host.kept = set()
        seconds = time.perf_counter() - began
        num_tokens = {done.lane: _num_tokens(each) for done, each in group}
        took = Group(operation.kind, num_tokens, seconds)
        shares = [each / (sum(num_tokens.values()) or 1) for each in num_tokens.values()]
        self._finish([
            (done, outcome, seconds * share) for (done, _), outcome, share in zip(group, outcomes, shares, strict=True)
        ])  # fmt: skip
        seconds = time.perf_counter() - began
        with self._changed:
            self._company.passed(took)
            for (done, _), share in zip(group, shares, strict=True):
                self._lanes.charge(done, seconds * share)
                self._settle(done)

    def _do_steps(self, operation: Operation | None) -> None:
        """A step, with those of other models in memory that wait for theirs: their replies are one transaction."""
        done: list[tuple[Operation, Outcome | Exception, float]] = []
        stepped: set[str] = set()
        began = since = time.perf_counter()
        while operation is not None:
            outcome: Outcome | Exception
            try:
                outcome = self.executor.execute(operation)
            except Exception as error:
                outcome = error
            now = time.perf_counter()
            done.append((operation, outcome, now - since))
            stepped.add(operation.lane)
            since, operation = now, None
            if now - began < STEPS_SECONDS:
                with self._changed:
                    operation = self._lanes.take_like("optim_step", lambda lane: self._steps_too(lane, stepped))
        self._finish(done)
        shared = (time.perf_counter() - since) / len(done)
        with self._changed:
            for each, _, seconds in done:
                self._lanes.charge(each, seconds + shared)
                self._settle(each)

    def _settle(self, operation: Operation) -> None:
        """With the lock held: an operation of a model is done, and perhaps nothing else is asked of it."""
        self._lanes.settle(operation)
        if operation.lane not in self._lanes:
            self._company.answered(operation.lane, time.perf_counter())

    def _steps_too(self, lane: str, stepped: set[str]) -> bool:
        """One that is not in memory would drive another out, whose step is not in the journal yet."""
        return lane not in stepped and self.executor.host.is_resident(lane)

    def _gather(self, operation: Operation, asked: Pass) -> list[tuple[Operation, Pass]]:
        """Passes of as many models as one piece holds; those that are about to come are waited for."""
        host = self.executor.host
        group, lanes = [(operation, asked)], {operation.lane}
        left = (host.engine.micro_batch_tokens or 0) - _num_tokens(asked)
        while left > 0 and len(group) < host.max_models:
            with self._changed:
                found = self._lanes.take_like(operation.kind, lambda lane: lane not in lanes)
                if found is None:
                    awaited = self._company.awaited_seconds(operation.kind, left, lanes, time.perf_counter())
                    if not awaited or self._has_other_work():
                        break
                    self._changed.wait(awaited)
                    continue
            host.kept.add(found.lane)
            try:
                other = self.executor.read_pass(found)
                if other is None or _num_tokens(other) > left or other.forward_only != asked.forward_only:
                    joins = False
                else:
                    joins = self.executor.can_join(found, other)
            except Exception as error:
                self._finish([(found, error, 0.0)])
                with self._changed:
                    self._lanes.settle(found)
                continue
            if other is None or not joins:
                with self._changed:
                    self._lanes.put_back(found)
                break
            group.append((found, other))
            lanes.add(found.lane)
            left -= _num_tokens(other)
        return group

    def _has_other_work(self) -> bool:
        """With the lock held: whether somebody would be kept waiting who does not take part in passes."""
        return not self._is_open or bool(self._calls) or self.executor.samples.is_active or self._lanes.has_samples()

    def _finish(self, done: Sequence[tuple[Operation, Outcome | Exception, float]]) -> None:
        """Replies, and what was changed, into the journal, in one transaction; then their clients hear of it.

        `done`: operations, what came of each, and the seconds that it took.
        """
        outcomes = [
            self._failure(operation, outcome) if isinstance(outcome, Exception) else outcome
            for operation, outcome, _ in done
        ]
        for (operation, _, _), outcome in zip(done, outcomes, strict=True):
            operation.reply_kind, operation.reply = outcome.reply_kind, outcome.reply
            self._note_done(operation, outcome)
        self._write([(operation, outcome) for (operation, _, _), outcome in zip(done, outcomes, strict=True)])
        for operation, _, seconds in done:
            self._after(operation, seconds)
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

    def _write(self, done: Sequence[tuple[Operation, Outcome]]) -> None:
        """Into the journal; while the disk is full, nobody hears of it, and nothing else is begun."""
        left = list(done)
        while left:
            writes = [
                self.books.journal.run(self.books.answer(operation, *outcome.changes), durable=False)
                for operation, outcome in left
            ]
            failed = [error for write in writes if (error := write.exception()) is not None]
            left = [each for each, write in zip(left, writes, strict=True) if write.exception() is not None]
            for error in failed:
                if not isinstance(error, SQLAlchemyError):
                    raise error
                logger.error("the journal cannot be written (%s); trying again", error)
            if left:
                time.sleep(_RETRY_SECONDS)
        for _, outcome in done:
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


def _num_tokens(asked: Pass) -> int:
    return sum(datum.num_tokens for datum in asked.data)


def _category(error: Exception) -> str:
    """Whose fault it is, as the protocol puts it."""
    if isinstance(error, OutOfMemoryError | CheckpointError):
        return "server"
    return "user" if isinstance(error, DataError | EngineError | ModelError) else "server"
