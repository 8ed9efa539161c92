"""The row formats people have, told apart by their fields and turned into messages.

A parser takes one decoded JSON object and returns messages or a text, or raises `FieldError` naming the field, what was
there and what was expected. Knows nothing of files, tokens or templates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from model_foundry.types import Message

ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_KINDS = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}


class FieldError(Exception):
    """One field of one row is not what the format wants."""

    def __init__(self, field: str, found: str, expected: str) -> None:
        super().__init__(f"{field}: {found} where {expected} was expected")


class Parsed:
    """What a row holds: messages (and tools a template may show), or a text; and the fields that were read."""

    def __init__(
        self,
        messages: Sequence[Message] = (),
        *,
        text: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        read: frozenset[str],
    ) -> None:
        self.messages = tuple(messages)
        self.text = text
        self.tools = None if tools is None else tuple(tools)
        self.read = read


def describe(value: Any) -> str:
    """What a value is, in words, short enough for an error."""
    kind = _KINDS.get(type(value), "a number")
    if value is None or isinstance(value, (dict, list)):
        return kind
    shown = repr(value)
    return f"{kind} ({shown if len(shown) <= 40 else shown[:37] + '…'})"


def detect_format(row: Mapping[str, Any]) -> str | None:
    """The format whose fields the row has, or None."""
    if "messages" in row:
        return "messages"
    if "conversations" in row:
        turns = row["conversations"]
        first = turns[0] if isinstance(turns, list) and turns else None
        return "sharegpt" if isinstance(first, dict) and "from" in first else "messages"
    if "instruction" in row and "output" in row:
        return "alpaca"
    if "prompt" in row and "completion" in row:
        return "prompt_completion"
    if ("input" in row and "output" in row) or ("question" in row and "answer" in row):
        return "input_output"
    return "text" if "text" in row else None


def parse_messages(row: Mapping[str, Any]) -> Parsed:
    """{"messages": [{"role", "content"}]}, or the same under "conversations"; "tools" go to the template."""
    key = "messages" if "messages" in row or "conversations" not in row else "conversations"
    messages = _message_list(_field(row, key, list, "a list of messages"), key)
    tools = row.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise FieldError("tools", describe(tools), "a list of objects")
    return Parsed(messages, tools=tools or None, read=frozenset({key, "tools"}))


def parse_sharegpt(row: Mapping[str, Any]) -> Parsed:
    """{"conversations": [{"from": "human" | "gpt" | …, "value"}]}, optional "system"."""
    turns = _field(row, "conversations", list, "a list of turns")
    messages = _optional_system(row)
    for index, turn in enumerate(turns):
        place = f"conversations[{index}]"
        if not isinstance(turn, dict):
            raise FieldError(place, describe(turn), 'an object with "from" and "value"')
        name = _field(turn, "from", str, "text", place=place)
        if name not in _SHAREGPT_ROLES:
            raise FieldError(f"{place}.from", describe(name), f"one of {', '.join(_SHAREGPT_ROLES)}")
        messages.append(Message(_SHAREGPT_ROLES[name], _field(turn, "value", str, "text", place=place)))
    _require_turns(messages, "conversations")
    return Parsed(messages, read=frozenset({"conversations", "system"}))


def parse_alpaca(row: Mapping[str, Any]) -> Parsed:
    """{"instruction", "input", "output"}, optional "system" and "history" of [question, answer] pairs.

    A chat template sees instruction and input as one message, a line apart; the Alpaca template sees both fields.
    """
    messages = _optional_system(row)
    history = row.get("history") or []
    if not isinstance(history, list):
        raise FieldError("history", describe(history), "a list of [question, answer] pairs")
    for index, pair in enumerate(history):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise FieldError(f"history[{index}]", describe(pair), "a pair [question, answer] of texts")
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    instruction = _field(row, "instruction", str, "text")
    given = row.get("input") or ""
    if not isinstance(given, str):
        raise FieldError("input", describe(given), "text")
    if given:
        extra = {"instruction": instruction, "input": given}
        messages.append(Message("user", f"{instruction}\n{given}", extra))
    else:
        messages.append(Message("user", instruction))
    messages.append(Message("assistant", _field(row, "output", str, "text")))
    return Parsed(messages, read=frozenset({"instruction", "input", "output", "system", "history"}))


def parse_input_output(row: Mapping[str, Any]) -> Parsed:
    """{"input", "output"} or {"question", "answer"}, optional "system"."""
    asked, answered = ("question", "answer") if "question" in row and "input" not in row else ("input", "output")
    messages = _optional_system(row)
    messages.append(Message("user", _field(row, asked, str, "text")))
    messages.append(Message("assistant", _field(row, answered, str, "text")))
    return Parsed(messages, read=frozenset({asked, answered, "system"}))


def parse_prompt_completion(row: Mapping[str, Any]) -> Parsed:
    """{"prompt", "completion"}: texts (a question and an answer), or lists of messages."""
    prompt = _side(row, "prompt", "user")
    completion = _side(row, "completion", "assistant")
    if not completion:
        raise FieldError("completion", "an empty list", "at least one message")
    return Parsed([*_optional_system(row), *prompt, *completion], read=frozenset({"prompt", "completion", "system"}))


def parse_text(row: Mapping[str, Any]) -> Parsed:
    """{"text"}: plain text, trained on throughout."""
    text = _field(row, "text", str, "text")
    if not text:
        raise FieldError("text", "an empty text", "at least one character")
    return Parsed(text=text, read=frozenset({"text"}))


PARSERS: dict[str, Callable[[Mapping[str, Any]], Parsed]] = {
    "messages": parse_messages,
    "sharegpt": parse_sharegpt,
    "alpaca": parse_alpaca,
    "input_output": parse_input_output,
    "prompt_completion": parse_prompt_completion,
    "text": parse_text,
}


def _field(row: Mapping[str, Any], key: str, kind: type, expected: str, *, place: str = "") -> Any:
    name = f"{place}.{key}" if place else key
    if key not in row:
        raise FieldError(name, "nothing", expected)
    if not isinstance(row[key], kind):
        raise FieldError(name, describe(row[key]), expected)
    return row[key]


def _optional_system(row: Mapping[str, Any]) -> list[Message]:
    system = row.get("system") or ""
    if not isinstance(system, str):
        raise FieldError("system", describe(system), "text")
    return [Message("system", system)] if system else []


def _side(row: Mapping[str, Any], key: str, role: str) -> list[Message]:
    value = row.get(key)
    if isinstance(value, str):
        return [Message(role, value)]
    return _message_list(_field(row, key, list, "text or a list of messages"), key)


def _message_list(items: list[Any], key: str) -> list[Message]:
    _require_turns(items, key)
    return [_message(item, f"{key}[{index}]") for index, item in enumerate(items)]


def _require_turns(items: Sequence[Any], key: str) -> None:
    if not items:
        raise FieldError(key, "an empty list", "at least one message")


def _message(item: Any, place: str) -> Message:
    if not isinstance(item, dict):
        raise FieldError(place, describe(item), 'an object with "role" and "content"')
    role = _field(item, "role", str, "text", place=place)
    if role not in ROLES:
        raise FieldError(f"{place}.role", describe(role), f"one of {', '.join(ROLES)}")
    extra = {key: value for key, value in item.items() if key not in ("role", "content") and value is not None}
    if item.get("content") is None and "tool_calls" in extra:
        return Message(role, "", extra)  # OpenAI's way to say that a turn only calls tools
    return Message(role, _content(item, place), extra)


def _content(item: Mapping[str, Any], place: str) -> str:
    content = item.get("content")
    if isinstance(content, list):
        return "".join(_text_part(part, f"{place}.content[{index}]") for index, part in enumerate(content))
    return _field(item, "content", str, "text", place=place)


def _text_part(part: Any, place: str) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise FieldError(place, describe(part), 'a text part {"type": "text", "text": …}')
    return text
