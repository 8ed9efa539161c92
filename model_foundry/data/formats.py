"""The row formats people have, told apart by their fields and turned into messages.

A parser takes one decoded JSON object and returns messages or a text, or raises `FieldError` naming the field, what was
there and what was expected. Knows nothing of files, tokens or templates.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from model_foundry.data.fields import (
    FieldError,
    any_message,
    describe,
    field_of,
    message_list,
    optional_system,
    optional_tools,
    require_turns,
    sharegpt_message,
)
from model_foundry.types import Message

_CONVERSATION_FIELDS = frozenset({"messages", "conversations", "instruction"})
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


class Parsed:
    """What a row holds: messages (and tools a template may show), a text, or two answers; and the fields read."""

    def __init__(
        self,
        messages: Sequence[Message] = (),
        *,
        text: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chosen: Sequence[Message] = (),
        rejected: Sequence[Message] = (),
        label: bool | None = None,
        read: frozenset[str],
    ) -> None:
        self.messages = tuple(messages)
        self.text = text
        self.tools = None if tools is None else tuple(tools)
        self.chosen = tuple(chosen)
        self.rejected = tuple(rejected)
        self.label = label
        self.read = read


def detect_format(row: Mapping[str, Any]) -> str | None:
    """The format whose fields the row has, or None."""
    if "chosen" in row and "rejected" in row:
        return "preference"
    if _is_kto(row):
        return "kto"
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
    messages = message_list(field_of(row, key, list, "a list of messages"), key)
    return Parsed(messages, tools=optional_tools(row), read=frozenset({key, "tools"}))


def parse_sharegpt(row: Mapping[str, Any]) -> Parsed:
    """{"conversations": [{"from": "human" | "gpt" | …, "value"}]}, optional "system" and "tools"."""
    turns = field_of(row, "conversations", list, "a list of turns")
    messages = optional_system(row)
    messages += [sharegpt_message(turn, f"conversations[{index}]") for index, turn in enumerate(turns)]
    require_turns(turns, "conversations")
    return Parsed(messages, tools=optional_tools(row), read=frozenset({"conversations", "system", "tools"}))


def parse_alpaca(row: Mapping[str, Any]) -> Parsed:
    """{"instruction", "input", "output"}, optional "system" and "history" of [question, answer] pairs.

    A chat template sees instruction and input as one message, a line apart; the Alpaca template sees both fields.
    """
    messages = _alpaca_prompt(row)
    messages.append(Message("assistant", field_of(row, "output", str, "text")))
    return Parsed(messages, read=frozenset({"instruction", "input", "output", "system", "history"}))


def parse_input_output(row: Mapping[str, Any]) -> Parsed:
    """{"input", "output"} or {"question", "answer"}, optional "system"."""
    asked, answered = ("question", "answer") if "question" in row and "input" not in row else ("input", "output")
    messages = optional_system(row)
    messages.append(Message("user", field_of(row, asked, str, "text")))
    messages.append(Message("assistant", field_of(row, answered, str, "text")))
    return Parsed(messages, read=frozenset({asked, answered, "system"}))


def parse_prompt_completion(row: Mapping[str, Any]) -> Parsed:
    """{"prompt", "completion"}: texts (a question and an answer), or lists of messages; optional "system", "tools"."""
    prompt = _side(row, "prompt", "user")
    completion = _side(row, "completion", "assistant")
    return Parsed(
        [*optional_system(row), *prompt, *completion],
        tools=optional_tools(row),
        read=frozenset({"prompt", "completion", "system", "tools"}),
    )


def parse_text(row: Mapping[str, Any]) -> Parsed:
    """{"text"}: plain text, trained on throughout. A "path" beside it only says where it comes from."""
    text = field_of(row, "text", str, "text")
    if not text:
        raise FieldError("text", "an empty text", "at least one character")
    return Parsed(text=text, read=frozenset({"text"}))


def parse_preference(row: Mapping[str, Any]) -> Parsed:
    """{"prompt", "chosen", "rejected"}: the better and the worse answer to one prompt.

    The prompt may stand under "prompt" (a text or messages), "messages", "conversations" or "instruction"; the answers
    are texts, turns, or lists of turns. Without a prompt the answers are whole conversations, and what they begin with
    alike is the prompt, as in TRL; Anthropic's "Human: … Assistant: …" texts are such conversations too.
    """
    prompt, read = _preference_prompt(row)
    chosen, rejected = (_answer(row, key, is_conversation=prompt is None) for key in ("chosen", "rejected"))
    if prompt is None:
        if chosen[0] != rejected[0]:
            raise FieldError("rejected", "a conversation that begins otherwise", "one that begins like chosen")
        length = _common_length(chosen, rejected)
        prompt, chosen, rejected = chosen[:length], chosen[length:], rejected[length:]
    else:
        # Some sets repeat the prompt at the beginning of both answers.
        length = len(prompt)
        chosen, rejected = (side[length:] if side[:length] == prompt else side for side in (chosen, rejected))
    for key, side in (("chosen", chosen), ("rejected", rejected)):
        if not side or side[0].role != "assistant":
            raise FieldError(key, f"a turn by the {side[0].role}" if side else "no answer", "a turn by the assistant")
    read |= {"chosen", "rejected", "tools"}
    return Parsed(prompt, tools=optional_tools(row), chosen=chosen, rejected=rejected, read=read)


def parse_kto(row: Mapping[str, Any]) -> Parsed:
    """{"prompt", "completion", "label"}: one answer, and whether it is a good one.

    The conversation may also be messages, ShareGPT or Alpaca; LLaMA-Factory calls the label "kto_tag".
    """
    key = "kto_tag" if "kto_tag" in row and "label" not in row else "label"
    label = field_of(row, key, bool, "true or false")
    rest = {name: value for name, value in row.items() if name not in ("label", "kto_tag")}
    name = "prompt_completion" if "prompt" in rest and "completion" in rest else detect_format(rest)
    if name not in ("messages", "sharegpt", "alpaca", "prompt_completion"):
        raise FieldError("prompt", "nothing", "a text or a list of messages, and a completion")
    parsed = PARSERS[name](rest)
    if parsed.messages[-1].role != "assistant":
        where = "completion" if name == "prompt_completion" else "messages"
        raise FieldError(where, f"a last turn by the {parsed.messages[-1].role}", "a last turn by the assistant")
    return Parsed(parsed.messages, tools=parsed.tools, label=label, read=parsed.read | {key})


PARSERS: dict[str, Callable[[Mapping[str, Any]], Parsed]] = {
    "messages": parse_messages,
    "sharegpt": parse_sharegpt,
    "alpaca": parse_alpaca,
    "input_output": parse_input_output,
    "prompt_completion": parse_prompt_completion,
    "text": parse_text,
    "preference": parse_preference,
    "kto": parse_kto,
}


def _is_kto(row: Mapping[str, Any]) -> bool:
    """A bad answer taken for one to imitate does harm, so a completion with any label counts."""
    if "kto_tag" in row or ("label" in row and "prompt" in row and "completion" in row):
        return True
    return isinstance(row.get("label"), bool) and not _CONVERSATION_FIELDS.isdisjoint(row)


def _alpaca_prompt(row: Mapping[str, Any]) -> list[Message]:
    messages = optional_system(row)
    history = row.get("history") or []
    if not isinstance(history, list):
        raise FieldError("history", describe(history), "a list of [question, answer] pairs")
    for index, pair in enumerate(history):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise FieldError(f"history[{index}]", describe(pair), "a pair [question, answer] of texts")
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    instruction = field_of(row, "instruction", str, "text")
    given = row.get("input") or ""
    if not isinstance(given, str):
        raise FieldError("input", describe(given), "text")
    if given:
        extra = {"instruction": instruction, "input": given}
        messages.append(Message("user", f"{instruction}\n{given}", extra))
    else:
        messages.append(Message("user", instruction))
    return messages


def _side(row: Mapping[str, Any], key: str, role: str) -> list[Message]:
    value = row.get(key)
    if isinstance(value, str):
        return [Message(role, value)]
    items = field_of(row, key, list, "text or a list of messages")
    if not items and key == "completion":
        raise FieldError(key, "an empty list", "at least one message")
    return message_list(items, key)


def _preference_prompt(row: Mapping[str, Any]) -> tuple[list[Message] | None, frozenset[str]]:
    """The prompt and the fields it was read from; None where the answers are whole conversations."""
    if "prompt" in row:
        return [*optional_system(row), *_side(row, "prompt", "user")], frozenset({"prompt", "system"})
    if "messages" in row:
        parsed = parse_messages(row)
        return list(parsed.messages), parsed.read
    if "conversations" in row:
        parsed = PARSERS[detect_format({"conversations": row["conversations"]}) or "messages"](row)
        return list(parsed.messages), parsed.read
    if "instruction" in row:
        return _alpaca_prompt(row), frozenset({"instruction", "input", "system", "history"})
    return None, frozenset()


def _answer(row: Mapping[str, Any], key: str, *, is_conversation: bool) -> list[Message]:
    value = row.get(key)
    if isinstance(value, str):
        if not is_conversation:
            return [Message("assistant", value)]
        if not (turns := _hh_turns(value)):
            raise FieldError("prompt", "nothing", "a text or a list of messages, or answers that are conversations")
        return turns
    if isinstance(value, dict):
        return [any_message(value, key)]
    items = field_of(row, key, list, "text, a turn or a list of turns")
    require_turns(items, key)
    return [any_message(item, f"{key}[{index}]") for index, item in enumerate(items)]


def _hh_turns(text: str) -> list[Message]:
    """The turns of a text in the spelling of Anthropic's hh-rlhf; none where it is not one."""
    before, *parts = _HH_TURN.split("\n\n" + text.lstrip("\n"))
    if before.strip() or not parts:
        return []
    return [Message(_HH_ROLES[who], said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True)]


def _common_length(chosen: Sequence[Message], rejected: Sequence[Message]) -> int:
    """Turns that both begin with; each keeps at least one as its answer."""
    longest = min(len(chosen), len(rejected)) - 1
    return next((index for index in range(longest) if chosen[index] != rejected[index]), longest)
