"""Sends requests as batches and collects what became of them, so that none is ever paid for twice.

Creating a batch is the one call that must not be repeated blindly. Its intent is in the ledger before it is made, one
at a time. When its answer is lost, the API's list of batches says what happened: a new batch of as many requests is
ours or somebody else's, and its custom_ids prove which as soon as it has ended; a batch that two listings
`settle_seconds` apart don't show was not created. Until that is settled nothing else is sent. docs/decisions.md has
the reasoning.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

from model_foundry.errors import FoundryError
from model_foundry.generate.client import AnswerLostError, BatchInfo, Client, NotSentError, RefusedError
from model_foundry.generate.ledger import Batch, Failure, Intent, Ledger, Planned, Reply
from model_foundry.generate.pacing import Pacing
from model_foundry.generate.requests import Recipe, body_bytes, unit_from_json
from model_foundry.generate.results import UnreadableResultError, read_result

MAX_BATCH_REQUESTS = 100_000
MAX_BATCH_BYTES = 256_000_000
"""The API's limits of one batch."""
_SEEN_BATCHES = 20
_LOOK_AGAIN_SECONDS = 15.0
_RESULTS_A_COMMIT = 500
_MAX_READINGS = 3


@dataclass(frozen=True)
class BatchLimits:
    """Size of a batch, and seconds between looks at it."""

    max_requests: int = MAX_BATCH_REQUESTS
    max_bytes: int = MAX_BATCH_BYTES
    poll_seconds: float = 60.0
    settle_seconds: float = 300.0


@dataclass
class Oddities:
    """What batches held that they should not; nothing of it is counted as an answer."""

    repeated: int = 0
    unknown: int = 0
    unreadable: int = 0
    example: str = ""


