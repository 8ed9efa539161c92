"""Batches: creations whose answers are lost, results that are spoilt, a ceiling, and batches that end in other ways."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from model_foundry.errors import ConfigError, FoundryError
from model_foundry.generate.batches import BatchLimits
from tests.generation_rig import KEY, Rig, code_units, make_recipe, rig
from tests.message_batches_server import DAY, Fault, Server

pytestmark = pytest.mark.slow  # the SDK alone takes a second to import

ONE = make_recipe().worst_case(make_recipe().params(code_units(1)[0]), batch=True)


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Rig]:
    with rig(tmp_path, count=20) as opened:
        yield opened


def finished(made: Rig, **expected: int) -> None:
    made.check_books()
    assert {state: count for state, count in made.ledger.counts().items() if count} == expected


def test_batches_are_split_at_the_limits(made: Rig) -> None:
    made.driver._limits = BatchLimits()
    made.driver._max_requests = 8
    made.run_batches()
    assert [len(batch.requests) for batch in made.server.batches] == [8, 8, 4]
    finished(made, succeeded=20)


def test_batches_are_split_by_bytes(tmp_path: Path) -> None:
    """Prevents a batch that the API refuses as too large after uploading all of it."""
    with rig(tmp_path, count=20, limits=BatchLimits(max_bytes=12_000)) as made:
        made.run_batches()
        assert len(made.server.batches) >= 3
        assert max(made.server.create_bytes) <= 12_000
        finished(made, succeeded=20)


def test_a_batch_the_api_finds_too_large_is_halved(made: Rig) -> None:
    made.server.faults["create"].append(Fault("status", 413, "request_too_large"))
    made.run_batches()
    assert [len(batch.requests) for batch in made.server.batches] == [10, 10]
    finished(made, succeeded=20)


@pytest.mark.parametrize("kind", ["drop_after", "status_after", "malformed", "html", "truncated"])
def test_a_batch_whose_answer_was_lost_is_found_and_not_sent_again(kind: str, made: Rig) -> None:
    made.server.faults["create"].append(Fault(kind, 504, "timeout_error"))
    made.run_batches()
    assert len(made.server.batches) == 1
    finished(made, succeeded=20)


@pytest.mark.parametrize("kind", ["drop_before", "status"])
def test_a_batch_that_was_never_made_is_sent_after_the_settling_time(kind: str, made: Rig) -> None:
    made.server.faults["create"].append(Fault(kind))
    before = made.server.clock.now()
    made.driver.submit()
    made.driver.settle()
    assert made.server.clock.now() - before >= made.limits.settle_seconds
    assert made.ledger.money().committed == 0
    made.run_batches()
    assert len(made.server.batches) == 1
    finished(made, succeeded=20)


@pytest.mark.parametrize("late", [Fault("done_later", seconds=250.0), None])
def test_a_batch_that_shows_late_is_waited_for(late: Fault | None, made: Rig) -> None:
    """Prevents sending again what the API is only slow to do, or slow to list."""
    made.server.hidden_seconds = 0.0 if late else 250.0
    made.server.faults["create"].append(late or Fault("drop_after"))
    made.run_batches()
    assert len(made.server.batches) == 1
    finished(made, succeeded=20)


def test_somebody_elses_batch_of_the_same_size_is_told_from_ours(made: Rig) -> None:
    """Prevents adopting a stranger's results, and then sending ours twice."""
    made.server.faults["create"].append(Fault("done_later", seconds=100.0))
    made.driver.submit()
    made.server.somebody_else_creates(20)
    made.driver.settle()  # the stranger's is the only one there is yet
    assert [batch.id for batch in made.ledger.open_batches()] == ["msgbatch_0000"]
    made.plan(30)
    made.driver.submit()
    assert len(made.server.batches) == 1, "nothing is sent while an adopted batch is not proved"
    made.run_batches()
    assert any("somebody else's" in line for line in made.said)
    finished(made, succeeded=30)


def test_of_two_that_could_be_ours_the_custom_ids_decide(made: Rig) -> None:
    made.server.faults["create"].append(Fault("drop_after"))
    made.driver.submit()
    made.server.somebody_else_creates(20)
    made.run_batches()
    assert any("2 batches could be it" in line for line in made.said)
    finished(made, succeeded=20)


def test_a_new_process_settles_what_the_old_one_left(made: Rig) -> None:
    made.server.faults["create"].append(Fault("drop_after"))
    made.driver.submit()
    made.reopen()
    made.run_batches()
    assert len(made.server.batches) == 1
    finished(made, succeeded=20)


def test_refusals_that_pass_are_waited_for(made: Rig) -> None:
    busy = [Fault("status", 429, "rate_limit_error", "50"), Fault("status", 529, "overloaded_error")]
    made.server.faults["create"].extend(busy)
    made.run_batches()
    assert sum("trying again in 50 s" in line for line in made.said) == 1
    assert made.ledger._all("SELECT attempts FROM requests LIMIT 1") == [(3,)]
    finished(made, succeeded=20)


def test_a_refusal_that_stays_ends_the_run_and_reserves_nothing(made: Rig) -> None:
    made.server.faults["create"].append(Fault("status", 400, "invalid_request_error"))
    with pytest.raises(ConfigError, match="creating a batch of 20 requests was refused"):
        made.run_batches()
    assert made.ledger.money().committed == 0
    finished(made, planned=20)


