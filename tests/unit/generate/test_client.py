"""The seam over the SDK: which failures mean that nothing was done, and which leave it open."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from model_foundry.generate.client import AnswerLostError, Client, NotSentError, RefusedError
from tests.generation_rig import code_unit, make_recipe
from tests.message_batches_server import KEY, Fault, Server

pytestmark = pytest.mark.slow  # the SDK alone takes a second to import

PARAMS = make_recipe().params(code_unit(1))
REQUESTS = [{"custom_id": "one", "params": PARAMS}, {"custom_id": "two", "params": make_recipe().params(code_unit(2))}]
CALLS: dict[str, Callable[[Client], Any]] = {
    "count": lambda client: client.count_tokens(PARAMS),
    "message": lambda client: client.send_message(PARAMS),
    "create": lambda client: client.create_batch(REQUESTS),
    "retrieve": lambda client: client.retrieve_batch("msgbatch_0000"),
    "list": lambda client: list(client.list_batches()),
    "results": lambda client: list(client.results("msgbatch_0000")),
    "cancel": lambda client: client.cancel_batch("msgbatch_0000"),
}


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(batch_seconds=0.0) as running:
        running.do_create(REQUESTS)
        running.tick()
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    made = Client(api_key=KEY, base_url=server.url, timeout_seconds=10.0)
    yield made
    made.close()


@pytest.mark.parametrize("kind", ["drop_before", "drop_after", "malformed", "html", "truncated"])
@pytest.mark.parametrize("call", [call for call in CALLS if call not in ("cancel", "results")])
def test_a_spoilt_answer_leaves_it_open(call: str, kind: str, server: Server, client: Client) -> None:
    """Prevents sending again what may have been done; and the SDK from doing so by itself."""
    before = server.calls[call]
    server.faults[call].append(Fault(kind))
    with pytest.raises(AnswerLostError):
        CALLS[call](client)
    assert server.calls[call] == before + 1


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 413, 422, 429, 529])
def test_an_error_of_the_api_says_that_nothing_was_done(status: int, server: Server, client: Client) -> None:
    server.faults["create"].append(Fault("status", status, "some_error", retry_after="7"))
    with pytest.raises(RefusedError) as caught:
        client.create_batch(REQUESTS)
    assert (caught.value.status, caught.value.kind, caught.value.retry_after) == (status, "some_error", 7.0)
    assert caught.value.passes == (status in (429, 529))
    assert server.calls["create"] == 1


@pytest.mark.parametrize("status", [307, 408, 409, 500, 502, 503, 504])
def test_any_other_status_leaves_it_open(status: int, server: Server, client: Client) -> None:
    """Prevents taking a time-out on the way back, or a proxy's word, for a refusal."""
    server.faults["create"].append(Fault("status", status))
    with pytest.raises(AnswerLostError, match=str(status)):
        client.create_batch(REQUESTS)


def test_a_refusal_that_is_not_the_apis_own_leaves_it_open(server: Server, client: Client) -> None:
    server.faults["create"].append(Fault("status", 429, "html"))
    with pytest.raises(AnswerLostError, match="429"):
        client.create_batch(REQUESTS)


def test_a_spend_limit_does_not_pass_by_waiting(server: Server, client: Client) -> None:
    """Prevents waiting until next month a few minutes at a time."""
    server.faults["message"].append(Fault("status", 429, "rate_limit_error", code="enforced_spend_limit_reached"))
    with pytest.raises(RefusedError) as caught:
        client.send_message(PARAMS)
    assert not caught.value.passes


@pytest.mark.parametrize("retry_after", ["nonsense", "-5", "inf", "Wed, 21 Oct 2026 07:28:00 GMT"])
def test_a_retry_after_that_is_no_number_is_no_wish(retry_after: str, server: Server, client: Client) -> None:
    server.faults["message"].append(Fault("status", 429, "rate_limit_error", retry_after=retry_after))
    with pytest.raises(RefusedError) as caught:
        client.send_message(PARAMS)
    assert caught.value.retry_after is None


def test_where_nobody_listens_nothing_was_sent() -> None:
    """Prevents a network that is down from leaving requests uncertain."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        client = Client(api_key=KEY, base_url=f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(NotSentError):
            client.send_message(PARAMS)
        client.close()


def test_results_come_line_by_line_whatever_is_in_them(server: Server, client: Client) -> None:
    """Prevents U+2028 inside a reply from splitting its line, and a bad line from hiding those after it."""
    server.batches[0].results[0]["result"] = {"type": "expired", "note": "a\u2028b\x85c"}  # type: ignore[index]
    server.faults["results"].append(Fault("bad_line"))
    lines = list(client.results("msgbatch_0000"))
    assert len(lines) == 3
    assert sum(line.endswith(b"}") for line in lines) == 2


def test_a_stream_that_breaks_off_gives_what_came_before(server: Server, client: Client) -> None:
    server.faults["results"].append(Fault("cut"))
    lines = client.results("msgbatch_0000")
    assert next(lines).endswith(b"}")
    with pytest.raises(AnswerLostError):
        next(lines)


def test_lists_are_read_to_their_last_page(server: Server, client: Client) -> None:
    server.page = 2
    for _ in range(4):
        server.do_create(REQUESTS)
    assert [info.id for info in client.list_batches()] == [f"msgbatch_{number:04d}" for number in (4, 3, 2, 1, 0)]
    assert all(info.num_requests == 2 for info in client.list_batches())