class BatchDriver:
    """Sends and collects batches of one ledger.

    Args:
        ceiling: nano-dollars.
        shield: a block during which Ctrl-C waits, around the call whose answer must not be lost.
        give_up_missing: results that can't be had any more make their requests uncertain instead of staying reserved.
    """

    def __init__(
        self,
        ledger: Ledger,
        client: Client,
        recipe: Recipe,
        *,
        ceiling: int,
        pacing: Pacing,
        limits: BatchLimits | None = None,
        shield: Callable[[], AbstractContextManager[Any]] = nullcontext,
        give_up_missing: bool = False,
    ) -> None:
        self._ledger = ledger
        self._client = client
        self._recipe = recipe
        self._ceiling = ceiling
        self._pacing = pacing
        self._limits = limits or BatchLimits()
        self._max_requests = min(self._limits.max_requests, MAX_BATCH_REQUESTS)
        self._max_bytes = min(self._limits.max_bytes, MAX_BATCH_BYTES)
        self._shield = shield
        self._give_up_missing = give_up_missing
        self.oddities = Oddities()
        self.incomplete: set[int] = set()
        self.blocked_at: int | None = None
        self._failures = 0
        self._created: set[int] = set()
        self._is_canceling = False

    # creating

    def submit(self) -> None:
        """Create batches until everything is sent, or what is left must wait for what is in flight, or the ceiling.

        `blocked_at` then is the ceiling that would have let the next request pass, or None. Nothing is sent while a
        batch that was found by looking has not proved to be ours: two such batches could be taken for each other.
        """
        self.blocked_at = None
        while self._ledger.unsettled() is None and not any(batch.adopted == 1 for batch in self._ledger.open_batches()):
            chosen, is_cut = self._choose()
            # What is in flight is worth waiting for: its real cost will take the place of its worst case.
            if not chosen or (is_cut and self.in_flight()):
                return
            self._create(chosen)

    def in_flight(self) -> list[Batch]:
        """Batches that may still bring something in this run."""
        return [batch for batch in self._ledger.open_batches() if batch.number not in self.incomplete]

    def _choose(self) -> tuple[list[tuple[Intent, dict[str, Any]]], bool]:
        """The requests of the next batch, and whether the ceiling cut it short."""
        budget = self._ceiling - self._ledger.money().committed
        chosen: list[tuple[Intent, dict[str, Any]]] = []
        num_bytes = 0
        for planned in self._ledger.sendable():
            params = self._recipe.params(unit_from_json(planned.unit))
            intent = Intent(
                planned.key, custom_id(self._ledger, planned), self._recipe.worst_case(params, batch=True)
            )  # fmt: skip
            num_bytes += body_bytes(params, intent.custom_id)
            if chosen and (len(chosen) >= self._max_requests or num_bytes > self._max_bytes):
                return chosen, False
            budget -= intent.worst_case
            if budget < 0:
                self.blocked_at = self._ceiling - budget
                return chosen, True
            chosen.append((intent, params))
        return chosen, False

    def _create(self, chosen: Sequence[tuple[Intent, dict[str, Any]]]) -> None:
        doing = f"creating a batch of {len(chosen):,} requests"
        requests = [{"custom_id": intent.custom_id, "params": params} for intent, params in chosen]
        seen = self._pacing.repeat(self._newest, "listing the batches")
        try:
            with self._shield():
                number = self._ledger.intend_batch(
                    [intent for intent, _ in chosen], ceiling=self._ceiling, seen=seen, now=self._pacing.clock.now()
                )
                try:
                    info = self._client.create_batch(requests)
                except (NotSentError, RefusedError) as error:
                    self._ledger.batch_not_created(number, state="refused", note=str(error))
                    raise
                self._ledger.batch_created(number, info.id, expires_at=info.expires_at)
            self._failures = 0
            self._created.add(number)
            self._pacing.say(f"batch {info.id}: {len(chosen):,} requests are on their way")
        except AnswerLostError as error:
            self._pacing.say(f"{doing}: the answer was lost ({error})")
        except RefusedError as error:
            if error.status == 413 and len(chosen) > 1:
                self._max_requests = len(chosen) // 2
                self._pacing.say(f"{doing}: too large for the API; batches of {self._max_requests:,} from here on")
                return
            self._fail(error, doing)
        except NotSentError as error:
            self._fail(error, doing)

    def _fail(self, error: Exception, doing: str) -> None:
        self._failures += 1
        self._pacing.wait(self._failures, error, doing)

    def _newest(self) -> list[str]:
        return [info.id for info in islice(self._client.list_batches(), _SEEN_BATCHES)]

    # finding out what became of a creation

    def settle(self) -> None:
        """Find out whether the batch whose creation has no known outcome exists. Returns when that is known."""
        batch = self._ledger.unsettled()
        if batch is None:
            return
        clock, limits = self._pacing.clock, self._limits
        self._pacing.say(
            f"it is not known whether a batch of {batch.num_requests:,} requests was created; looking for it (up to "
            f"{limits.settle_seconds:.0f} s); nothing is sent until that is settled"
        )
        first_look: float | None = None
        while (batch := self._ledger.unsettled()) is not None:
            found = self._pacing.repeat(lambda batch=batch: self._candidates(batch), "listing the batches")
            now = clock.monotonic()
            if len(found) == 1:
                self._adopt(batch, found[0])
            elif found:
                self._tell_apart(batch, found)
            elif first_look is not None and now - first_look >= limits.settle_seconds:
                self._ledger.batch_not_created(batch.number, state="absent", note="two listings did not show it")
                self._pacing.say("it was not created; its requests are planned again")
            else:
                first_look = now if first_look is None else first_look
                clock.sleep(max(1.0, min(_LOOK_AGAIN_SECONDS, first_look + limits.settle_seconds - now)))

    def _candidates(self, batch: Batch) -> list[BatchInfo]:
        """Batches of the right size that were not there before and are not known to be something else."""
        known = {other.id for other in self._ledger.batches()} | set(batch.not_ours)
        seen, num_seen, found = set(batch.seen), 0, []
        for info in self._client.list_batches():
            if info.id in seen:
                num_seen += 1
                # Not at the first: two batches of one instant may be listed in either order.
                if num_seen == len(seen):
                    break
            elif info.id not in known and info.num_requests == batch.num_requests:
                found.append(info)
        return found

    def _adopt(self, batch: Batch, info: BatchInfo) -> None:
        self._ledger.batch_created(batch.number, info.id, expires_at=info.expires_at, adopted=True)
        self._pacing.say(f"found it: batch {info.id}")

    def _tell_apart(self, batch: Batch, found: Sequence[BatchInfo]) -> None:
        """Several batches could be it. Those that have ended show their custom_ids; wait for the others."""
        ours = self._ledger.custom_ids(batch.number)
        for info in found:
            if not info.ended or not info.has_results:
                continue
            held = self._pacing.repeat(lambda id=info.id: self._held_ids(id), f"reading the results of {info.id}")
            if held & ours:
                self._adopt(batch, info)
                return
            if held:
                self._ledger.batch_not_ours(batch.number, info.id)
                return
        self._pacing.say(f"{len(found)} batches could be it; waiting for them to end, which tells them apart")
        self._pacing.clock.sleep(self._limits.poll_seconds)

    def _held_ids(self, id: str) -> set[str]:
        """The first few custom_ids of a batch that has ended."""
        held: set[str] = set()
        for line in islice(self._client.results(id), 100):
            try:
                held.add(read_result(line, price=self._recipe.price)[0])
            except UnreadableResultError:
                continue
        return held

    # collecting

    def poll(self) -> list[BatchInfo]:
        """Look at every batch in flight once and take the results of those that have ended."""
        infos = []
        for batch in self.in_flight():
            assert batch.id is not None
            info = self._pacing.repeat(lambda id=batch.id: self._retrieve(id), f"looking at batch {batch.id}")
            if info is None:
                self._ledger.batch_ended(batch.number, missing="the API does not know its batch any more")
                continue
            infos.append(info)
            if info.ended:
                self._collect(batch, info)
        return infos

    def _retrieve(self, id: str) -> BatchInfo | None:
        try:
            return self._client.retrieve_batch(id)
        except RefusedError as error:
            if error.status != 404:
                raise
            if self._give_up_missing:
                return None
            raise FoundryError(
                f"the API does not know batch {id}, which this ledger created",
                where=str(self._ledger.path),
                hint="Is ANTHROPIC_API_KEY of the workspace that created it? If the batch was deleted, "
                "--resend-uncertain counts its requests at their worst case and lets them be sent again",
            ) from error

    def _collect(self, batch: Batch, info: BatchInfo) -> None:
        """Take every result of a batch that has ended; read again what breaks off."""
        doing = f"reading the results of batch {info.id}"
        readings = failures = 0
        while True:
            told: Counter[str] = Counter()
            try:
                if info.has_results:
                    self._read(batch, info, told)
                readings += 1
            except (NotSentError, AnswerLostError, RefusedError) as error:
                failures += 1
                self._pacing.wait(failures, error, doing)
                continue
            if batch.adopted == 1 and told["unknown"] and not told["recorded"] + told["repeated"]:
                self._pacing.say(f"batch {info.id} is somebody else's; looking again")
                self._ledger.batch_not_ours(batch.number, info.id)
                return
            num_missing = len(self._ledger.custom_ids(batch.number))
            if num_missing and readings < _MAX_READINGS:
                self._pacing.clock.sleep(_LOOK_AGAIN_SECONDS)
                continue
            self._count(told)
            if num_missing and not self._give_up_missing:
                self.incomplete.add(batch.number)
                self._pacing.say(f"batch {info.id}: {num_missing:,} requests have no readable result; not sent again")
                return
            self._ledger.batch_proved(batch.number)
            self._ledger.batch_ended(batch.number, missing="the API has no readable result of it")
            if batch.number not in self._created and not self._is_canceling:
                self._ledger.plan_canceled(batch.number)
            return

    def _read(self, batch: Batch, info: BatchInfo, told: Counter[str]) -> None:
        """One reading of the results; `told` counts what its lines were."""
        seen: set[str] = set()
        chunk: list[tuple[str, Reply | Failure]] = []
        try:
            for line in self._client.results(info.id):
                try:
                    custom_id, outcome = read_result(line, price=self._recipe.price)
                except UnreadableResultError as error:
                    told["unreadable"] += 1
                    self.oddities.example = self.oddities.example or f"{error}: {line[:80]!r}"
                    continue
                told["twice"] += custom_id in seen
                seen.add(custom_id)
                chunk.append((custom_id, outcome))
                if len(chunk) == _RESULTS_A_COMMIT:
                    told.update(self._ledger.record(chunk, batch=batch.number))
                    chunk = []
        finally:
            # What came before the stream broke is written down as well.
            told.update(self._ledger.record(chunk, batch=batch.number))

    def _count(self, told: Counter[str]) -> None:
        self.oddities.repeated += told["twice"]
        self.oddities.unknown += told["unknown"]
        self.oddities.unreadable += told["unreadable"]

    # canceling

    def cancel(self) -> int:
        """Ask the API to cancel what is in flight; how many batches. What was done before is billed and kept."""
        self._is_canceling = True
        self.settle()
        batches = self.in_flight()
        for batch in batches:
            assert batch.id is not None
            self._pacing.repeat(lambda id=batch.id: self._cancel(id), f"canceling batch {batch.id}")
        return len(batches)

    def _cancel(self, id: str) -> None:
        try:
            self._client.cancel_batch(id)
        except (RefusedError, AnswerLostError):
            # It may have ended already, or the cancel may have arrived.
            if self._client.retrieve_batch(id).status == "in_progress":
                raise


def custom_id(ledger: Ledger, planned: Planned) -> str:
    """At most 64 letters, digits and dashes; no other ledger and no other attempt has the same."""
    return f"{ledger.id}-{planned.key[:40]}-{planned.attempts + 1}"
