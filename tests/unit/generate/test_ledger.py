"""The ledger: what it refuses, what it keeps through damage and full disks, and what it lets be sent."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from model_foundry.errors import DataError, FoundryError
from model_foundry.generate.ledger import CeilingReachedError, Failure, Intent, Ledger, Reply

SETTINGS = {"generation.model": "claude-haiku-4-5", "generation.max_tokens": 400}
REPLY = Reply("text", 30, 10, 2, model="m", stop_reason="end_turn")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with Ledger.open(path, settings=SETTINGS) as opened:
        opened.add_requests(((f"key-{number}", "{}") for number in range(4)), tries=2)
        yield opened


def intents(*numbers: int, attempt: int = 1, worst: int = 100) -> list[Intent]:
    return [Intent(f"key-{number}", f"id-{number}-{attempt}", worst) for number in numbers]


def send(ledger: Ledger, *numbers: int, attempt: int = 1, ceiling: int = 1000) -> int:
    batch = ledger.intend_batch(intents(*numbers, attempt=attempt), ceiling=ceiling, seen=[], now=0.0)
    ledger.batch_created(batch, f"msgbatch-{batch}", expires_at=None)
    return batch


def test_a_request_is_planned_once(ledger: Ledger) -> None:
    """Prevents a second run from paying for the same code again."""
    assert ledger.add_requests([("key-1", "{}"), ("key-9", "{}")], tries=2) == 1
    assert ledger.counts()["planned"] == 5


def test_the_ceiling_counts_what_has_no_answer_at_its_worst(ledger: Ledger) -> None:
    """Prevents a second batch that together with the first could pass the ceiling."""
    send(ledger, 0, 1, ceiling=399)
    with pytest.raises(CeilingReachedError) as caught:
        send(ledger, 2, 3, ceiling=399)
    assert caught.value.needed == 400
    assert str(caught.value) == "400"
    assert ledger.counts()["planned"] == 2
    ledger.record([("id-0-1", REPLY), ("id-1-1", Failure("expired"))], batch=1)
    assert (ledger.money().spent, ledger.money().reserved) == (30, 0)
    send(ledger, 2, 3, ceiling=399)


def test_only_what_may_be_sent_is_sent(ledger: Ledger) -> None:
    """Prevents one request in two batches."""
    send(ledger, 0)
    with pytest.raises(AssertionError):
        send(ledger, 0, attempt=2)
    assert [planned.key for planned in ledger.sendable()] == ["key-1", "key-2", "key-3"]
    ledger.intend_batch(intents(1), ceiling=1000, seen=[], now=0.0)
    with pytest.raises(AssertionError, match="unsettled"):
        ledger.intend_batch(intents(2), ceiling=1000, seen=[], now=0.0)


def test_failures_are_sent_again_as_often_as_allowed_in_one_run(ledger: Ledger) -> None:
    for attempt in (1, 2):
        batch = send(ledger, 0, 1, attempt=attempt)
        ledger.record(
            [(f"id-0-{attempt}", Failure("expired")), (f"id-1-{attempt}", Failure("errored", "no", final=True))],
            batch=batch,
        )
        ledger.batch_ended(batch)
        assert "key-1" not in {planned.key for planned in ledger.sendable()}
        if attempt == 1:
            ledger._run("UPDATE requests SET state = 'planned' WHERE key = 'key-1'")
    assert "key-0" not in {planned.key for planned in ledger.sendable()}
    ledger.begin_run(tries=2, resend_uncertain=False)
    assert "key-0" in {planned.key for planned in ledger.sendable()}
    assert "key-1" not in {planned.key for planned in ledger.sendable()}


def test_a_refused_batch_costs_no_try(ledger: Ledger) -> None:
    for attempt in range(1, 6):
        batch = ledger.intend_batch(intents(0, attempt=attempt), ceiling=1000, seen=[], now=0.0)
        ledger.batch_not_created(batch, state="refused", note="429")
    assert ledger.money().committed == 0
    assert ledger.num_sendable() == 4


def test_results_are_taken_once_and_only_by_their_batch(ledger: Ledger) -> None:
    """Prevents a cost that is added twice, and a stranger's result in the data set."""
    batch = send(ledger, 0, 1)
    told = ledger.record([("id-0-1", REPLY), ("id-0-1", REPLY), ("who", REPLY), ("id-0-9", REPLY)], batch=batch)
    assert told == {"recorded": 1, "repeated": 1, "unknown": 2}
    assert ledger.record([("id-1-1", REPLY)], batch=batch + 1) == {"unknown": 1}
    assert ledger.money().spent == 30


