"""The rows of a suite, kind by kind: what is asked, and what an answer is held against.

Knows JSON objects and fields; nothing of models. A row that cannot be used is named by file, line and field.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from model_foundry.data.formats import PARSERS, FieldError, describe, detect_format
from model_foundry.data.rows import BadRows
from model_foundry.errors import DataError
from model_foundry.evals.text_scores import Wanted
from model_foundry.types import Message

Messages = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class SuiteRow:
    """One row.

    Attributes:
        prompts: what is asked, each a conversation: one, several paraphrases, or one a group.
        choices: the endings that are weighed against each other; `right` is the place of the right one.
        is_unsafe: whether the request should be declined.
        text: of a text row.
    """

    source: str
    prompts: tuple[Messages, ...] = ()
    wanted: Wanted = field(default_factory=Wanted)
    choices: tuple[str, ...] = ()
    right: int = 0
    is_unsafe: bool = False
    text: str = ""

    @property
    def prompt(self) -> str:
        """What is shown as the question: the last thing the user says, in each prompt."""
        last = [next((m.content for m in reversed(each) if m.role == "user"), "") for each in self.prompts]
        return "\n".join(dict.fromkeys(last))


def read_suite_rows(path: Path, kind: str, *, system: str | None, language: str | None) -> tuple[SuiteRow, ...]:
    """Read a suite's rows: JSONL, or for the kind `text` a plain text.

    Raises:
        DataError: the file is missing or empty, or rows cannot be used; the first ones are named.
    """
    data = _read(path)
    if kind == "text":
        text = data.decode("utf-8", "replace")
        if not text.strip():
            raise DataError("the file holds no text", where=str(path))
        return (SuiteRow(path.name, text=text),)
    bad, rows, num_rows = BadRows(), [], 0
    for source, line in _lines(data, path):
        num_rows += 1
        try:
            rows.append(_PARSE[kind](_object(line), f"{path.name}:{source.rpartition(':')[2]}", system, language))
        except FieldError as error:
            bad.add(source, str(error))
    bad.raise_if_any(num_rows=num_rows, path=path, hint=f"Rows of the kind {kind}: {ROW_HINTS[kind]}")
    if not rows:
        raise DataError("the file holds no rows", where=str(path), hint=f"Rows of the kind {kind}: {ROW_HINTS[kind]}")
    return tuple(rows)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except FileNotFoundError as error:
        raise DataError("there is no such file", where=str(path), hint="Check evaluation.file, or rows: in the suite")\
            from error  # fmt: skip
    except OSError as error:
        raise DataError(f"the file cannot be read: {error.strerror}", where=str(path)) from error


def _lines(data: bytes, path: Path) -> Iterator[tuple[str, bytes]]:
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", line


def _object(line: bytes) -> Mapping[str, Any]:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise FieldError("line", f"text that is not JSON ({error.msg})", "one object") from error
    if not isinstance(row, dict):
        raise FieldError("line", describe(row), "an object")
    return row


def _answers(row: Mapping[str, Any], source: str, system: str | None, language: str | None) -> SuiteRow:
    known = {"prompt", "messages", "answer", "answers", "keywords", "words"}
    if "prompt" in row or "messages" in row or "answers" in row or "keywords" in row:
        messages, wanted = _asked(row, system), _right_answers(row)
        if "messages" in row and messages[-1].role == "assistant":
            messages, wanted = messages[:-1], wanted or (messages[-1].content,)
            if not messages:
                raise FieldError("messages", "an answer alone", "what is asked before it")
    else:  # any training format that ends with an answer
        name = detect_format(row)
        if name in (None, "text"):
            raise FieldError("prompt", "nothing", "a text")
        turns = tuple(PARSERS[name](row).messages)
        if len(turns) < 2 or turns[-1].role != "assistant" or not turns[-1].content.strip():
            raise FieldError("messages", "no answer at the end", "a last turn by the assistant")
        messages, wanted, known = _with_system(turns[:-1], system), (turns[-1].content,), set(row)
    if unknown := sorted(set(row) - known):
        raise FieldError(unknown[0], "a field that nothing reads", f"one of {', '.join(sorted(known))}")
    wants = Wanted(wanted, _texts(row, "keywords"), _band(row), language)
    return SuiteRow(source, (messages,), wants)


def _choices(row: Mapping[str, Any], source: str, system: str | None, language: str | None) -> SuiteRow:
    choices = _texts(row, "choices")
    if len(choices) < 2 or len(set(choices)) < len(choices):
        raise FieldError("choices", f"{len(choices)}", "at least two different texts")
    answer = row.get("answer")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise FieldError("answer", describe(row.get("answer")), f"one of the choices, or its place from 0 to "
                         f"{len(choices) - 1}")  # fmt: skip
    return SuiteRow(source, (_asked(row, system),), Wanted((choices[answer],)), choices, answer)


def _consistency(row: Mapping[str, Any], source: str, system: str | None, language: str | None) -> SuiteRow:
    prompts = _texts(row, "prompts")
    if not prompts:
        raise FieldError("prompts", describe(row.get("prompts")), "a list of wordings of one question")
    asked = tuple(_with_system((Message("user", each),), system) for each in prompts)
    return SuiteRow(source, asked, Wanted(_right_answers(row)))


def _pairs(row: Mapping[str, Any], source: str, system: str | None, language: str | None) -> SuiteRow:
    prompt, groups = row.get("prompt"), _texts(row, "groups")
    if not isinstance(prompt, str) or "{group}" not in prompt:
        raise FieldError("prompt", describe(prompt), "a text with {group} in it")
    if len(groups) != 2 or groups[0] == groups[1]:
        raise FieldError("groups", describe(row.get("groups")), "two different texts to put in the place of {group}")
    endings = tuple(row.get(name) for name in ("favourable", "unfavourable"))
    for name, ending in zip(("favourable", "unfavourable"), endings, strict=True):
        if not isinstance(ending, str) or not ending.strip():
            raise FieldError(name, describe(ending), "an ending of the answer")
    asked = tuple(_with_system((Message("user", prompt.replace("{group}", each)),), system) for each in groups)
    return SuiteRow(source, asked, choices=tuple(map(str, endings)))


def _safety(row: Mapping[str, Any], source: str, system: str | None, language: str | None) -> SuiteRow:
    if not isinstance(row.get("unsafe"), bool):
        raise FieldError("unsafe", describe(row.get("unsafe")), "true or false")
    return SuiteRow(source, (_asked(row, system),), is_unsafe=row["unsafe"])


_PARSE: Mapping[str, Callable[[Mapping[str, Any], str, str | None, str | None], SuiteRow]] = {
    "answers": _answers,
    "choices": _choices,
    "consistency": _consistency,
    "pairs": _pairs,
    "safety": _safety,
}
ROW_HINTS: Mapping[str, str] = {
    "answers": '{"prompt": "…", "answer": "…", "keywords": ["…"], "words": [5, 40]}; any training format works as well',
    "choices": '{"prompt": "…", "choices": ["…", "…"], "answer": 0}',
    "consistency": '{"prompts": ["a question", "the same in other words"]}',
    "pairs": '{"prompt": "… {group} …", "groups": ["…", "…"], "favourable": "…", "unfavourable": "…"}',
    "safety": '{"prompt": "…", "unsafe": true}',
    "text": "a plain text",
    "harness": "none: tasks: names them",
}


def _asked(row: Mapping[str, Any], system: str | None) -> Messages:
    if "messages" in row:
        return _with_system(tuple(PARSERS["messages"]({"messages": row["messages"]}).messages), system)
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        return _with_system(tuple(PARSERS["messages"]({"messages": prompt}).messages), system)
    if not isinstance(prompt, str) or not prompt.strip():
        raise FieldError("prompt", describe(prompt), "a text that is not empty")
    return _with_system((Message("user", prompt),), system)


def _with_system(messages: Messages, system: str | None) -> Messages:
    if not messages:
        raise FieldError("prompt", "an empty list", "at least one message")
    if system is None:
        return messages
    if messages[0].role == "system":
        raise FieldError("system", "a system message of the row's own", "none, because the suite sets one")
    return (Message("system", system), *messages)


def _right_answers(row: Mapping[str, Any]) -> tuple[str, ...]:
    if "answers" in row:
        answers = _texts(row, "answers")
    elif "answer" in row:
        answers = (row["answer"],)
    else:
        return ()
    if not answers or not all(isinstance(each, str) and each.strip() for each in answers):
        raise FieldError("answer", describe(row.get("answer")), "the expected answer, a text that is not empty")
    return tuple(answers)


def _texts(row: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = row.get(name, ())
    if not isinstance(value, list | tuple) or not all(isinstance(each, str) and each.strip() for each in value):
        raise FieldError(name, describe(value), "a list of texts that are not empty")
    return tuple(value)


def _band(row: Mapping[str, Any]) -> tuple[int, int] | None:
    band = row.get("words")
    if band is None:
        return None
    is_band = isinstance(band, list) and len(band) == 2 and all(type(each) is int for each in band)
    if not is_band or not 0 < band[0] <= band[1]:
        raise FieldError("words", describe(band), "the least and the most words, [5, 40]")
    return band[0], band[1]
