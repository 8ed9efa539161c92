"""Checks of the set as a whole: rows that repeat each other, and rows that stand in what is held out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from model_foundry.data.dedup import find_overlaps
from model_foundry.data.gate.quotes import Quote, find_quotes
from model_foundry.data.gate.subject import (
    HeldOut,
    Subject,
    comparable_text,
    last_question,
    last_text,
    question_text,
)
from model_foundry.data.gate.verdict import MAX_EXAMPLES, Example, GateCheck, at_most, excerpt, share_text
from model_foundry.data.rows import Row

SHORT_WORDS, SHORT_CHARS = 20, 120
# Turns of fewer words within a talk (Go on. Why is that?) are asked in any.
MIN_TURN_WORDS = 4
# A handful of rows made by hand may be alike on purpose; equal ones are a mistake in any number.
MIN_ROWS_FOR_NEAR = 20


def duplicates(subject: Subject) -> GateCheck:
    """Few rows say what an earlier one says."""
    policy, rows = subject.policy, subject.rows
    found = subject.repeats
    repeats = np.flatnonzero(found.first != np.arange(found.num_texts))
    is_judged = repeats.size >= policy.min_cases
    judges_near = len(rows) >= MIN_ROWS_FOR_NEAR
    share = float(found.share) if judges_near else found.num_exact / max(1, found.num_texts)
    evidence = (
        f"Rows that repeat an earlier one: {found.num_exact:,}; that nearly do (similarity {policy.similarity:g} or "
        f"more): {found.num_near:,}."
    )
    if repeats.size and not is_judged:
        evidence += f" Not judged when they are fewer than {policy.min_cases}."
    elif found.num_near and not judges_near:
        evidence += f" Near ones are not judged in fewer than {MIN_ROWS_FOR_NEAR} rows."
    if is_judged and share > policy.max_duplicate_share:
        evidence += " foundry data dedup writes the rows that are left without them."
    examples = tuple(
        Example(
            rows[index].source,
            f"{'repeats' if found.exact[index] else f'is {found.similarity[index]:.2f} like'} "
            f"{rows[int(found.first[index])].source}",
            excerpt(last_text(rows[index])),
        )
        for index in repeats[:MAX_EXAMPLES].tolist()
    )
    passed = share <= policy.max_duplicate_share or not is_judged
    said = at_most(policy.max_duplicate_share, "rows")
    return GateCheck("duplicates", passed, share, said, evidence, examples)


def apart_from(name: str) -> Callable[[Subject], GateCheck]:
    """The check that no training row stands in what is held out under `name`, or holds a piece of it.

    In a short text a single word makes another question, so near ones among these are borne in a small number.
    """

    def check(subject: Subject) -> GateCheck:
        policy = subject.policy
        held_out = next((held_out for held_out in subject.held_out if held_out.name == name), None)
        said = (
            f"{at_most(policy.max_overlap_share, 'its rows')}, "
            f"{share_text(policy.max_short_overlap_share)} of short ones nearly, "
            f"{share_text(policy.max_quoted_share)} quoted"
        )
        if held_out is None:
            return GateCheck(f"apart_from_{name}", True, None, said, f"There is no {name} set.")
        pairs = _overlaps(subject, held_out)
        num_rows = max(1, len(held_out.rows))
        sure = {pair.other for pair in pairs if pair.kind == "same"}
        quoted = {pair.other for pair in pairs if pair.kind == "quoted"} - sure
        weak = {pair.other for pair in pairs} - sure - quoted
        examples = tuple(
            Example(
                subject.rows[pair.index].source,
                f"{pair.how} {held_out.rows[pair.other].source}",
                excerpt(last_text(subject.rows[pair.index])),
            )
            for pair in sorted(pairs, key=lambda pair: pair.kind == "alike")[:MAX_EXAMPLES]
        )
        evidence = (
            f"Training rows that stand in {held_out.file}: {len(pairs):,}. Of its {len(held_out.rows):,} rows "
            f"{len(sure):,} are met so, {len(weak):,} short ones nearly, and {len(quoted):,} quoted in a longer row."
        )
        passed = len(sure) / num_rows <= policy.max_overlap_share
        passed = passed and len(weak) / num_rows <= policy.max_short_overlap_share
        passed = passed and len(quoted) / num_rows <= policy.max_quoted_share
        share = (len(sure) + len(weak) + len(quoted)) / num_rows
        return GateCheck(f"apart_from_{name}", passed, share, said, evidence, examples)

    return check


@dataclass(frozen=True, slots=True)
class _Pair:
    """A training row and the held-out row that it stands for; `alike` where both are short and only that."""

    index: int
    other: int
    how: str
    kind: Literal["same", "quoted", "alike"] = "same"


def _overlaps(subject: Subject, held_out: HeldOut) -> list[_Pair]:
    """Every training row that stands in the held-out ones or quotes one of them, in order."""
    shared = subject.shared_lines
    reference = [comparable_text(row, shared) for row in held_out.rows]
    pairs: dict[int, _Pair] = {}
    for found in find_overlaps(subject.texts, reference, threshold=subject.policy.similarity):
        how = "stands word for word in" if found.exact else f"is {found.similarity:.2f} like"
        kind = "same" if found.exact or not _is_short(reference[found.other]) else "alike"
        pairs[found.index] = _Pair(found.index, found.other, how, kind)
    asked: dict[str, int] = {}
    if held_out.by_question:
        asked = {_question(row, shared): number for number, row in reversed(list(enumerate(held_out.rows)))}
    for index, row in enumerate(subject.rows) if asked else ():
        number = next((asked[text] for text in _asked_in(row, shared) if text in asked), None)
        if number is not None and _is_better(pairs.get(index)):
            pairs[index] = _Pair(index, number, "asks the same as")
    for quote in _quotes(subject, held_out, reference):
        if _is_better(pairs.get(quote.index)):
            how = f"holds the {quote.what} of"
            pairs[quote.index] = _Pair(quote.index, quote.other, how, "quoted")
    return [pair for _, pair in sorted(pairs.items())]


def _is_better(pair: _Pair | None) -> bool:
    """Whether what is sure may take the place of what was found for a row before."""
    return pair is None or pair.kind == "alike"


def _quotes(subject: Subject, held_out: HeldOut, reference: list[str]) -> list[Quote]:
    """What is held out and stands inside training rows, their system messages included."""
    texts = []
    for row, text in zip(subject.rows, subject.texts, strict=True):
        system = [turn.content for turn in row.messages if turn.role == "system"]
        texts.append("\n".join([*system, text]) if system else text)
    questions = [last_question(row, subject.shared_lines) for row in held_out.rows] if held_out.by_question else []
    answers = [row.messages[-1].content if row.messages else "" for row in held_out.rows if held_out.by_question]
    return find_quotes(texts, reference, questions=questions, answers=answers)


def _is_short(text: str) -> bool:
    return len(text.split()) < SHORT_WORDS and len(text) < SHORT_CHARS


def _asked_in(row: Row, shared_lines: frozenset[str]) -> Iterator[str]:
    """All that is said before the answer, and each turn alone that asks something of a few words."""
    whole = _question(row, shared_lines)
    if whole:
        yield whole
    for turn in row.messages:
        words = question_text(turn.content, shared_lines).lower().split() if turn.role == "user" else []
        if len(words) >= MIN_TURN_WORDS:
            yield " ".join(words)


def _question(row: Row, shared_lines: frozenset[str]) -> str:
    """All that is said before the answer, in lower case and without odd white space."""
    last = max((index for index, turn in enumerate(row.messages) if turn.role == "assistant"), default=0)
    said = [question_text(t.content, shared_lines) for t in row.messages[:last] if t.role != "system"]
    return " ".join(" ".join(said).lower().split())
