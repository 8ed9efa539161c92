"""Questions out of a reply: strictly as asked for first, then as models write it anyway, and never by guessing.

A reply from which nothing can be taken says why; a question that can't be used says why too. Every reason is counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_FENCE = re.compile(r"```[a-zA-Z]*[ \t]*\r?\n(.*?)```", re.DOTALL)
_MAX_STARTS = 64
_DECODER = json.JSONDecoder()


class UnusableReplyError(Exception):
    """Nothing can be taken from a reply; the text is the reason."""


@dataclass(frozen=True, slots=True)
class Question:
    voice: str
    text: str


@dataclass(frozen=True, slots=True)
class ParsedReply:
    """What a reply holds.

    Attributes:
        problems: why single questions could not be used, one entry each.
        strict: whether the reply was exactly what was asked for.
    """

    questions: tuple[Question, ...]
    problems: tuple[str, ...]
    strict: bool


def parse_reply(text: str, *, stop_reason: str, voices: Iterable[str]) -> ParsedReply:
    """The questions of a reply.

    Args:
        stop_reason: the API's; a refusal is never read, a reply cut off is read if it is whole all the same.

    Raises:
        UnusableReplyError: with the reason.
    """
    if stop_reason == "refusal":
        raise UnusableReplyError("the model refused")
    known = {voice.casefold(): voice for voice in voices}
    value, strict = _strict(text), True
    if value is None:
        value, strict = _tolerant(text), False
    if value is None:
        if stop_reason == "max_tokens":
            raise UnusableReplyError("cut off at max_tokens")
        raise UnusableReplyError("empty" if not text.strip() else "no JSON in it")
    questions: list[Question] = []
    problems: list[str] = []
    for item in _items(value):
        found = _question(item, known)
        if isinstance(found, str):
            problems.append(found)
        else:
            questions.append(found)
    if not questions:
        raise UnusableReplyError(problems[0] if problems else "JSON without questions")
    return ParsedReply(tuple(questions), tuple(problems), strict)


def _strict(text: str) -> Any:
    """The reply as the schema has it, or None."""
    value = _loads(text)
    if not isinstance(value, dict) or set(value) != {"questions"} or not isinstance(value["questions"], list):
        return None
    shape = {"voice", "question"}
    return value if all(isinstance(item, dict) and set(item) == shape for item in value["questions"]) else None


def _tolerant(text: str) -> Any:
    """The first JSON object or list that holds something: fenced, amid prose, or after a byte order mark."""
    for candidate in (*_FENCE.findall(text), text):
        for value in _values(candidate):
            if any(True for _ in _items(value)):
                return value
    return None


def _values(text: str) -> Iterator[Any]:
    start, tries = 0, 0
    while tries < _MAX_STARTS and (found := re.search(r"[{\[]", text[start:])) is not None:
        tries += 1
        begin = start + found.start()
        try:
            value, start = _DECODER.raw_decode(text, begin)
        except (ValueError, RecursionError):
            start = begin + 1
            continue
        yield value


def _items(value: Any) -> Iterator[Any]:
    """What may be a question: of {"questions": […]}, of a list, or one object alone."""
    if isinstance(value, Mapping) and "questions" in value:
        value = value["questions"]
    if isinstance(value, list):
        yield from (item for item in value if isinstance(item, Mapping) and "question" in item)
    elif isinstance(value, Mapping) and "question" in value:
        yield value


def _question(item: Mapping[str, Any], known: Mapping[str, str]) -> Question | str:
    """The question, or why it can't be used."""
    text = item.get("question")
    if not isinstance(text, str) or not text.strip():
        return "an empty question"
    voice = item.get("voice")
    if voice is None and len(known) == 1:
        voice = next(iter(known))
    if not isinstance(voice, str) or voice.strip().casefold() not in known:
        return "a question in no voice that was asked for"
    return Question(known[voice.strip().casefold()], text.strip())


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
