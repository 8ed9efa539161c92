"""Rows of a data set out of the replies in a ledger: filtered, without near-duplicates, each with its provenance.

Reads the ledger alone, twice, so memory holds no replies and the corpus may be gone. Nothing here is paid for: with
other filters the same replies give other rows. The assistant's turn is the original code, byte for byte.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from model_foundry.checkpoint.atomic import atomic_file
from model_foundry.data.code.languages import Language
from model_foundry.data.code.units import CodeUnit
from model_foundry.data.dedup import find_duplicates
from model_foundry.data.filters import Filter, length, refusal, syntax, truncation
from model_foundry.errors import FoundryError
from model_foundry.generate.ledger import Answered, Ledger
from model_foundry.generate.replies import Question, UnusableReplyError, parse_reply
from model_foundry.generate.requests import unit_from_json

MAX_EXAMPLES = 3


@dataclass(frozen=True)
class RowRules:
    """What makes a row.

    Attributes:
        voices: that were asked for.
        prompt: label of the prompt, for the provenance.
        filters: name -> filter over {"question", "code", "stop_reason"}; rejections are counted by name.
        duplicate_threshold: Jaccard similarity from which two questions are one; None keeps them all.
    """

    voices: tuple[str, ...]
    prompt: str
    filters: Mapping[str, Filter] = field(default_factory=dict)
    duplicate_threshold: float | None = 0.8
    seed: int = 0


@dataclass
class Tally:
    """What became of replies and questions; every one that is not a row is in here with its reason."""

    replies: int = 0
    strict: int = 0
    questions: int = 0
    rows: int = 0
    duplicates_exact: int = 0
    duplicates_near: int = 0
    rejected_replies: Counter[str] = field(default_factory=Counter)
    rejected_questions: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def reject(self, reason: str, example: str, *, reply: bool) -> None:
        (self.rejected_replies if reply else self.rejected_questions)[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(" ".join(example.split())[:160])

    def as_dict(self) -> dict[str, Any]:
        return {
            "replies": self.replies,
            "replies_exactly_as_asked": self.strict,
            "replies_rejected": dict(self.rejected_replies),
            "questions": self.questions,
            "questions_rejected": dict(self.rejected_questions),
            "duplicates": {"exact": self.duplicates_exact, "near": self.duplicates_near},
            "rows": self.rows,
            "examples": self.examples,
        }


def write_dataset(ledger: Ledger, path: Path, rules: RowRules) -> Tally:
    """Write the rows as JSONL, whole or not at all, and write each request's verdict into the ledger.

    Raises:
        FoundryError: the disk is full or the file cannot be written; the old file is untouched.
    """
    tally, why_none = Tally(), {}
    kept = _kept(ledger, rules, tally, why_none)
    productive: set[str] = set()
    with _whole_file(path, ledger.path) as file:
        for index, (answered, unit, question) in enumerate(_questions(ledger, rules)):
            if kept is not None and index not in kept:
                why_none.setdefault(answered.key, "only duplicates of other questions")
                continue
            productive.add(answered.key)
            tally.rows += 1
            file.write(json.dumps(_row(answered, unit, question, rules), ensure_ascii=False).encode() + b"\n")
    keys = (answered.key for answered in ledger.answered())
    ledger.judge([(key, None if key in productive else why_none.get(key, "no question")) for key in keys])
    return tally


def _kept(ledger: Ledger, rules: RowRules, tally: Tally, why_none: dict[str, str]) -> set[int] | None:
    """Which of the questions that pass the filters are no duplicate of an earlier one; None: all of them."""
    found = _questions(ledger, rules, tally, why_none)
    if rules.duplicate_threshold is None:
        for _ in found:
            pass
        return None
    texts = (question.text for _, _, question in found)
    duplicates = find_duplicates(texts, threshold=rules.duplicate_threshold, seed=rules.seed)
    tally.duplicates_exact, tally.duplicates_near = int(duplicates.num_exact), int(duplicates.num_near)
    return {int(index) for index in duplicates.kept}


def _questions(
    ledger: Ledger, rules: RowRules, tally: Tally | None = None, why_none: dict[str, str] | None = None
) -> Iterator[tuple[Answered, CodeUnit, Question]]:
    """Every question that passes the filters, in the order of the corpus; what does not is told to `tally`."""
    tally = tally if tally is not None else Tally()
    why_none = why_none if why_none is not None else {}
    for answered in ledger.answered():
        unit = unit_from_json(answered.unit)
        tally.replies += 1
        try:
            parsed = parse_reply(answered.reply, stop_reason=answered.stop_reason, voices=rules.voices)
        except UnusableReplyError as error:
            tally.reject(str(error), answered.reply, reply=True)
            why_none.setdefault(answered.key, str(error))
            continue
        tally.strict += parsed.strict
        tally.questions += len(parsed.questions) + len(parsed.problems)
        for problem in parsed.problems:
            tally.reject(problem, answered.reply, reply=False)
        for question in parsed.questions:
            fields = {"question": question.text, "code": unit.code, "stop_reason": answered.stop_reason}
            name, why = _refused(fields, rules.filters)
            if name is None:
                yield answered, unit, question
            else:
                tally.reject(name, f"{unit.place}: {why}", reply=False)
                why_none.setdefault(answered.key, name)


def _refused(fields: Mapping[str, Any], filters: Mapping[str, Filter]) -> tuple[str | None, str]:
    """Name and sentence of the first filter that refuses."""
    for name, check in filters.items():
        if (why := check(fields)) is not None:
            return name, why
    return None, ""


def standard_filters(
    language: str | Language, *, min_chars: int, max_chars: int, refusals: bool = True, check_syntax: bool = True
) -> dict[str, Filter]:
    """Length, refusals and truncation of the question, and syntax of the code."""
    filters = {"length of the question": length("question", min_chars=min_chars, max_chars=max_chars)}
    if refusals:
        filters["the question is a refusal"] = refusal("question")
    # A reply that hit max_tokens and is whole all the same has been read by then.
    filters["the question breaks off"] = truncation("question", stop_field="")
    if check_syntax:
        filters["syntax of the code"] = _once_a_text("code", syntax("code", language))
    return filters


def _once_a_text(field: str, check: Filter) -> Filter:
    """The verdict on a text is kept until another text comes: one piece of code has several questions."""
    last: tuple[str, str | None] | None = None

    def checked(row: Mapping[str, Any]) -> str | None:
        nonlocal last
        if last is None or last[0] != row[field]:
            last = (row[field], check(row))
        return last[1]

    return checked


def _row(answered: Answered, unit: CodeUnit, question: Question, rules: RowRules) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": question.text}, {"role": "assistant", "content": unit.code}],
        "meta": {
            "source": unit.path,
            "lines": [unit.first_line, unit.last_line],
            "sha256": unit.sha256,
            "language": unit.language,
            "kind": unit.kind,
            "name": unit.name,
            "voice": question.voice,
            "model": answered.model,
            "batch": answered.batch_id,
            "custom_id": answered.custom_id,
            "prompt": rules.prompt,
        },
    }


@contextmanager
def _whole_file(path: Path, ledger: Path) -> Iterator[BinaryIO]:
    """A file that takes its name when the block ends well; until then the old one keeps it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            yield file
    except OSError as error:
        raise FoundryError(
            f"the rows could not be written: {error.strerror or error}",
            where=str(path),
            hint=f"The replies are safe in {ledger}: run the command again when there is room; nothing is paid again",
        ) from error
