"""What a set of rows is made of: counts, lengths, roles, the languages of its code.

Describes and judges nothing; whether the figures are good is for the gate and the reader. Knows no tokenizer: whoever
has one hands in a function that counts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from model_foundry.data.rows import Row, RowSet

PERCENTILES = {"min": 0, "p5": 5, "p25": 25, "p50": 50, "p75": 75, "p95": 95, "p99": 99, "max": 100}
_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([^\s`{]*)", re.MULTILINE)
_OTHER_NAMES = {"py": "python", "js": "javascript", "ts": "typescript", "sh": "bash", "gd": "gdscript", "yml": "yaml"}


@dataclass(frozen=True, slots=True)
class Lengths:
    """How a quantity is spread over rows; `percentiles` by the names in PERCENTILES."""

    total: int
    mean: float
    percentiles: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Statistics:
    """What rows are made of.

    Attributes:
        num_rows: all of them.
        kinds: rows that are a conversation, a text, a pair or a labelled answer.
        formats: rows by the format they were read in.
        roles: turns by role, answers of pairs included.
        turns: turns a row, system messages and answers of pairs included; 0 for a text.
        characters: characters of text a row.
        words: stretches without white space a row.
        answer_characters: characters of the assistant's turns a row.
        tokens: tokens a row where a counter was given, else None.
        num_system: rows with a system message. num_tools: rows with tools. num_calls: turns that call one.
        num_empty_turns: turns without text that call no tool.
        labels: KTO rows by label.
        code_languages: code fences by the language they name; `unnamed` for the rest.
        ignored_fields: rows with a field that nothing reads, by field.
    """

    num_rows: int
    kinds: Mapping[str, int]
    formats: Mapping[str, int]
    roles: Mapping[str, int]
    turns: Lengths
    characters: Lengths
    words: Lengths
    answer_characters: Lengths
    tokens: Lengths | None
    num_system: int
    num_tools: int
    num_calls: int
    num_empty_turns: int
    labels: Mapping[str, int]
    code_languages: Mapping[str, int]
    ignored_fields: Mapping[str, int]

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def describe_rows(*sets: RowSet, count_tokens: Callable[[Row], int] | None = None) -> Statistics:
    """The statistics of one set of rows, or of several together.

    Args:
        count_tokens: tokens of a row, as a renderer would give them.
    """
    rows = [row for rows in sets for row in rows.rows]
    turns = [list(_turns(row)) for row in rows]
    texts = [
        [text for _, text, _ in parts] if row.text is None else [row.text]
        for row, parts in zip(rows, turns, strict=True)
    ]
    answers = [sum(len(text) for role, text, _ in parts if role == "assistant") for parts in turns]
    every = [part for parts in turns for part in parts]
    ignored: Counter[str] = Counter()
    for one in sets:
        ignored.update(one.ignored_fields)
    return Statistics(
        num_rows=len(rows),
        kinds=_counted(_kind(row) for row in rows),
        formats=_counted(one.format for one in sets for _ in one.rows),
        roles=_counted(role for role, _, _ in every),
        turns=lengths([len(parts) for parts in turns]),
        characters=lengths([sum(map(len, parts)) for parts in texts]),
        words=lengths([sum(len(text.split()) for text in parts) for parts in texts]),
        answer_characters=lengths(answers),
        tokens=None if count_tokens is None else lengths([count_tokens(row) for row in rows]),
        num_system=sum(any(role == "system" for role, _, _ in parts) for parts in turns),
        num_tools=sum(row.tools is not None for row in rows),
        num_calls=sum(calls for _, _, calls in every),
        num_empty_turns=sum(not text.strip() and not calls for _, text, calls in every),
        labels=_counted("good" if row.label else "bad" for row in rows if row.label is not None),
        code_languages=_counted(name for parts in texts for text in parts for name in code_languages(text)),
        ignored_fields=dict(ignored),
    )


def lengths(values: Iterable[int]) -> Lengths:
    """Sum, mean and percentiles (linear between neighbours); zeros for no values."""
    array = np.fromiter(values, dtype=np.int64)
    if not len(array):
        return Lengths(0, 0.0, dict.fromkeys(PERCENTILES, 0.0))
    found = np.percentile(array, list(PERCENTILES.values()))
    return Lengths(int(array.sum()), float(array.mean()), dict(zip(PERCENTILES, map(float, found), strict=True)))


def code_languages(text: str) -> Iterator[str]:
    """The language that each Markdown code fence of a text names, in lower case; `unnamed` where it names none."""
    fence = ""
    for match in _FENCE.finditer(text):
        mark, name = match.groups()
        if not fence:
            fence = mark
            yield _OTHER_NAMES.get(name.lower(), name.lower()) or "unnamed"
        elif mark[0] == fence[0] and len(mark) >= len(fence) and not name:
            fence = ""


def _turns(row: Row) -> Iterator[tuple[str, str, bool]]:
    """Role, text, and whether it calls a tool, of every turn."""
    for message in (*row.messages, *row.chosen, *row.rejected):
        yield message.role, message.content, bool(message.extra.get("tool_calls"))


def _kind(row: Row) -> str:
    if row.text is not None:
        return "text"
    return "pair" if row.chosen else "conversation" if row.label is None else "labelled answer"


def _counted(names: Iterable[str]) -> dict[str, int]:
    """Name -> count, the most frequent first and equal ones by name."""
    return dict(sorted(Counter(names).items(), key=lambda item: (-item[1], item[0])))
