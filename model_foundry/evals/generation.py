"""Held-out questions from a file, and a model's greedy answers to them.

Whoever samples is passed in: this module knows texts, tokens in and tokens out, and nothing of models or engines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import orjson

from model_foundry.data.formats import PARSERS, FieldError, describe, detect_format
from model_foundry.data.rows import BadRows
from model_foundry.errors import DataError, EngineError
from model_foundry.types import Message, SampledSequence, SamplingParams

Sampler = Callable[[Sequence[np.ndarray], SamplingParams], Sequence[SampledSequence]]
"""Continues int32 [T] prompts, each with its own length; one sequence a prompt, in their order."""

_HINT = 'A question is {"prompt": "…", "answer": "…"}, one JSON object a line; any training format works as well'


class PromptRenderer(Protocol):
    """What is needed of a `Renderer`."""

    def prompt(self, messages: Sequence[Message]) -> np.ndarray: ...

    def reply(self, tokens: np.ndarray) -> str: ...

    @property
    def stop_token_ids(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked (the conversation up to the answer), what should come back, and "file:line"."""

    messages: tuple[Message, ...]
    answer: str
    source: str = ""

    @property
    def prompt(self) -> str:
        """The last thing the user says."""
        return next((message.content for message in reversed(self.messages) if message.role == "user"), "")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model wrote. `is_cut` when it ran into `max_new_tokens` instead of ending its turn."""

    question: Question
    text: str
    num_tokens: int
    is_cut: bool


def read_questions(path: Path, *, system: str | None = None) -> tuple[Question, ...]:
    """Read questions with expected answers: `prompt` and `answer`, or any training format that ends with an answer.

    Args:
        path: JSONL, UTF-8.
        system: put before every question as the system message.

    Raises:
        DataError: the file is missing, empty or not text, or rows cannot be used, named by file, line and field; a
            question with a system message of its own cannot take `system`.
    """
    bad = BadRows()
    questions: list[Question] = []
    num_rows = 0
    for source, line in _lines(path):
        num_rows += 1
        try:
            messages, answer = _parse(line, system=system)
        except FieldError as error:
            bad.add(source, str(error))
            continue
        questions.append(Question(messages, answer, source))
    bad.raise_if_any(num_rows=num_rows, path=path, hint=_HINT)
    if not questions:
        raise DataError("the file holds no questions", where=str(path), hint=_HINT)
    return tuple(questions)


def answer_questions(
    questions: Sequence[Question],
    sampler: Sampler,
    renderer: PromptRenderer,
    *,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[Answer, ...]:
    """Answer every question greedily, in the order given.

    Prompts of similar length share a batch, so little is padded; the batches are the same on every call.

    Args:
        on_progress: told how many questions are answered so far, after every batch.

    Raises:
        EngineError: the sampler returned another number of sequences than it was given prompts.
        TemplateError: the chat template refuses a question.
    """
    prompts = [renderer.prompt(question.messages) for question in questions]
    params = SamplingParams(max_tokens=max_new_tokens, temperature=0.0, stop_token_ids=renderer.stop_token_ids)
    answers: dict[int, Answer] = {}
    for batch in _batches(prompts, batch_size):
        sequences = sampler([prompts[index] for index in batch], params)
        if len(sequences) != len(batch):
            raise EngineError(f"the sampler answered {len(sequences)} of {len(batch)} prompts")
        for index, sequence in zip(batch, sequences, strict=True):
            is_cut = sequence.stop_reason == "length"
            text = renderer.reply(sequence.tokens).strip()
            answers[index] = Answer(questions[index], text, len(sequence.tokens), is_cut)
        if on_progress is not None:
            on_progress(len(answers))
    return tuple(answers[index] for index in range(len(questions)))


def _batches(prompts: Sequence[np.ndarray], batch_size: int) -> Iterator[list[int]]:
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), index))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError("there is no such file", where=str(path), hint="Check evaluation.file") from error
    except OSError as error:
        raise DataError(f"the file cannot be read: {error.strerror}", where=str(path)) from error
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", line


def _parse(line: bytes, *, system: str | None) -> tuple[tuple[Message, ...], str]:
    row = _object(line)
    messages, answer = _prompt_and_answer(row) if "answer" in row and "prompt" in row else _conversation(row)
    if not messages:
        raise FieldError("prompt", "an empty list", "at least one message")
    if system is None:
        return messages, answer
    if messages[0].role == "system":
        raise FieldError("system", "a system message of the question's own", "none, because evaluation.system is set")
    return (Message("system", system), *messages), answer


def _object(line: bytes) -> Mapping[str, Any]:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FieldError("line", f"byte 0x{line[error.start]:02x} at offset {error.start}", "UTF-8 text") from error
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise FieldError("line", f"text that is not JSON ({error.msg})", "one object") from error
    if not isinstance(row, dict):
        raise FieldError("line", describe(row), "an object")
    return row


def _prompt_and_answer(row: Mapping[str, Any]) -> tuple[tuple[Message, ...], str]:
    answer = row["answer"]
    if not isinstance(answer, str) or not answer.strip():
        raise FieldError("answer", describe(answer), "the expected answer, a text that is not empty")
    parsed = PARSERS["prompt_completion"]({**row, "completion": answer})
    return tuple(parsed.messages[:-1]), answer


def _conversation(row: Mapping[str, Any]) -> tuple[tuple[Message, ...], str]:
    """A training row: the last turn is the answer."""
    name = detect_format(row)
    if name is None or name == "text":
        missing = "answer" if "prompt" in row else "prompt"
        raise FieldError(missing, "nothing", "a text")
    messages = PARSERS[name](row).messages
    if not messages or messages[-1].role != "assistant" or not messages[-1].content.strip():
        raise FieldError("messages", "no answer at the end", "a last turn by the assistant")
    return tuple(messages[:-1]), messages[-1].content