def test_a_success_after_a_failure_is_what_was_billed(ledger: Ledger) -> None:
    batch = send(ledger, 0)
    ledger.record([("id-0-1", Failure("expired"))], batch=batch)
    ledger.record([("id-0-1", REPLY)], batch=batch)
    assert ledger.counts()["succeeded"] == 1
    assert ledger.money().spent == 30


def test_a_reply_whose_cost_is_unknown_costs_its_worst_case(ledger: Ledger) -> None:
    send(ledger, 0)
    ledger.record([("id-0-1", Reply("text", None))], batch=1)
    assert ledger.money().spent == 100


def test_an_answer_lost_one_by_one_stays_reserved_until_it_is_sent_again(ledger: Ledger) -> None:
    """Prevents paying for a lost answer twice unasked, and a ceiling that forgets it when asked."""
    ledger.intend_message(intents(0)[0], ceiling=1000)
    assert ledger.begin_run(tries=2, resend_uncertain=False) == 1  # the process that sent it is gone
    assert ledger.counts()["uncertain"] == 1
    assert ledger.num_sendable() == 3
    assert ledger.money().reserved == 100
    ledger.begin_run(tries=2, resend_uncertain=True)
    assert ledger.num_sendable() == 4
    assert (ledger.money().reserved, ledger.money().lost) == (0, 100)


def test_a_batch_that_is_lost_is_nothing_a_new_run_forgets(ledger: Ledger, path: Path) -> None:
    """Prevents resubmitting what a killed process may have sent."""
    ledger.intend_batch(intents(0, 1), ceiling=1000, seen=["a", "b"], now=5.0)
    ledger.close()
    with Ledger.open(path, settings=SETTINGS) as again:
        again.begin_run(tries=2, resend_uncertain=True)
        batch = again.unsettled()
        assert batch is not None
        assert (batch.num_requests, batch.seen) == (2, ("a", "b"))
        assert again.counts()["submitted"] == 2


def test_what_is_in_use_can_be_looked_at_and_not_written(ledger: Ledger, path: Path) -> None:
    """Prevents two processes that send the same requests."""
    with pytest.raises(DataError, match=r"in use by process \d+"):
        Ledger.open(path, settings=SETTINGS)
    with Ledger.open(path, settings=SETTINGS, read_only=True) as onlooker:
        assert onlooker.counts() == ledger.counts()
        with pytest.raises(DataError, match="cannot be opened"):
            onlooker.add_requests([("key", "{}")], tries=1)


def test_a_ledger_of_another_configuration_is_refused_by_what_differs(ledger: Ledger, path: Path) -> None:
    ledger.close()
    with pytest.raises(DataError, match=r"generation\.max_tokens: 400 there, 500 here") as caught:
        Ledger.open(path, settings={**SETTINGS, "generation.max_tokens": 500})
    assert "generation.model" not in caught.value.what


def overwrite(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def foreign(path: Path) -> None:
    path.unlink()
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE something (x)")
    connection.close()


def gone_but_for_its_wal(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.with_name(f"{path.name}-wal").write_bytes(b"a part of it")


DAMAGES = {
    "empty": lambda path: overwrite(path, b""),
    "no database": lambda path: overwrite(path, b"[1, 2, 3]\n" * 1000),
    "torn": lambda path: overwrite(path, path.read_bytes()[:5000]),
    "scribbled over": lambda path: overwrite(path, path.read_bytes()[:4096] + b"\x5a" * (path.stat().st_size - 4096)),
    "another database": foreign,
    "gone but for its WAL": gone_but_for_its_wal,
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_ledger_is_named_and_left_alone(case: str, ledger: Ledger, path: Path) -> None:
    """Prevents starting a new ledger in its place, and paying for everything again."""
    ledger.close()
    DAMAGES[case](path)
    before = {file.name: file.read_bytes() for file in path.parent.iterdir() if file.suffix != ".lock"}
    with pytest.raises(DataError, match="damaged") as caught:
        Ledger.open(path, settings=SETTINGS)
    assert caught.value.where == str(path)
    after = {file.name: file.read_bytes() for file in path.parent.iterdir() if file.suffix != ".lock"}
    assert {name: after.get(name) for name in before} == before


def test_a_full_disk_stops_before_anything_is_sent(ledger: Ledger) -> None:
    """Prevents a request whose intent is on no disk."""
    pages = ledger._one("PRAGMA page_count")
    assert pages is not None
    ledger._connection.execute(f"PRAGMA max_page_count = {pages[0]}")
    with pytest.raises(FoundryError, match=r"could not be written.*full.*nothing is paid for twice"):
        ledger.add_requests(((f"new-{number}", "x" * 500) for number in range(200)), tries=1)
    assert ledger.counts()["planned"] == 4  # as before, and usable
    send(ledger, 0)
