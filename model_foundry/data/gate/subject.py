"""What is judged: rows as they were read, the datums made of them, and what stands in no training row.

Also the text by which rows are compared: what was asked and answered, without what all rows share.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import orjson

from model_foundry.data.dedup import Duplicates
from model_foundry.data.gate.borders import Borders, find_borders
from model_foundry.data.gate.reading import Reading
from model_foundry.data.gate.repeats import find_repeats
from model_foundry.data.gate.verdict import Example, GatePolicy, excerpt
from model_foundry.data.rows import Row, RowSet
from model_foundry.data.tokenise import RowProblem, TokenisedSet, TrainOn
from model_foundry.rendering import Renderer
from model_foundry.types import Message

MIN_SHARED_ROWS = 20
MIN_SHARED_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Rows that training must not see.

    Attributes:
        name: `validation` or `evaluation`.
        rows: the questions with their answers, as rows.
        by_question: whether a row with the same question counts whatever it answers.
    """

    name: str
    file: str
    rows: tuple[Row, ...]
    by_question: bool = False


@dataclass(frozen=True)
class Subject:
    """A training set on its way into a run.

    Attributes:
        reading: the rows, and what could not be read.
        rendered: the rows that were rendered: of a preference row, one with each of its answers.
        data: their datums; `data.indices` counts in `rendered`.
        problems: rendered rows that could not be used.
        max_length: the longest row in tokens that is kept whole.
    """

    reading: Reading
    rendered: RowSet
    data: TokenisedSet
    problems: tuple[RowProblem, ...]
    renderer: Renderer
    train_on: TrainOn
    max_length: int
    policy: GatePolicy
    held_out: tuple[HeldOut, ...] = field(default=())

    @property
    def rows(self) -> tuple[Row, ...]:
        return self.reading.rows.rows

    @cached_property
    def borders(self) -> Borders:
        return find_borders(self.rendered.rows, self.data, self.renderer, train_on=self.train_on)

    @cached_property
    def shared_lines(self) -> frozenset[str]:
        return find_shared_lines(self.rows)

    @cached_property
    def texts(self) -> list[str]:
        """What each row is compared by."""
        return [comparable_text(row, self.shared_lines) for row in self.rows]

    @cached_property
    def repeats(self) -> Duplicates:
        """Which rows repeat an earlier one, exactly or nearly."""
        questions = [last_question(row, self.shared_lines) for row in self.rows]
        return find_repeats(self.texts, questions, threshold=self.policy.similarity)

    def row_of(self, datum: int) -> Row:
        return self.rendered.rows[int(self.data.indices[datum])]

    def example(self, datum: int, problem: str) -> Example:
        row = self.row_of(datum)
        return Example(row.source, problem, excerpt(last_text(row)))

    def examples(self, datums: np.ndarray, problem: str) -> tuple[Example, ...]:
        return tuple(self.example(int(datum), problem) for datum in datums)


def with_answers(rows: RowSet) -> RowSet:
    """The conversations that are rendered: a preference row stands for two, one with each answer."""
    if not any(row.chosen or row.rejected or row.label is not None for row in rows.rows):
        return rows
    conversations: list[Row] = []
    for row in rows.rows:
        if not (row.chosen or row.rejected):
            conversations.append(replace(row, label=None))
            continue
        for name, answer in (("chosen", row.chosen), ("rejected", row.rejected)):
            source = f"{row.source} ({name})"
            conversations.append(replace(row, messages=(*row.messages, *answer), source=source, chosen=(), rejected=()))
    return replace(rows, rows=tuple(conversations))


def last_text(row: Row) -> str:
    """The text that shows best which row it is: the last question, or the beginning of a plain text."""
    if row.text is not None:
        return row.text
    asked = [message.content for message in row.messages if message.role == "user" and message.content.strip()]
    return asked[-1] if asked else next((m.content for m in row.messages if m.content.strip()), "")


def find_shared_lines(rows: Sequence[Row]) -> frozenset[str]:
    """Lines that many rows' questions share: the instruction above the question says nothing about the row."""
    counts: Counter[str] = Counter()
    for row in rows:
        counts.update(asked_lines(row))
    least = max(MIN_SHARED_ROWS, MIN_SHARED_SHARE * len(rows))
    return frozenset(line for line, count in counts.items() if count >= least)


def asked_lines(row: Row) -> set[str]:
    """The lines of what a row asks, where there are several."""
    lines = {line for message in row.messages if message.role == "user" for line in message.content.splitlines()}
    return lines if len(lines) > 1 else set()


def comparable_text(row: Row, shared_lines: frozenset[str] = frozenset()) -> str:
    """What was asked and answered, in order. System messages say the same in every row, and are left out."""
    if row.text is not None:
        return row.text
    turns = (*row.messages, *row.chosen, *row.rejected)
    return "\n".join(_said(turn, shared_lines) for turn in turns if turn.role != "system")


def _said(turn: Message, shared_lines: frozenset[str]) -> str:
    """A turn's text, and the tools that it calls: rows that call with other arguments are other rows."""
    text = question_text(turn.content, shared_lines) if turn.role == "user" else turn.content
    called = " ".join(word for call in turn.extra.get("tool_calls") or () for word in _called(call))
    return f"{text}\n{called}" if called else text


def _called(call: Any) -> list[str]:
    """A tool's name and the values it is called with, without the frame of keys that all calls share."""
    function = call.get("function", call) if isinstance(call, Mapping) else call
    if not isinstance(function, Mapping):
        return [str(function)]
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with suppress(orjson.JSONDecodeError):
            arguments = orjson.loads(arguments)
    return [str(function.get("name")), *_values(arguments)]


def _values(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping | list | tuple):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _values(inner)
    else:
        yield str(value)


def last_question(row: Row, shared_lines: frozenset[str] = frozenset()) -> str:
    """The last thing that a row asks; nothing for a plain text."""
    asked = [message.content for message in row.messages if message.role == "user"]
    return question_text(asked[-1], shared_lines) if asked else ""


def question_text(text: str, shared_lines: frozenset[str]) -> str:
    """A question without the lines that it shares with others; whole where nothing else is in it."""
    if not shared_lines:
        return text
    own = [line for line in text.splitlines() if line not in shared_lines]
    return "\n".join(own) if any(line.strip() for line in own) else text