@pytest.mark.parametrize(
    "kind", ["drop_before", "status", "cut", "bad_line", "repeated_line", "unknown_line", "missing_line", "html"]
)
def test_results_that_are_spoilt_once_are_all_taken_in_the_end(kind: str, made: Rig) -> None:
    made.server.faults["results"].append(Fault(kind))
    made.run_batches()
    assert (made.driver.oddities.repeated, made.driver.oddities.unknown) == (
        int(kind == "repeated_line"), int(kind == "unknown_line"),
    )  # fmt: skip
    finished(made, succeeded=20)


def test_a_result_that_cannot_be_read_is_not_paid_again(made: Rig) -> None:
    """Prevents resending what was billed because its line is missing, until somebody asks for it."""
    made.server.faults["results"].extend([Fault("missing_line")] * 3)
    made.run_batches()
    finished(made, succeeded=19, submitted=1)
    assert made.ledger.money().reserved > 0
    made.server.faults["results"].extend([Fault("missing_line")] * 3)
    made.reopen(resend_uncertain=True)
    made.run_batches()
    finished(made, succeeded=19, uncertain=1)
    assert len(made.server.batches) == 1


def test_expired_requests_are_sent_again_and_cost_nothing_before(made: Rig) -> None:
    made.server.batch_seconds = 2 * DAY
    made.driver.submit()
    made.server.batch_seconds = 60.0
    made.run_batches()
    assert len(made.server.batches) > 1
    finished(made, succeeded=20)


def test_errors_of_the_service_are_tried_again_and_those_of_a_request_are_not(made: Rig) -> None:
    kinds = iter(["api_error"] * 5 + ["invalid_request_error"] * 5 + ["succeeded"] * 100)
    made.server.outcome = lambda _: next(kinds)
    made.run_batches()
    assert [len(batch.requests) for batch in made.server.batches] == [20, 5]
    finished(made, succeeded=15, errored=5)
    assert dict(made.ledger.reasons()) == {
        "errored: invalid_request_error: a invalid_request_error for the test": 5
    }  # fmt: skip


def test_the_ceiling_holds_what_is_under_way_at_its_worst(tmp_path: Path) -> None:
    """Prevents a ceiling of estimates; and a run that stops although its answers came cheaper than feared."""
    ceiling = int(ONE * 6.5)
    with rig(tmp_path, count=20, ceiling=ceiling) as made:
        made.driver.submit()
        assert [len(batch.requests) for batch in made.server.batches] == [6]
        made.run_batches()
        assert len(made.server.batches) > 1
        assert made.driver.blocked_at is None
        finished(made, succeeded=20)


def test_the_ceiling_that_stops_a_run_is_named(tmp_path: Path) -> None:
    with rig(tmp_path, count=20, ceiling=int(ONE * 2.5)) as made:
        made.run_batches()
        assert made.driver.blocked_at is not None
        assert made.driver.blocked_at > made.ceiling
        made.check_books()
        blocked_at, done = made.driver.blocked_at, made.ledger.counts()["succeeded"]
        made.ceiling = blocked_at
        made.reopen()
        made.run_batches()
        assert made.ledger.counts()["succeeded"] > done


def test_canceling_keeps_what_was_done(made: Rig) -> None:
    made.driver.submit()
    assert made.driver.cancel() == 1
    made.server.clock.sleep(60.0)
    made.driver.poll()
    counts = made.ledger.counts()
    assert counts["canceled"] > 0
    assert counts["succeeded"] > 0
    finished(made, canceled=counts["canceled"], succeeded=counts["succeeded"])
    made.driver.submit()
    assert len(made.server.batches) == 1, "what was canceled is not sent again by the run that canceled it"
    made.reopen()
    made.run_batches()
    finished(made, succeeded=20)


def test_canceling_what_has_ended_is_no_error(made: Rig) -> None:
    made.driver.submit()
    made.server.clock.sleep(DAY)
    made.driver.cancel()
    made.driver.poll()
    finished(made, succeeded=20)


def test_canceling_finds_the_batch_whose_answer_was_lost_first(made: Rig) -> None:
    """Prevents an orphan that is billed after everything was canceled."""
    made.server.faults["create"].append(Fault("drop_after"))
    made.driver.submit()
    assert made.driver.cancel() == 1
    assert made.server.batches[0].canceled is not None


def test_a_batch_that_the_key_does_not_know_stops_the_run(made: Rig) -> None:
    """Prevents a key of another workspace from passing for results that are gone."""
    made.driver.submit()
    made.server.batches[0].deleted = True
    with pytest.raises(FoundryError, match="does not know batch msgbatch_0000"):
        made.run_batches()
    assert made.ledger.counts()["submitted"] == 20
    made.server.batches[0].deleted = False
    made.reopen()
    made.run_batches()
    finished(made, succeeded=20)


def test_custom_ids_fit_the_api_and_no_other_ledger(tmp_path: Path) -> None:
    with Server() as server:
        made = [Rig(server, tmp_path / name) for name in ("one", "two")]
        for each in made:
            each.plan(3)
            each.driver.submit()
        ids = [{request["custom_id"] for request in batch.requests} for batch in server.batches]
        assert not ids[0] & ids[1]
        assert all(len(id) <= 64 for id in ids[0] | ids[1])
        for each in made:
            each.close()


def test_the_key_is_written_nowhere(made: Rig) -> None:
    made.server.faults["create"].append(Fault("status", 500))
    made.run_batches()
    written = b"".join(file.read_bytes() for file in made.path.parent.iterdir())
    assert KEY.encode() not in written
    assert KEY not in "".join(made.said)
