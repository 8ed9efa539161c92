"""What tests of generation share: pieces of code, a recipe, a ledger and drivers against the loopback server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from model_foundry.data.code.units import CodeUnit
from model_foundry.generate.batches import BatchDriver, BatchLimits
from model_foundry.generate.client import Client
from model_foundry.generate.ledger import Ledger
from model_foundry.generate.messages import MessageDriver
from model_foundry.generate.pacing import Clock, Pacing
from model_foundry.generate.pricing import find_price
from model_foundry.generate.prompts import Prompt
from model_foundry.generate.requests import Recipe, unit_to_json
from tests.message_batches_server import KEY, MODEL, Server

PLENTY = 10**12
LIMITS = BatchLimits(poll_seconds=60.0, settle_seconds=300.0)


def code_unit(number: int, *, code: str | None = None) -> CodeUnit:
    code = code if code is not None else f"function rule_{number}(a, b)\n  return a * {number} + b -- ünï\r\nend"
    return CodeUnit(
        path=f"rules/part_{number % 7}.lua",
        language="lua",
        kind="function",
        name=f"rule_{number}",
        code=code,
        comment=f"Rule {number} of the game.",
        first_line=number * 4 + 1,
        last_line=number * 4 + 3,
        sha256=sha256(code.encode()).hexdigest(),
    )


def code_units(count: int) -> list[CodeUnit]:
    return [code_unit(number) for number in range(count)]


def make_recipe(**changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "model": MODEL,
        "max_tokens": 400,
        "prompt": Prompt(voices={"beginner": "simply", "developer": "precisely"}),
        "price": find_price(MODEL),
    }
    return Recipe(**{**values, **changes})


@dataclass
class Rig:
    """One ledger against one server. `reopen` is what a new process does; the old object is simply dropped."""

    server: Server
    path: Path
    recipe: Recipe = field(default_factory=make_recipe)
    ceiling: int = PLENTY
    limits: BatchLimits = LIMITS
    max_tries: int = 8
    tries: int = 3
    said: list[str] = field(default_factory=list)
    ledger_class: type[Ledger] = Ledger

    def __post_init__(self) -> None:
        self.client = Client(api_key=KEY, base_url=self.server.url, timeout_seconds=20.0)
        clock = Clock(now=self.server.clock.now, monotonic=self.server.clock.now, sleep=self.server.clock.sleep)
        self.pacing = Pacing(clock=clock, max_tries=self.max_tries, say=self.said.append)
        self.reopen()

    def reopen(self, *, resend_uncertain: bool = False) -> None:
        if hasattr(self, "ledger"):
            self.ledger.close()
        self.ledger = self.ledger_class.open(self.path, settings=self.recipe.settings())
        self.ledger.begin_run(tries=self.tries, resend_uncertain=resend_uncertain)
        self.driver = BatchDriver(
            self.ledger, self.client, self.recipe,
            ceiling=self.ceiling, pacing=self.pacing, limits=self.limits, give_up_missing=resend_uncertain,
        )  # fmt: skip
        self.messages = MessageDriver(
            self.ledger, self.client, self.recipe, ceiling=self.ceiling, pacing=self.pacing
        )  # fmt: skip

    def plan(self, count: int) -> None:
        units = ((self.recipe.key(unit), unit_to_json(unit)) for unit in code_units(count))
        self.ledger.add_requests(units, tries=self.tries)

    def run_batches(self) -> None:
        """What `run` does with batches, without its words."""
        self.driver.settle()
        while True:
            self.driver.submit()
            if not self.driver.in_flight() and self.ledger.unsettled() is None:
                return
            if self.ledger.unsettled() is None:
                self.server.clock.sleep(self.limits.poll_seconds)
                self.driver.poll()
            self.driver.settle()

    def close(self) -> None:
        self.ledger.close()
        self.client.close()

    def check_books(self, *, one_by_one: bool = False) -> None:
        """The ledger against the server's own books: nothing paid twice, nothing lost, the ceiling never passed."""
        server, counts, money = self.server, self.ledger.counts(), self.ledger.money()
        assert server.paid_twice() == []
        assert server.billed_nano <= self.ceiling
        assert money.committed <= self.ceiling
        answered = {item.custom_id: item for item in self.ledger.answered()}
        waiting = self._waiting_ids()
        for bill in server.our_bills:
            if bill.custom_id is not None:
                assert bill.custom_id in answered or bill.custom_id in waiting, "billed and forgotten"
        if not one_by_one:
            billed = {bill.custom_id for bill in server.our_bills}
            assert set(answered) <= billed
            paid = sum(bill.nano for bill in server.our_bills if bill.custom_id in answered)
            assert money.spent == paid
        assert server.billed_nano <= money.committed, "more was billed than the ledger reckons with"
        assert counts["succeeded"] + counts["rejected"] == len(answered)

    def _waiting_ids(self) -> set[str]:
        rows = self.ledger._all("SELECT custom_id FROM requests WHERE state IN ('submitted', 'uncertain')")
        return {row[0] for row in rows}


@contextmanager
def rig(folder: Path, *, count: int = 0, server: Server | None = None, **options: Any) -> Iterator[Rig]:
    with server or Server() as running:
        made = Rig(running, folder / "ledger.sqlite", **options)
        try:
            if count:
                made.plan(count)
            yield made
        finally:
            made.close()
