"""Filters: what each refuses, what it must not refuse, and that every row stands in exactly one count."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_foundry.data.code import LANGUAGES, read_corpus
from model_foundry.data.filters import (
    Filter,
    apply_filters,
    length,
    open_bracket,
    refusal,
    required,
    syntax,
    truncation,
)
from model_foundry.errors import DataError

CODE = Path(__file__).parents[3] / "examples" / "code"

REFUSALS = [
    "I'm sorry, but I can't help with that.",
    "I’m sorry, but I cannot assist with this request.",
    "I cannot provide that information.",
    "I can't assist.",
    "**I cannot comply.**",
    "As an AI language model, I do not have access to files.",
    "Unfortunately, I am unable to assist you with that.",
    "Sorry, I can't help with that.",
    "Sorry, but I won't write that kind of content",
    "I must respectfully decline this request.",
    "I apologize, but I cannot generate questions for this.",
    "I’m afraid I can’t do that.",
    "I'm not able to create content that harms.",
    "This request violates my guidelines.",
    '"I won\'t engage with this."',
]
NO_REFUSALS = [
    "I can't get my sector script to spawn pirates, what am I missing?",
    "I can't create a fighter squad from Lua. How?",
    "I cannot write to the file in Godot 4, how do I save?",
    "I cannot provide a NodePath here, which alternative is there?",
    "I can't give the player an item from the server",
    "I can't help noticing that the timer fires twice",
    "I can't continue the loop in Lua; how do I skip an iteration?",
    "I won't use signals; how do I poll?",
    "I'm sorry to bother you, how can I connect a signal?",
    "I'm afraid of losing saves; write a backup function",
    "Sorry, I can't figure out how to spawn a ship",
    "I have to decline trade offers from pirates, how?",
    "How do I write \"I'm sorry, but I can't help with that\" into the chat?",
    "As an example, write a function that spawns three ships.",
    "Unfortunately my turret list is empty. Why?",
    "",
]


@pytest.mark.parametrize("text", REFUSALS)
def test_a_refusal_is_told_by_its_start(text: str) -> None:
    reason = refusal("question")({"question": text})
    assert reason is not None
    assert reason.startswith("question begins as a refusal: ")


@pytest.mark.parametrize("text", NO_REFUSALS)
def test_a_question_of_somebody_who_cannot_do_something_is_kept(text: str) -> None:
    """Users say "I can't" all the time: a loose pattern would drop exactly the troubled questions."""
    assert refusal("question")({"question": text}) is None


def test_the_api_s_own_word_for_a_refusal_counts() -> None:
    assert refusal("text")({"text": "", "stop_reason": "refusal"}) == "stop_reason is refusal"


CUT = {
    "Write a function that takes a ship,": "text breaks off",
    "Write a function that counts the": "text breaks off",
    "Here it is:\n```lua\nlocal x = 1\n": "text has a code fence that is never closed",
    "word " * 100 + "and then sudde": "text ends without a closing mark",
}
WHOLE = [
    "how do i register a callback",
    "Which sector is it in",
    "word " * 100 + "and then it ends.",
    "word " * 100 + "\n- and a list item",
    "```lua\nlocal x = 1\n```",
    "Ask „wirklich?“",
    "",
]


@pytest.mark.parametrize("text", CUT)
def test_prose_that_was_cut_off(text: str) -> None:
    assert (truncation("text")({"text": text}) or "").startswith(CUT[text])


@pytest.mark.parametrize("text", WHOLE)
def test_prose_that_ends_casually_is_whole(text: str) -> None:
    assert truncation("text")({"text": text, "stop_reason": "end_turn"}) is None


def test_a_reply_at_its_token_limit_is_cut_whatever_it_looks_like() -> None:
    assert truncation("text")({"text": "Fine.", "stop_reason": "max_tokens"}) == "stop_reason is max_tokens"


BRACKETS = [
    ("lua", "f(a[1], {x = '('}, #t) -- ((", None),
    ("lua", "s = [[ ( ]] .. [==[ [ ]] ( ]==]", None),
    ("lua", "--[[ ( \n ( ]] f()", None),
    ("lua", "s = 'it\\'s (' f()", None),
    ("lua", "s = 'a (\\z\n  b' f()", None),
    ("lua", "a[b[1]](x", "leaves '(' of line 1 open"),
    ("lua", "f(\n{a = 1,\n", "leaves '{' of line 2 open"),
    ("gdscript", 'var x = """ ( """ # (\nf("(")', None),
    ("gdscript", "var x = [\n\t1,", "leaves '[' of line 1 open"),
]


@pytest.mark.parametrize("language, code, problem", BRACKETS)
def test_open_brackets_outside_strings_and_comments(language: str, code: str, problem: str | None) -> None:
    assert open_bracket(code, LANGUAGES[language]) == problem


@pytest.mark.parametrize("language", ["lua", "gdscript"])
def test_real_code_passes_and_its_beginning_does_not(language: str) -> None:
    whole, grammar = truncation("code", language=language), syntax("code", language)
    units = list(read_corpus([CODE / language], language).units)
    for unit in units:
        assert (whole({"code": unit.code}), grammar({"code": unit.code})) == (None, None), unit.place
    called = next(unit.code for unit in units if unit.num_lines > 5 and "(" in unit.code)
    cut = called[: called.rindex("(") + 1]
    assert (whole({"code": cut}) or "").startswith("code leaves '('")
    assert (grammar({"code": cut}) or "").startswith("code, line ")


def test_lengths_and_missing_fields() -> None:
    check = length("q", min_chars=3, max_chars=10, max_lines=2)
    assert check({"q": "  ab "}) == "q has 2 characters, fewer than 3"
    assert check({"q": "abc"}) is None
    assert check({"q": "a" * 11}) == "q has 11 characters, more than 10"
    assert check({"q": "a\nb\nc"}) == "q has 3 lines, more than 2"
    check = required("q", "a")
    assert check({"q": "x", "a": 0}) is None
    assert check({"q": "x"}) == "a is missing"
    assert check({"q": " \n", "a": "y"}) == "q is empty"
    assert check({"q": None, "a": "y"}) == "q is empty"


def test_a_filter_for_an_unknown_language_fails_at_once() -> None:
    """Not at the first row, which may come after hours."""
    with pytest.raises(DataError, match="no language 'c'"):
        syntax("code", "c")
    with pytest.raises(DataError, match="no language 'c'"):
        truncation("code", language="c")


def test_the_first_filter_that_refuses_is_counted_and_all_are_named() -> None:
    rows = [{"q": "fine"}, {"q": ""}, {}, {"q": "x" * 50}, {"q": "also fine"}]
    kept, report = apply_filters(
        rows, {"missing": required("q"), "length": length("q", max_chars=20), "cut": truncation("q")}
    )
    assert kept == [rows[0], rows[4]]
    assert report.as_dict() == {
        "num_rows": 5,
        "num_kept": 2,
        "rejected": {"missing": 2, "length": 1, "cut": 0},
        "examples": {
            "missing": ["row 2: q is empty", "row 3: q is missing"],
            "length": ["row 4: q has 50 characters, more than 20"],
        },
    }


@given(st.lists(st.fixed_dictionaries({"n": st.integers(0, 9)}), max_size=30), st.lists(st.integers(0, 9), max_size=4))
def test_every_row_is_kept_or_counted_once(rows: list[dict[str, int]], refused: list[int]) -> None:
    def refuse(number: int) -> Filter:
        return lambda row: "it is so" if row["n"] == number else None

    kept, report = apply_filters(iter(rows), {f"{i}: {number}": refuse(number) for i, number in enumerate(refused)})
    assert kept == [row for row in rows if row["n"] not in refused]
    assert report.num_rows == len(rows)
    assert report.num_kept + sum(report.rejected.values()) == len(rows)
