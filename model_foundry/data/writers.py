"""A row in the fields of a format: the way back of `formats`.

What a format has no place for at all is an error with its reason; what it can only hold in part is written as far as
it goes, and `differences` says what reading it back would give otherwise. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson

from model_foundry.data.rows import Row
from model_foundry.types import Message

_SHAREGPT_NAMES = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}


class CannotHoldError(Exception):
    """A format has no place for this row; the reason is the same words for all rows of a kind."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def write_messages(row: Row) -> dict[str, Any]:
    """{"messages"} and "tools"."""
    return {"messages": _turns(_conversation(row)), **_tools(row)}


def write_sharegpt(row: Row) -> dict[str, Any]:
    """{"conversations"}, "system" and "tools"; a call becomes a turn by `function_call` that holds it as JSON."""
    messages = _conversation(row)
    system, rest = _leading_system(messages)
    turns = [turn for message in rest for turn in _sharegpt_turns(message)]
    if not turns:
        raise CannotHoldError("there is no turn but the system's")
    return {"conversations": turns, **({"system": system} if system else {}), **_tools(row)}


def write_alpaca(row: Row) -> dict[str, Any]:
    """{"instruction", "input", "output"}, with earlier turns as "history"."""
    system, rest = _leading_system(_conversation(row))
    pairs = _pairs(rest)
    *earlier, (question, answer) = pairs
    fields = {"instruction": question.content, "input": ""}
    if isinstance(question.extra.get("instruction"), str) and isinstance(question.extra.get("input"), str):
        fields = {"instruction": question.extra["instruction"], "input": question.extra["input"]}
    history = [[asked.content, answered.content] for asked, answered in earlier]
    return {
        **fields,
        "output": answer.content,
        **({"system": system} if system else {}),
        **({"history": history} if history else {}),
    }


def write_input_output(row: Row) -> dict[str, Any]:
    """{"input", "output"} and "system": one question and one answer."""
    system, rest = _leading_system(_conversation(row))
    pairs = _pairs(rest)
    if len(pairs) != 1:
        raise CannotHoldError("more than one question and answer")
    question, answer = pairs[0]
    return {"input": question.content, "output": answer.content, **({"system": system} if system else {})}


def write_prompt_completion(row: Row) -> dict[str, Any]:
    """{"prompt", "completion"} as lists of messages, which say who speaks where plain texts leave it open."""
    prompt, completion = _prompt_and_answer(_conversation(row))
    return {"prompt": _turns(prompt), "completion": _turns(completion), **_tools(row)}


def write_text(row: Row) -> dict[str, Any]:
    """{"text"}."""
    if row.text is None:
        raise CannotHoldError("a conversation becomes a text only through a chat template")
    return {"text": row.text}


def write_preference(row: Row) -> dict[str, Any]:
    """{"prompt", "chosen", "rejected"} as lists of messages."""
    if not row.chosen:
        raise CannotHoldError("there is only one answer, and a pair needs two")
    return {
        "prompt": _turns(row.messages),
        "chosen": _turns(row.chosen),
        "rejected": _turns(row.rejected),
        **_tools(row),
    }


def write_kto(row: Row) -> dict[str, Any]:
    """{"prompt", "completion", "label"}, the first two as lists of messages."""
    if row.label is None:
        raise CannotHoldError("nothing says whether the answer is a good one")
    prompt, completion = _prompt_and_answer(row.messages)
    return {"prompt": _turns(prompt), "completion": _turns(completion), "label": row.label, **_tools(row)}


WRITERS: dict[str, Callable[[Row], dict[str, Any]]] = {
    "messages": write_messages,
    "sharegpt": write_sharegpt,
    "alpaca": write_alpaca,
    "input_output": write_input_output,
    "prompt_completion": write_prompt_completion,
    "text": write_text,
    "preference": write_preference,
    "kto": write_kto,
}


def unpaired(row: Row) -> tuple[Row, Row]:
    """A preference pair as two KTO rows, the good answer first."""
    good = Row((*row.messages, *row.chosen), source=row.source, tools=row.tools, label=True)
    return good, Row((*row.messages, *row.rejected), source=row.source, tools=row.tools, label=False)


def differences(row: Row, other: Row) -> list[str]:
    """What two rows hold differently, apart from where they come from; none when they are the same row."""
    found = []
    if row.text != other.text:
        found.append("the text")
    for name, before, after in (
        ("the turns", row.messages, other.messages),
        ("the chosen answer", row.chosen, other.chosen),
        ("the rejected answer", row.rejected, other.rejected),
    ):
        found += _turn_differences(name, before, after)
    if row.tools != other.tools:
        found.append("the tools")
    if row.label != other.label:
        found.append("the label")
    return found


def _turn_differences(name: str, before: Sequence[Message], after: Sequence[Message]) -> list[str]:
    if len(before) != len(after):
        return [name]
    found = []
    for old, new in zip(before, after, strict=True):
        if (old.role, old.content) != (new.role, new.content):
            return [name]
        lost = sorted(key for key in old.extra.keys() | new.extra.keys() if old.extra.get(key) != new.extra.get(key))
        found += [f"the field '{key}' of a turn" for key in lost if f"the field '{key}' of a turn" not in found]
    return found


def _conversation(row: Row) -> tuple[Message, ...]:
    if row.text is not None:
        raise CannotHoldError("a plain text has no turns")
    if row.label is False:
        raise CannotHoldError("an answer labelled as bad would be learned as a good one")
    return (*row.messages, *row.chosen)


def _leading_system(messages: Sequence[Message]) -> tuple[str, Sequence[Message]]:
    """The system message and the rest; one that the field "system" cannot hold stays among the turns."""
    if messages and messages[0].role == "system" and messages[0].content and not messages[0].extra:
        return messages[0].content, messages[1:]
    return "", messages


def _pairs(messages: Sequence[Message]) -> list[tuple[Message, Message]]:
    roles = [message.role for message in messages]
    if not messages or roles != ["user", "assistant"] * (len(roles) // 2):
        raise CannotHoldError("the turns are not questions and answers in turn")
    if any(message.extra.get("tool_calls") for message in messages):
        raise CannotHoldError("a turn calls a tool")
    return list(zip(messages[::2], messages[1::2], strict=True))


def _prompt_and_answer(messages: Sequence[Message]) -> tuple[Sequence[Message], Sequence[Message]]:
    if messages[-1].role != "assistant":
        raise CannotHoldError("the last turn is not an answer")
    if len(messages) == 1:
        raise CannotHoldError("there is nothing before the answer")
    return messages[:-1], messages[-1:]


def _turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [message.as_dict() for message in messages]


def _sharegpt_turns(message: Message) -> list[dict[str, str]]:
    calls = message.extra.get("tool_calls") if message.role == "assistant" else None
    turns = [{"from": _SHAREGPT_NAMES[message.role], "value": message.content}] if message.content or not calls else []
    if calls:
        written = [call.get("function", call) if isinstance(call, Mapping) else call for call in calls]
        value = written[0] if len(written) == 1 else written
        turns.append({"from": "function_call", "value": orjson.dumps(value).decode()})
    return turns


def _tools(row: Row) -> dict[str, Any]:
    return {"tools": list(row.tools)} if row.tools else {}
