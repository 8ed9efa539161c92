"""The ledger against the server's own books, whatever breaks: nothing paid twice, nothing lost, no ceiling passed.

The server is the loopback one, spoken to by the real SDK; it never deduplicates, so a request that is sent twice is
billed twice and found.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from model_foundry.errors import FoundryError
from model_foundry.generate.batches import BatchLimits
from model_foundry.generate.ledger import Ledger, Money
from model_foundry.generate.requests import Recipe
from tests.generation_rig import Rig, code_units, make_recipe
from tests.message_batches_server import DAY, Fault, Server

MAX_REQUESTS = 60
WRITES = (
    "add_requests", "begin_run", "intend_batch", "batch_created", "batch_not_created", "batch_not_ours",
    "batch_proved", "batch_ended", "record", "intend_message", "message_not_sent", "message_uncertain",
)  # fmt: skip
FAULTS = {
    "create": ("drop_before", "drop_after", "done_later", "status", "status_after", "malformed", "html", "truncated"),
    "message": ("drop_before", "drop_after", "status", "status_after", "malformed", "html", "truncated"),
    "list": ("drop_before", "drop_after", "status", "malformed", "html", "truncated", "hidden"),
    "retrieve": ("drop_before", "drop_after", "status", "malformed", "html", "truncated"),
    "cancel": ("drop_before", "drop_after", "status", "status_after", "malformed", "truncated"),
    "results": (
        "drop_before", "drop_after", "status", "cut", "bad_line", "repeated_line", "unknown_line", "missing_line",
        "html", "truncated",
    ),
}  # fmt: skip
STATUSES = (
    (429, "rate_limit_error", "7"),
    (429, "rate_limit_error", "100000"),
    (429, "rate_limit_error", None),
    (529, "overloaded_error", None),
    (500, "api_error", None),
    (503, "api_error", "3"),
    (504, "timeout_error", None),
    (408, "timeout_error", None),
    (502, "html", None),
)


class Crash(BaseException):
    """The process is gone: nothing after this line of its life is done."""


class CrashingLedger(Ledger):
    """Ends the process right before or right after the n-th write."""

    writes_to_live: int | None = None

    @classmethod
    def spend(cls) -> None:
        if CrashingLedger.writes_to_live is not None:
            CrashingLedger.writes_to_live -= 1
            if CrashingLedger.writes_to_live < 0:
                CrashingLedger.writes_to_live = None
                raise Crash


def _mortal(name: str) -> Any:
    write = getattr(Ledger, name)

    def method(self: Ledger, *values: Any, **options: Any) -> Any:
        CrashingLedger.spend()
        result = write(self, *values, **options)
        CrashingLedger.spend()
        return result

    return method


for _name in WRITES:
    setattr(CrashingLedger, _name, _mortal(_name))


def make_fault(kind: str, status: tuple[int, str, str | None], seconds: float = 0.0) -> Fault:
    if kind == "status_after":
        return Fault(kind, 504, "timeout_error")  # a status that says nothing was done is never a lie
    return Fault(kind, status[0], status[1], status[2], seconds)


def one_worst_case(recipe: Recipe) -> int:
    return max(recipe.worst_case(recipe.params(unit), batch=True) for unit in code_units(MAX_REQUESTS))


CREATE_FAULTS = st.tuples(st.just("create"), st.sampled_from(FAULTS["create"]))
ANY_FAULT = st.sampled_from([(call, kind) for call in FAULTS if call != "message" for kind in FAULTS[call]])


class Books(RuleBasedStateMachine):
    """Any order of work, faults, deaths, waiting, canceling and neighbours."""

    @initialize(
        allowed=st.sampled_from([2.5, 7.0, 10_000.0]),
        at_once=st.sampled_from([2, 4, 100]),
        seconds=st.sampled_from([0.0, 600.0]),
        hidden=st.sampled_from([0.0, 120.0]),
    )
    def begin(self, allowed: float, at_once: int, seconds: float, hidden: float) -> None:
        CrashingLedger.writes_to_live = None
        self.folder = Path(tempfile.mkdtemp())
        self.server = Server(batch_seconds=seconds, hidden_seconds=hidden).__enter__()
        recipe = make_recipe()
        limits = BatchLimits(max_requests=at_once, poll_seconds=60.0, settle_seconds=300.0)
        self.rig = Rig(
            self.server, self.folder / "ledger.sqlite", recipe=recipe, ceiling=int(one_worst_case(recipe) * allowed),
            limits=limits, max_tries=4, ledger_class=CrashingLedger,
        )  # fmt: skip
        self.planned = 0

    def attempt(self, *steps: Callable[[], Any]) -> None:
        """Do as one process would; what it dies of is followed by a new one."""
        try:
            for step in steps:
                step()
        except (Crash, FoundryError):
            CrashingLedger.writes_to_live = None
            self.rig.reopen()

    def grow(self, count: int) -> None:
        self.planned = min(MAX_REQUESTS, self.planned + count)
        self.rig.plan(self.planned)

    def fail(self, fault: tuple[str, str] | None, status: tuple[int, str, str | None], seconds: float) -> None:
        if fault is not None:
            self.server.faults[fault[0]].append(make_fault(fault[1], status, seconds))

    @rule(
        count=st.integers(1, 6),
        faults=st.lists(st.one_of(CREATE_FAULTS, ANY_FAULT), max_size=3),
        status=st.sampled_from(STATUSES),
        seconds=st.sampled_from([1.0, 100.0, 250.0]),
        writes=st.one_of(st.none(), st.integers(0, 12)),
    )
    def work(
        self,
        count: int,
        faults: list[tuple[str, str]],
        status: tuple[int, str, str | None],
        seconds: float,
        writes: int | None,
    ) -> None:
        """New code to ask about, and a process that sends and collects while things break."""
        self.grow(count)
        for fault in faults:
            self.fail(fault, status, seconds)
        CrashingLedger.writes_to_live = writes
        driver = self.rig.driver
        self.attempt(driver.settle, driver.submit, driver.poll, driver.settle)
        CrashingLedger.writes_to_live = None

    @rule(fault=st.one_of(st.none(), ANY_FAULT), status=st.sampled_from(STATUSES), seconds=st.sampled_from([60.0, DAY]))
    def later(self, fault: tuple[str, str] | None, status: tuple[int, str, str | None], seconds: float) -> None:
        """Time passes, and a process collects."""
        self.server.clock.sleep(seconds)
        self.fail(fault, status, 1.0)
        self.attempt(self.rig.driver.poll)

    @rule(fault=st.one_of(st.none(), ANY_FAULT), status=st.sampled_from(STATUSES))
    def cancel(self, fault: tuple[str, str] | None, status: tuple[int, str, str | None]) -> None:
        self.fail(fault, status, 1.0)
        self.attempt(self.rig.driver.cancel)

    @rule()
    def new_process(self) -> None:
        self.attempt(self.rig.reopen)

    @rule(seconds=st.sampled_from([0.0, 600.0, 3 * DAY]))
    def batches_take(self, seconds: float) -> None:
        self.server.batch_seconds = seconds

    @rule(error=st.sampled_from(["api_error", "overloaded_error", "invalid_request_error"]), share=st.floats(0, 0.5))
    def requests_fail(self, error: str, share: float) -> None:
        chance = random.Random(self.server.calls.total())
        self.server.outcome = lambda _: error if chance.random() < share else "succeeded"

    @rule(count=st.integers(1, 6))
    def somebody_else_works_too(self, count: int) -> None:
        """A batch that could be taken for ours, made right after one of ours was lost."""
        self.grow(count)
        self.server.faults["create"].append(make_fault("drop_before", STATUSES[0]))
        driver = self.rig.driver
        self.attempt(driver.settle, driver.submit)
        unsettled = self.rig.ledger.unsettled()
        self.server.somebody_else_creates(count if unsettled is None else unsettled.num_requests)

    @invariant()
    def the_books_agree(self) -> None:
        if hasattr(self, "rig"):
            self.rig.check_books()

    def teardown(self) -> None:
        if not hasattr(self, "rig"):
            return
        try:
            self._peace()
        finally:
            self.rig.close()
            self.server.__exit__()
            shutil.rmtree(self.folder)

    def _peace(self) -> None:
        """Everything works again: the same command goes on to the end, and everything that was billed is an answer."""
        CrashingLedger.writes_to_live = None
        self.server.faults.clear()
        self.server.outcome = lambda _: "succeeded"
        self.server.batch_seconds, self.server.hidden_seconds = 60.0, 0.0
        self.rig.reopen()
        self.rig.run_batches()
        self.rig.check_books()
        counts = self.rig.ledger.counts()
        assert counts["submitted"] == counts["uncertain"] == self.rig.ledger.money().reserved == 0
        assert counts["succeeded"] == len(self.server.our_bills)
        if self.rig.driver.blocked_at is None:
            done = counts["succeeded"] + counts["errored"] + counts["canceled"]
            assert done == self.planned, counts


TestBooks = pytest.mark.slow(Books.TestCase)
TestBooks.settings = settings(  # type: ignore[attr-defined]
    max_examples=25,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


NUM_ACCEPTANCE, NUM_FAULTS = 1000, 200


def random_world(seed: int) -> tuple[Server, random.Random, Counter[str]]:
    """A server on which `NUM_FAULTS` faults of every kind come in random order, spread over its calls."""
    chance = random.Random(seed)
    injected: Counter[str] = Counter()

    def fault(call: str) -> Fault | None:
        kinds = FAULTS.get(call, ())
        share = {"create": 0.6, "results": 0.7, "retrieve": 0.25, "list": 0.25}.get(call, 0.0)
        if injected.total() >= NUM_FAULTS or not kinds or chance.random() >= share:
            return None
        kind = chance.choice(kinds)
        injected[f"{call}: {kind}"] += 1
        return make_fault(kind, chance.choice(STATUSES), chance.choice([1.0, 100.0, 250.0]))

    def outcome(_: object) -> str:
        return chance.choices(["succeeded", "api_error", "expired", "canceled"], [90, 4, 4, 2])[0]

    return Server(fault=fault, outcome=outcome, seed=seed, batch_seconds=300.0), chance, injected


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_thousand_requests_through_two_hundred_faults_balance(seed: int, tmp_path: Path) -> None:
    """Prevents a loss or double payment that only a long run meets: every request once, every dollar in both books."""
    CrashingLedger.writes_to_live = None
    server, chance, injected = random_world(seed)
    recipe = make_recipe()
    limits = BatchLimits(max_requests=15, poll_seconds=60.0, settle_seconds=300.0)
    ceiling = NUM_ACCEPTANCE * one_worst_case(recipe) // 4  # a quarter of the worst case: the ceiling is in the way
    deaths = 0
    with server:
        rig = Rig(
            server, tmp_path / "ledger.sqlite", recipe=recipe, ceiling=ceiling, limits=limits, max_tries=5, tries=100,
            ledger_class=CrashingLedger,
        )  # fmt: skip
        rig.plan(NUM_ACCEPTANCE)
        while True:
            CrashingLedger.writes_to_live = chance.randrange(80)
            try:
                rig.run_batches()
                CrashingLedger.writes_to_live = None
                counts = rig.ledger.counts()
                if counts["succeeded"] == NUM_ACCEPTANCE:
                    break
            except (Crash, FoundryError):
                CrashingLedger.writes_to_live = None
                deaths += 1
            rig.check_books()
            rig.reopen()
        rig.check_books()
        assert injected.total() == NUM_FAULTS
        assert deaths > 10
        assert len(server.our_bills) == NUM_ACCEPTANCE
        assert rig.ledger.money() == Money(spent=server.billed_nano, reserved=0, lost=0)
        rig.close()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_one_by_one_nothing_is_sent_twice_unasked(seed: int, tmp_path: Path) -> None:
    """Prevents a retry, a crash or a time-out from paying twice where no list says what was done."""
    chance = random.Random(seed)

    def fault(call: str) -> Fault | None:
        if call != "message" or chance.random() > 0.3:
            return None
        return make_fault(chance.choice(FAULTS["message"]), chance.choice(STATUSES))

    recipe, deaths = make_recipe(), 0
    ceiling = MAX_REQUESTS * one_worst_case(recipe) * 2
    with Server(fault=fault, seed=seed) as server:
        rig = Rig(server, tmp_path / "ledger.sqlite", recipe=recipe, ceiling=ceiling, ledger_class=CrashingLedger)
        rig.plan(MAX_REQUESTS)
        while rig.ledger.num_sendable():
            CrashingLedger.writes_to_live = chance.randrange(30)
            try:
                rig.messages.send_all()
                if rig.messages.blocked_at is not None:
                    break
            except (Crash, FoundryError):
                deaths += 1
            CrashingLedger.writes_to_live = None
            rig.check_books(one_by_one=True)
            rig.reopen()
        CrashingLedger.writes_to_live = None
        rig.check_books(one_by_one=True)
        counts = rig.ledger.counts()
        assert deaths > 3
        assert counts["succeeded"] > 20
        assert counts["uncertain"] > 5
        lost = len(server.bills) - counts["succeeded"]
        assert 0 < lost <= counts["uncertain"], "what was billed and has no answer is known to be uncertain"
        rig.close()
