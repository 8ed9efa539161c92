"""Replies as models write them: strict first, tolerant second, and a reason for every one that is left."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_foundry.generate.ledger import Failure, Reply
from model_foundry.generate.pricing import find_price
from model_foundry.generate.replies import Question, UnusableReplyError, parse_reply
from model_foundry.generate.results import UnreadableResultError, read_message, read_result

VOICES = ("beginner", "developer")
ASKED = {"questions": [{"voice": "beginner", "question": "How?"}, {"voice": "developer", "question": "Why?"}]}
TWO = (Question("beginner", "How?"), Question("developer", "Why?"))


def parse(text: str, stop_reason: str = "end_turn") -> tuple[tuple[Question, ...], bool]:
    parsed = parse_reply(text, stop_reason=stop_reason, voices=VOICES)
    return parsed.questions, parsed.strict


TOLERATED = {
    "fenced": f"```json\n{json.dumps(ASKED)}\n```",
    "fenced without a language": f"```\n{json.dumps(ASKED, indent=2)}\n```",
    "prose before": f"Here are the questions:\n{json.dumps(ASKED)}",
    "prose after": f"{json.dumps(ASKED)}\n\nI hope that helps!",
    "fenced amid prose with braces": f"In {{lua}} one asks:\n```json\n{json.dumps(ASKED)}\n```\nDone.",
    "a list": json.dumps(ASKED["questions"]),
    "more fields": json.dumps({**ASKED, "note": "as you wished"}),
    "a list, and voices in capitals": json.dumps(ASKED["questions"]).replace("beginner", "Beginner "),
    "a byte order mark": "\ufeff" + json.dumps(ASKED),
}


def test_a_reply_as_asked_for_is_strict() -> None:
    assert parse(json.dumps(ASKED)) == (TWO, True)


@pytest.mark.parametrize("case", TOLERATED)
def test_what_models_write_instead_is_read(case: str) -> None:
    """Prevents throwing away what was paid for because of a fence or a greeting."""
    assert parse(TOLERATED[case]) == (TWO, False)


def test_one_object_stands_for_a_list_of_one() -> None:
    one = {"voice": "developer", "question": "Why?"}
    assert parse(json.dumps(one)) == (TWO[1:], False)
    assert parse(json.dumps({"questions": one})) == (TWO[1:], False)


REFUSED = {
    "prose": ("I would ask how to sort a table.", "end_turn", "no JSON in it"),
    "nothing": ("  \n", "end_turn", "empty"),
    "other JSON": ('{"answer": 42}', "end_turn", "no JSON in it"),
    "no questions": ('{"questions": []}', "end_turn", "JSON without questions"),
    "empty questions": ('{"questions": [{"voice": "beginner", "question": " "}]}', "end_turn", "an empty question"),
    "cut off": (json.dumps(ASKED)[:40], "max_tokens", "cut off at max_tokens"),
    "a refusal": (json.dumps(ASKED), "refusal", "the model refused"),
    "another voice": ('{"questions": [{"voice": "pirate", "question": "Arr?"}]}', "end_turn", "a question in no voice"),
    "deep nonsense": ("[" * 100_000, "end_turn", "no JSON in it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_reply_that_holds_nothing_says_why(case: str) -> None:
    text, stop_reason, why = REFUSED[case]
    with pytest.raises(UnusableReplyError, match=why):
        parse(text, stop_reason)


def test_a_whole_reply_that_met_max_tokens_is_read() -> None:
    assert parse(json.dumps(ASKED), "max_tokens") == (TWO, True)


def test_a_bad_question_does_not_take_the_good_ones_with_it() -> None:
    mixed = {"questions": [*ASKED["questions"], {"voice": "pirate", "question": "Arr?"}]}
    parsed = parse_reply(json.dumps(mixed), stop_reason="end_turn", voices=VOICES)
    assert parsed.questions == TWO
    assert parsed.problems == ("a question in no voice that was asked for",)


@given(st.text(max_size=200) | st.text(alphabet='{}[]":, \\`questionvce\n', max_size=120))
def test_no_text_breaks_the_parser(text: str) -> None:
    with suppress(UnusableReplyError):
        questions, _ = parse(text)
        assert all(question.voice in VOICES and question.text for question in questions)


PRICE = find_price("claude-haiku-4-5")
MESSAGE = {
    "type": "message",
    "content": [
        {"type": "thinking", "thinking": "hm"},
        {"type": "text", "text": "one "},
        {"type": "text", "text": "two"},
    ],
    "model": "m",
    "stop_reason": "end_turn",
    "usage": {"input_tokens": 10, "output_tokens": 2},
}


def line(result: object) -> bytes:
    return json.dumps({"custom_id": "x", "result": result}).encode()


def test_results_are_read_by_their_type() -> None:
    assert read_result(line({"type": "expired"}), price=PRICE) == ("x", Failure("expired"))
    assert read_result(line({"type": "canceled"}), price=PRICE) == ("x", Failure("canceled"))
    custom_id, reply = read_result(line({"type": "succeeded", "message": MESSAGE}), price=PRICE)
    assert custom_id == "x"
    assert isinstance(reply, Reply)
    assert (reply.text, reply.cost, reply.stop_reason) == ("one two", (10 * 1000 + 2 * 5000) // 2, "end_turn")


@pytest.mark.parametrize(
    "kind, final",
    [("invalid_request_error", True), ("api_error", False), ("overloaded_error", False), ("something_new", False)],
)
def test_an_error_of_the_request_is_final_and_one_of_the_service_is_not(kind: str, final: bool) -> None:
    """Prevents sending what can never work again and again, and giving up on a bad hour."""
    framed = {"type": "errored", "error": {"type": "error", "error": {"type": kind, "message": "so"}}}
    bare = {"type": "errored", "error": {"type": kind, "message": "so"}}
    expected = ("x", Failure("errored", f"{kind}: so", final=final))
    assert read_result(line(framed), price=PRICE) == read_result(line(bare), price=PRICE) == expected


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"[]", b"null", b'{"custom_id": 5, "result": {}}', b'{"custom_id": "x"}', b"\xff\xfe",
        line({"type": "succeeded"}), line({"type": "lost"}), b"[" * 100_000,
    ],
)  # fmt: skip
def test_a_spoilt_line_is_no_answer(data: bytes) -> None:
    with pytest.raises(UnreadableResultError):
        read_result(data, price=PRICE)


def test_a_message_without_usage_has_no_known_cost() -> None:
    assert read_message({**MESSAGE, "usage": None}, price=PRICE, batch=True).cost is None
