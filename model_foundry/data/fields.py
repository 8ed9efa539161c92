"""Reading one field of one row: the right kind of value, or an error that says what was there instead.

The pieces that every row format is put together from: texts, turns, tool descriptions. Knows no format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from model_foundry.types import Message

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
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
_CALL = 'a function call as JSON, {"name", "arguments"}'


class FieldError(Exception):
    """One field of one row is not what the format wants."""

    def __init__(self, field: str, found: str, expected: str) -> None:
        super().__init__(f"{field}: {found} where {expected} was expected")


def describe(value: Any) -> str:
    """What a value is, in words, short enough for an error."""
    kind = _KINDS.get(type(value), "a number")
    if value is None or isinstance(value, (dict, list)):
        return kind
    shown = repr(value)
    return f"{kind} ({shown if len(shown) <= 40 else shown[:37] + '…'})"


def field_of(row: Mapping[str, Any], key: str, kind: type, expected: str, *, place: str = "") -> Any:
    """The value under `key`.

    Raises:
        FieldError: there is none, or it is of another kind.
    """
    name = f"{place}.{key}" if place else key
    if key not in row:
        raise FieldError(name, "nothing", expected)
    if not isinstance(row[key], kind):
        raise FieldError(name, describe(row[key]), expected)
    return row[key]


def optional_system(row: Mapping[str, Any]) -> list[Message]:
    """The field "system" as a message, none where it is absent or empty."""
    system = row.get("system") or ""
    if not isinstance(system, str):
        raise FieldError("system", describe(system), "text")
    return [Message("system", system)] if system else []


def optional_tools(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The field "tools": a list of objects, or that list as JSON text; None where it is absent or empty."""
    tools = given = row.get("tools")
    if isinstance(given, str):
        try:
            tools = orjson.loads(given) if given.strip() else None
        except orjson.JSONDecodeError:
            tools = given
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise FieldError("tools", describe(given), "a list of objects")
    return tools or None


def message_list(items: Sequence[Any], key: str) -> list[Message]:
    """Turns of {"role", "content"}."""
    require_turns(items, key)
    made = []
    for index, item in enumerate(items):
        # Nearly all turns are just these two, and no words for errors need be made.
        if isinstance(item, dict) and len(item) == 2:
            role, content = item.get("role"), item.get("content")
            if isinstance(content, str) and role in ROLES:
                made.append(Message(role, content))
                continue
        made.append(message(item, f"{key}[{index}]"))
    return made


def require_turns(items: Sequence[Any], key: str) -> None:
    if not items:
        raise FieldError(key, "an empty list", "at least one message")


def message(item: Any, place: str) -> Message:
    """One turn of {"role", "content"}; what else it holds goes to the template."""
    if not isinstance(item, dict):
        raise FieldError(place, describe(item), 'an object with "role" and "content"')
    role = field_of(item, "role", str, "text", place=place)
    if role not in ROLES:
        raise FieldError(f"{place}.role", describe(role), f"one of {', '.join(ROLES)}")
    extra = {key: value for key, value in item.items() if key not in ("role", "content") and value is not None}
    if isinstance(extra.get("tool_calls"), str):
        extra["tool_calls"] = _json_calls(extra["tool_calls"], f"{place}.tool_calls")
    if item.get("content") is None and "tool_calls" in extra:
        return Message(role, "", extra)  # OpenAI's way to say that a turn only calls tools
    return Message(role, _content(item, place), extra)


def sharegpt_message(turn: Any, place: str) -> Message:
    """One turn of {"from", "value"}; a `function_call` holds the call as JSON, as LLaMA-Factory writes it."""
    if not isinstance(turn, dict):
        raise FieldError(place, describe(turn), 'an object with "from" and "value"')
    name = field_of(turn, "from", str, "text", place=place)
    if name not in SHAREGPT_ROLES:
        raise FieldError(f"{place}.from", describe(name), f"one of {', '.join(SHAREGPT_ROLES)}")
    value = field_of(turn, "value", str, "text", place=place)
    if name == "function_call":
        return Message("assistant", "", {"tool_calls": _written_calls(value, f"{place}.value")})
    return Message(SHAREGPT_ROLES[name], value)


def any_message(item: Any, place: str) -> Message:
    """One turn in either spelling."""
    return sharegpt_message(item, place) if isinstance(item, dict) and "from" in item else message(item, place)


def _content(item: Mapping[str, Any], place: str) -> str:
    content = item.get("content")
    if isinstance(content, list):
        return "".join(_text_part(part, f"{place}.content[{index}]") for index, part in enumerate(content))
    return field_of(item, "content", str, "text", place=place)


def _text_part(part: Any, place: str) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise FieldError(place, describe(part), 'a text part {"type": "text", "text": …}')
    return text


def _json_calls(text: str, place: str) -> list[Any]:
    """The calls of a Parquet or CSV column that holds them as JSON."""
    try:
        calls = orjson.loads(text)
    except orjson.JSONDecodeError:
        calls = None
    if not isinstance(calls, list):
        raise FieldError(place, describe(text), "a list of calls, or that list as JSON")
    return calls


def _written_calls(text: str, place: str) -> list[dict[str, Any]]:
    """{"name", "arguments"}, or a list of these, as the `tool_calls` that templates read."""
    try:
        written = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise FieldError(place, describe(text), _CALL) from error
    calls = []
    for call in written if isinstance(written, list) and written else [written]:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise FieldError(place, describe(text), _CALL)
        arguments = call.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = orjson.loads(arguments)
            except orjson.JSONDecodeError as error:
                raise FieldError(place, describe(text), _CALL) from error
        calls.append({"type": "function", "function": {"name": call["name"], "arguments": arguments}})
    return calls
