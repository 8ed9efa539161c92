"""One by one: a lost answer is uncertain, counted at its worst, and sent again only when asked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from model_foundry.errors import ConfigError, FoundryError
from model_foundry.generate.ledger import CeilingReachedError
from tests.generation_rig import Rig, code_units, make_recipe, rig
from tests.message_batches_server import Fault, content_of

pytestmark = pytest.mark.slow  # the SDK alone takes a second to import


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Rig]:
    with rig(tmp_path, count=6) as opened:
        yield opened


def counts(made: Rig) -> dict[str, int]:
    made.check_books(one_by_one=True)
    return {state: count for state, count in made.ledger.counts().items() if count}


def test_every_request_is_sent_once(made: Rig) -> None:
    made.messages.send_all()
    assert counts(made) == {"succeeded": 6}
    assert made.server.calls["message"] == 6
    assert made.ledger.money().spent == made.server.billed_nano
    made.reopen()
    made.messages.send_all()
    assert made.server.calls["message"] == 6


@pytest.mark.parametrize("kind", ["drop_before", "drop_after", "status_after", "malformed", "truncated", "html"])
def test_a_lost_answer_is_not_sent_again_unasked(kind: str, made: Rig) -> None:
    """Prevents paying for the same answer twice; the server does not say whether it did the work."""
    made.server.faults["message"].append(Fault(kind, 504, "timeout_error"))
    made.messages.send_all()
    assert counts(made) == {"succeeded": 5, "uncertain": 1}
    assert made.ledger.money().reserved > 0
    made.reopen(resend_uncertain=True)
    made.messages.send_all()
    assert made.ledger.counts()["succeeded"] == 6
    assert made.ledger.money().lost > 0
    assert made.server.billed_nano <= made.ledger.money().committed


def test_a_server_error_leaves_a_request_uncertain_and_a_refusal_does_not(made: Rig) -> None:
    made.server.faults["message"].extend([Fault("status", 500), Fault("status", 429, "rate_limit_error", "3")])
    made.messages.send_all()
    assert counts(made) == {"succeeded": 5, "uncertain": 1}


def test_a_network_that_is_down_stops_the_run_before_it_spends_the_ceiling_on_nothing(made: Rig) -> None:
    made.server.faults["message"].extend([Fault("drop_before")] * 9)
    with pytest.raises(FoundryError, match="3 answers in a row were lost"):
        made.messages.send_all()
    assert counts(made) == {"planned": 3, "uncertain": 3}


def test_a_request_the_api_cannot_take_does_not_stop_the_others(made: Rig) -> None:
    made.server.faults["message"].append(Fault("status", 400, "invalid_request_error"))
    made.messages.send_all()
    assert counts(made) == {"succeeded": 5, "errored": 1}


def test_the_ceiling_stops_before_the_request_that_could_pass_it(tmp_path: Path) -> None:
    recipe = make_recipe()
    one = recipe.worst_case(recipe.params(code_units(1)[0]), batch=False)
    with rig(tmp_path, count=6, ceiling=int(one * 1.5)) as made:
        made.messages.send_all()
        assert made.messages.blocked_at is not None
        assert made.messages.blocked_at > made.ceiling
        assert 0 < counts(made)["succeeded"] < 6


def test_the_probe_finds_what_is_wrong_before_anything_else_is_sent(made: Rig) -> None:
    made.server.models = frozenset()
    with pytest.raises(ConfigError, match="no such model"):
        made.messages.probe()
    made.server.faults["message"].append(Fault("status", 400, "invalid_request_error"))
    with pytest.raises(ConfigError, match="tried first was refused"):
        made.messages.probe()
    assert counts(made) == {"planned": 6}
    assert made.ledger.money().committed == 0


def test_the_answer_of_the_probe_is_kept(made: Rig) -> None:
    made.messages.probe()
    made.run_batches()
    made.check_books(one_by_one=True)
    assert made.ledger.counts()["succeeded"] == 6
    assert [bill.batch is None for bill in made.server.bills] == [True] + [False] * 5


def test_a_probe_whose_answer_is_lost_gives_way_to_another(made: Rig) -> None:
    made.server.faults["message"].append(Fault("drop_after"))
    with pytest.raises(FoundryError, match="tries another one"):
        made.messages.probe()
    made.reopen()
    made.messages.probe()
    assert counts(made) == {"planned": 4, "succeeded": 1, "uncertain": 1}
    first = content_of(made.recipe.params(code_units(1)[0]))
    assert [bill.content == first for bill in made.server.bills] == [True, False]


def test_a_probe_that_the_ceiling_does_not_allow_is_not_sent(tmp_path: Path) -> None:
    with rig(tmp_path, count=1, ceiling=10) as made:
        with pytest.raises(CeilingReachedError):
            made.messages.probe()
        assert made.server.calls["message"] == 0
