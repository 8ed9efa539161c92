"""A whole generation: what is said before, sent, kept and written, and what a person gets wrong."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from model_foundry.data.gate.unread import content_reason
from model_foundry.data.rows import read_rows
from model_foundry.errors import ConfigError, DataError, FoundryError, InterruptedRunError
from model_foundry.generate import run
from model_foundry.generate.batches import BatchLimits
from model_foundry.generate.client import Client
from model_foundry.generate.dataset import RowRules, standard_filters, write_dataset
from model_foundry.generate.ledger import Ledger
from model_foundry.generate.pacing import Clock, Pacing
from model_foundry.generate.report import Report
from tests.generation_rig import KEY, PLENTY, code_unit, code_units, make_recipe
from tests.message_batches_server import Fault, Server, TestClock, content_of

pytestmark = pytest.mark.slow  # the SDK alone takes a second to import


@dataclass
class World:
    """A job and the server it speaks to."""

    job: run.Job
    server: Server
    said: list[str]

    def __post_init__(self) -> None:
        self.client = Client(api_key=KEY, base_url=self.server.url, timeout_seconds=20.0)
        clock = self.server.clock
        timer = Clock(now=clock.now, monotonic=clock.now, sleep=lambda seconds: clock.sleep(seconds))
        self.pacing = Pacing(clock=timer, say=self.said.append)

    def generate(self, count: int = 10, *, ask: Callable[[str], bool] | None = None, **options: Any) -> Report:
        asker = run.Asker(say=self.said.append, ask=ask)
        return run.generate(
            self.job, code_units(count), client=self.client, pacing=self.pacing, asker=asker, **options
        )  # fmt: skip

    def change(self, **changes: Any) -> None:
        self.job = replace(self.job, **changes)

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.job.output.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    recipe = make_recipe()
    rules = RowRules(
        voices=tuple(recipe.prompt.voices),
        prompt=recipe.prompt.label,
        filters=standard_filters("lua", min_chars=5, max_chars=500),
    )
    job = run.Job(
        recipe=recipe,
        rules=rules,
        output=tmp_path / "out" / "rows.jsonl",
        ledger=tmp_path / "out" / "rows.ledger.sqlite",
        settings={"corpus.language": "lua"},
        ceiling=PLENTY,
        limits=BatchLimits(max_requests=4),
    )
    with Server() as server:
        made = World(job, server, [])
        yield made
        made.client.close()


def test_every_reply_becomes_rows_with_the_code_as_it_was_and_where_it_came_from(world: World, tmp_path: Path) -> None:
    """Prevents an answer that is not the original code to the last byte, and a row that nobody can trace."""
    report = world.generate(10)
    assert report.is_done
    assert report.counts["succeeded"] == 10
    rows, units = world.rows(), {unit.sha256: unit for unit in code_units(10)}
    assert len(rows) == 20  # two voices
    for row in rows:
        meta = row["meta"]
        unit = units[meta["sha256"]]
        assert row["messages"][1]["content"].encode() == unit.code.encode()
        assert (meta["source"], meta["kind"], meta["name"]) == (unit.path, unit.kind, unit.name)
        assert meta["lines"] == [unit.first_line, unit.last_line]
        assert meta["prompt"] == world.job.recipe.prompt.label
        assert meta["voice"] in ("beginner", "developer")
        assert meta["model"] == world.job.recipe.model
        assert meta["custom_id"]
    assert {row["meta"]["batch"] for row in rows} == {None, "msgbatch_0000", "msgbatch_0001", "msgbatch_0002"}
    found = read_rows(world.job.output)
    assert (found.format, len(found.rows)) == ("messages", 20)
    assert content_reason("meta", rows[0]["meta"], found.rows[0]) is None, "the gate takes meta for what it is"
    written = json.loads(world.job.report_path.read_text())
    assert (written["dataset"]["rows"], written["spent_usd"]) == (20, report.money.spent / 1e9)


def test_a_second_run_costs_nothing_and_writes_the_same(world: World) -> None:
    world.generate(10)
    rows, creations, bills = world.rows(), world.server.calls["create"], list(world.server.bills)
    assert world.generate(10).is_done
    assert world.rows() == rows
    assert world.server.calls["create"] == creations
    assert world.server.bills == bills


def test_a_corpus_that_grew_pays_for_what_is_new(world: World) -> None:
    world.generate(6)
    world.generate(10)
    assert world.server.paid_twice() == []
    assert len(world.server.bills) == 10


def test_the_same_code_in_two_places_is_asked_about_once(world: World) -> None:
    units = [*code_units(3), replace(code_unit(1), path="copy.lua")]
    run.generate(world.job, units, client=world.client, pacing=world.pacing)
    assert len(world.server.bills) == 3


def test_a_dry_run_sends_nothing_that_is_paid_and_writes_nothing(world: World) -> None:
    estimate = run.dry_run(world.job, code_units(10), client=world.client)
    assert estimate.num_requests == 10
    assert "the API's counter" in estimate.input_how
    assert not world.job.output.parent.exists()
    assert world.server.bills == []
    assert set(world.server.calls) == {"count"}
    without = run.dry_run(world.job, code_units(10), client=None)
    assert "errs high" in without.input_how
    assert without.input_tokens > estimate.input_tokens
    report = world.generate(10)
    assert world.server.billed_nano == report.money.spent <= estimate.worst_case * 2  # the probe is no batch


@pytest.mark.parametrize("kind", ["drop_before", "status"])
def test_an_estimate_without_the_counter_says_so(kind: str, world: World) -> None:
    world.server.faults["count"].append(Fault(kind, 529, "overloaded_error"))
    estimate = run.dry_run(world.job, code_units(3), client=world.client)
    assert "the API's counter" in estimate.input_how
    assert "errs high" in estimate.input_how


def test_nothing_is_sent_without_a_ceiling(world: World) -> None:
    world.change(ceiling=None)
    with pytest.raises(ConfigError, match=r"there is no ceiling: 10 requests cost about \$.*--max-cost"):
        world.generate(10)
    assert world.server.bills == []
    assert not world.job.ledger.exists()


def test_a_ceiling_below_one_request_is_refused(world: World) -> None:
    world.change(ceiling=1000)
    with pytest.raises(ConfigError, match="does not allow even one request"):
        world.generate(10)
    assert world.server.bills == []


def test_a_ceiling_below_all_of_it_stops_says_what_is_needed_and_keeps_the_rows(world: World) -> None:
    recipe = world.job.recipe
    world.change(ceiling=int(recipe.worst_case(recipe.params(code_unit(0)), batch=False) * 1.6))
    report = world.generate(20)
    assert not report.is_done
    assert report.blocked_at is not None
    assert world.server.billed_nano <= world.job.ceiling < report.blocked_at  # type: ignore[operator]
    assert 0 < len(world.rows()) < 40
    assert any("--max-cost" in line for line in report.lines())
    world.change(ceiling=PLENTY)
    assert world.generate(20).is_done
    assert world.server.paid_twice() == []


def test_a_wrong_key_is_found_before_anything_is_sent(world: World) -> None:
    world.client.close()
    world.client = Client(api_key="sk-wrong", base_url=world.server.url)
    with pytest.raises(ConfigError, match="does not accept the key"):
        world.generate(10)
    assert world.server.calls["create"] == world.server.calls["message"] == 0


def test_a_model_that_does_not_exist_is_found_before_anything_is_sent(world: World) -> None:
    world.server.models = frozenset({"another"})
    with pytest.raises(ConfigError, match="no such model"):
        world.generate(10)
    assert world.server.calls["create"] == world.server.calls["message"] == 0


def test_parameters_that_only_the_real_call_refuses_are_found_by_the_probe(world: World) -> None:
    """Prevents thousands of requests that all fail a day later."""
    world.change(recipe=replace(world.job.recipe, max_tokens=65_000))
    with pytest.raises(ConfigError, match="max_tokens"):
        world.generate(10)
    assert (world.server.calls["create"], world.server.bills) == (0, [])


def test_an_empty_corpus_is_refused(world: World) -> None:
    with pytest.raises(DataError, match="no code"):
        world.generate(0)
    assert not world.job.ledger.exists()


def test_rows_without_their_ledger_are_not_paid_for_again(world: World) -> None:
    """Prevents a deleted ledger from costing everything a second time."""
    world.generate(3)
    world.job.ledger.unlink()
    rows = world.rows()
    with pytest.raises(DataError, match=r"its ledger .* is not"):
        world.generate(3)
    assert world.rows() == rows


def test_another_prompt_is_another_ledger(world: World) -> None:
    world.generate(3)
    prompt = replace(world.job.recipe.prompt, system="Be brief.")
    world.change(recipe=replace(world.job.recipe, prompt=prompt))
    with pytest.raises(DataError, match="belongs to another configuration: prompt"):
        world.generate(3)


def test_replies_of_every_kind_are_counted_with_their_reason(world: World) -> None:
    """Prevents silent losses between what was paid and what was written."""
    asked = {"voice": "developer", "question": "How do I multiply by three and add the rest?"}
    replies = {
        0: "I would rather ask about the weather.",
        1: "Sure!\n```json\n" + json.dumps({"questions": [asked]}) + "\n```",
        2: json.dumps({"questions": [{"voice": "developer", "question": "Hm?"}]}),
        3: json.dumps({"questions": [{"voice": "developer", "question": "I'm sorry, but I can't help with that."}]}),
        4: json.dumps({"questions": [asked]}),  # says the same as 1
        5: json.dumps({"questions": [{**asked, "voice": "pirate"}]}),
    }
    contents = {content_of(world.job.recipe.params(code_unit(number))): text for number, text in replies.items()}
    normal = world.server.reply

    def reply(params: Mapping[str, Any]) -> str:
        return contents.get(content_of(params)) or normal(params)

    world.server.reply = reply
    report = world.generate(8)
    tally = report.tally
    assert tally is not None
    assert tally.rejected_replies == {"no JSON in it": 1, "a question in no voice that was asked for": 1}
    assert tally.rejected_questions == {"length of the question": 1, "the question is a refusal": 1}
    assert (tally.duplicates_exact, tally.rows, tally.replies, tally.strict) == (1, 5, 8, 5)
    assert (report.counts["succeeded"], report.counts["rejected"]) == (3, 5)
    assert report.reasons["rejected: only duplicates of other questions"] == 1
    assert tally.questions == tally.rows + 1 + sum(tally.rejected_questions.values())
    # Other rules over the same replies cost nothing.
    bills = len(world.server.bills)
    rules = replace(world.job.rules, filters={}, duplicate_threshold=None)
    world.change(rules=rules)
    assert world.generate(8).counts["rejected"] == 2
    assert len(world.server.bills) == bills


def test_a_full_disk_for_the_rows_loses_nothing(world: World) -> None:
    """Prevents paying again because the last step failed."""
    world.generate(3)
    rows, bills = world.rows(), len(world.server.bills)
    world.change(output=Path("/dev/full/rows.jsonl"))
    with pytest.raises(FoundryError, match="The replies are safe in"):
        world.generate(3)
    world.change(output=world.job.ledger.with_name("rows.jsonl"))
    world.generate(3)
    assert world.rows() == rows
    assert len(world.server.bills) == bills


def test_a_disk_that_fills_while_the_rows_are_written_leaves_the_old_ones(world: World) -> None:
    world.generate(10)
    before = world.job.output.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Ledger.open(world.job.ledger, settings=world.job.all_settings) as ledger:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        try:
            with pytest.raises(FoundryError, match=r"File too large.*The replies are safe in"):
                write_dataset(ledger, world.job.output, world.job.rules)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert world.job.output.read_bytes() == before
    assert not list(world.job.output.parent.glob(".tmp-*"))


class _CtrlC(TestClock):
    """A person who presses Ctrl-C at the third wait."""

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds)
        self.waits = getattr(self, "waits", 0) + 1
        if self.waits == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("answer", [True, False, None])
def test_ctrl_c_offers_to_cancel_what_is_under_way(answer: bool | None, world: World) -> None:
    """Prevents an orphan that is billed unseen, and a cancel that nobody asked for."""
    asked: list[str] = []

    def ask(question: str) -> bool:
        asked.append(question)
        return bool(answer)

    world.server.clock = _CtrlC()
    world.__post_init__()
    with pytest.raises(InterruptedRunError) as caught:
        world.generate(9, ask=None if answer is None else ask)
    canceled = [batch.canceled is not None for batch in world.server.batches]
    assert canceled == [bool(answer)] * 2
    assert len(asked) == (answer is not None)
    assert "Run the same command again to go on" in str(caught.value)
    if answer is None:
        assert "8 requests under way in 2 batches" in str(caught.value)
        assert "--cancel" in str(caught.value)
    assert world.generate(9).is_done
    assert world.server.paid_twice() == []


def test_cancel_keeps_what_was_done(world: World) -> None:
    world.server.clock = _CtrlC()
    world.__post_init__()
    with pytest.raises(InterruptedRunError):
        world.generate(9)
    report = run.cancel(world.job, client=world.client, pacing=world.pacing)
    assert report.counts["submitted"] == report.money.reserved == 0
    assert report.counts["canceled"] > 0
    assert all(batch.canceled is not None for batch in world.server.batches)
    assert report.counts["succeeded"] == len(world.server.bills)


def test_status_looks_on_while_another_process_works(world: World) -> None:
    with pytest.raises(DataError, match="there is no ledger yet"):
        run.status(world.job)
    seen: list[Report] = []
    world.pacing = replace(world.pacing, say=lambda line: seen.append(run.status(world.job)))
    world.generate(9)
    assert seen
    assert run.status(world.job).counts["succeeded"] == 9


def test_one_by_one_gives_the_same_rows(world: World) -> None:
    world.change(batch=False)
    report = world.generate(5)
    assert report.is_done
    assert world.server.calls["create"] == 0
    assert {row["meta"]["batch"] for row in world.rows()} == {None}
    assert report.money.spent == world.server.billed_nano


def test_progress_says_counts_cost_ceiling_and_time_left(world: World) -> None:
    world.generate(9)
    line = next(line for line in world.said if "requests answered" in line)
    assert "1/9 requests answered · 2 batches under way · $" in line
    assert "of at most $1,000.00" in line
    assert line.endswith("at most 24 h 00 min left")
