"""Preference pairs, labelled answers and tools, in the spellings that people's files have."""

from __future__ import annotations

import json
from typing import Any

import pytest

from model_foundry.data.formats import PARSERS, FieldError, Parsed, detect_format
from model_foundry.types import Message

Q, A, B = (
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a"},
    {"role": "assistant", "content": "b"},
)
USER, GOOD, BAD = Message("user", "q"), Message("assistant", "a"), Message("assistant", "b")
SYSTEM = Message("system", "s")


def parse(row: dict[str, Any]) -> Parsed:
    name = detect_format(row)
    assert name is not None
    return PARSERS[name](row)


@pytest.mark.parametrize(
    "row, prompt",
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, (USER,)),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "system": "s"}, (SYSTEM, USER)),
        ({"prompt": [Q], "chosen": [A], "rejected": [B]}, (USER,)),
        ({"prompt": "q", "chosen": [Q, A], "rejected": [Q, B]}, (USER,)),
        ({"chosen": [Q, A], "rejected": [Q, B]}, (USER,)),
        ({"chosen": [Q, A, Q, A], "rejected": [Q, A, Q, B]}, (USER, GOOD, USER)),
        ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}, (USER,)),
        (
            {
                "conversations": [{"from": "human", "value": "q"}],
                "chosen": {"from": "gpt", "value": "a"},
                "rejected": {"from": "gpt", "value": "b"},
            },
            (USER,),
        ),
        ({"messages": [Q], "chosen": A, "rejected": B}, (USER,)),
        ({"instruction": "q", "input": "", "chosen": "a", "rejected": "b"}, (USER,)),
    ],
)
def test_pairs_in_every_spelling(row: dict[str, Any], prompt: tuple[Message, ...]) -> None:
    """Prevents the prompt from being learned as a part of the answer, and the two answers from being swapped."""
    parsed = parse(row)
    assert detect_format(row) == "preference"
    assert parsed.messages == prompt
    assert (parsed.chosen[-1], parsed.rejected[-1]) == (GOOD, BAD)
    assert len(parsed.chosen) == len(parsed.rejected) == 1
    assert parsed.read >= row.keys()


def test_equal_answers_stay_a_pair_for_the_gate_to_refuse() -> None:
    parsed = parse({"chosen": [Q, A], "rejected": [Q, A]})
    assert (parsed.messages, parsed.chosen, parsed.rejected) == ((USER,), (GOOD,), (GOOD,))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "completion": "a", "label": False},
        {"prompt": [Q], "completion": [A], "label": False},
        {"messages": [Q, A], "label": False},
        {"messages": [Q, A], "kto_tag": False},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "kto_tag": False},
        {"instruction": "q", "input": "", "output": "a", "kto_tag": False},
    ],
)
def test_labelled_answers_in_every_spelling(row: dict[str, Any]) -> None:
    """Prevents an answer that is labelled bad from being read as one to imitate."""
    parsed = parse(row)
    assert detect_format(row) == "kto"
    assert (parsed.messages, parsed.label) == ((USER, GOOD), False)
    assert parsed.read >= row.keys()


def test_a_label_that_is_a_topic_is_no_judgement() -> None:
    assert detect_format({"messages": [Q, A], "label": "sports"}) == "messages"
    assert detect_format({"text": "x", "label": True}) == "text"


TOOLS = [{"name": "bmi", "description": "d", "parameters": {}}]


def test_calls_and_answers_of_tools_in_sharegpt() -> None:
    """Prevents a call from being shown to the model as the assistant's words, and tools from being lost."""
    turns = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "bmi", "arguments": {"kg": 70}}'},
        {"from": "observation", "value": '{"bmi": 21}'},
        {"from": "gpt", "value": "a"},
    ]
    parsed = parse({"conversations": turns, "tools": json.dumps(TOOLS)})
    call = {"type": "function", "function": {"name": "bmi", "arguments": {"kg": 70}}}
    assert parsed.messages == (
        USER, Message("assistant", "", {"tool_calls": [call]}), Message("tool", '{"bmi": 21}'), GOOD,
    )  # fmt: skip
    assert parsed.tools == tuple(TOOLS)
    assert parse({"messages": [Q, A], "tools": json.dumps(TOOLS)}).tools == tuple(TOOLS)
    assert parse({"messages": [Q, A], "tools": ""}).tools is None
    several = [{"name": "f", "arguments": '{"x": 1}'}, {"name": "g"}]
    parsed = parse({"conversations": [{"from": "function_call", "value": json.dumps(several)}]})
    assert [call["function"] for call in parsed.messages[0].extra["tool_calls"]] == [
        {"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {}},
    ]  # fmt: skip


@pytest.mark.parametrize(
    "row, problem",
    [
        ({"prompt": "q", "chosen": "a", "rejected": 5}, r"rejected: a number \(5\) where text, a turn"),
        ({"prompt": "q", "chosen": [], "rejected": "b"}, "chosen: an empty list where at least one message"),
        ({"prompt": "q", "chosen": [Q], "rejected": "b"}, "chosen: no answer where a turn by the assistant"),
        ({"prompt": [A], "chosen": [Q], "rejected": "b"}, "chosen: a turn by the user where"),
        ({"chosen": "a", "rejected": "b"}, "prompt: nothing where a text or a list of messages, or answers that are"),
        ({"chosen": [Q, A], "rejected": [A]}, "rejected: a conversation that begins otherwise where one"),
        ({"prompt": "q", "completion": "a", "label": 1}, r"label: a number \(1\) where true or false"),
        ({"prompt": "q", "completion": [A, Q], "label": True}, "completion: a last turn by the user where"),
        ({"kto_tag": True, "text": "x"}, "prompt: nothing where a text or a list of messages, and a completion"),
        ({"conversations": [{"from": "function_call", "value": "f(x)"}]}, r"\.value: text \('f\(x\)'\) where a"),
        ({"conversations": [{"from": "function_call", "value": "[]"}]}, r"\.value: text .* where a function call"),
        ({"messages": [Q, A], "tools": "[1]"}, r"tools: text \('\[1\]'\) where a list of objects"),
        ({"messages": [{**A, "tool_calls": "x"}]}, r"tool_calls: text \('x'\) where a list of calls"),
    ],
)  # fmt: skip
def test_wrong_fields_are_named(row: dict[str, Any], problem: str) -> None:
    with pytest.raises(FieldError, match=problem):
        parse(row)
