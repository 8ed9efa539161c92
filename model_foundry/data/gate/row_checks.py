"""Checks of rows as they were read: can they be, who speaks, what was left unread, empty turns, equal answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from model_foundry.data.gate.reading import ReadProblem
from model_foundry.data.gate.subject import Subject, last_text
from model_foundry.data.gate.verdict import MAX_EXAMPLES, Example, GateCheck, at_most, excerpt
from model_foundry.data.rows import Row
from model_foundry.types import Message

_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff\u00ad\u180e"))


def rows_readable(subject: Subject) -> GateCheck:
    """Every row can be decoded and has the fields of its format."""
    found = [problem for problem in subject.reading.problems if problem.kind == "unreadable"]
    evidence = f"Rows that cannot be read: {len(found):,} of {subject.reading.num_records:,}."
    passed, examples = not found, _examples(found)
    if subject.reading.num_records == 0:
        file = str(subject.reading.facts.get("file"))
        passed, evidence, examples = False, f"{file} holds no rows.", (Example(file, "holds no rows"),)
    elif passed:
        evidence = f"Rows read as {subject.reading.rows.format}: {subject.reading.num_records:,}."
    return GateCheck("rows_readable", passed, len(found), "0 rows", evidence, examples)


def roles_known(subject: Subject) -> GateCheck:
    """Every turn is by somebody that formats know."""
    found = [problem for problem in subject.reading.problems if problem.kind == "role"]
    evidence = f"Rows with a turn by somebody unknown: {len(found):,} of {subject.reading.num_records:,}."
    return GateCheck("roles_known", not found, len(found), "0 rows", evidence, _examples(found))


def fields_read(subject: Subject) -> GateCheck:
    """No field with content goes unread, by the parser or by the chat template."""
    allowed = set(subject.policy.unread_fields)
    unread = subject.reading.unread
    counts = {name: count for name, count in unread.counts.items() if not {name, name.split(".")[-1]} & allowed}
    examples = tuple(
        Example(first.source, f"'{name}' is not read: {first.why}", excerpt(first.value))
        for name, first in unread.first.items()
        if name in counts
    )
    named = ", ".join(f"{name} ({count:,} rows)" for name, count in counts.items())
    evidence = f"Fields with content that nothing reads: {named or 'none'}."
    rest = [name for name in subject.reading.rows.ignored_fields if name not in counts]
    if rest:
        evidence += f" Unread as well, without harm: {', '.join(sorted(rest)[:20])}."
    if counts:
        evidence += " Rename or remove them, choose a template that shows them, or name them in gate.unread_fields."
    return GateCheck("fields_read", not counts, len(counts), "0 fields", evidence, examples[:MAX_EXAMPLES])


def template_accepts(subject: Subject) -> GateCheck:
    """The chat template writes every row."""
    found = [problem for problem in subject.problems if problem.kind == "template"]
    examples = tuple(Example(problem.source, problem.what) for problem in found[:MAX_EXAMPLES])
    evidence = (
        f"Rows that the template {subject.renderer.name} refuses: {len(found):,} of {len(subject.rendered.rows):,}."
    )
    return GateCheck("template_accepts", not found, len(found), "0 rows", evidence, examples)


def turns_filled(subject: Subject) -> GateCheck:
    """No question and no answer is empty; system and tool turns may be, and so may turns that only call tools."""
    found = [(row, place) for row in subject.rows if (place := _empty_turn(row)) is not None]
    share = len(found) / max(1, len(subject.rows))
    bound = subject.policy.max_empty_share
    examples = tuple(
        Example(row.source, f"{place} has no text", excerpt(last_text(row))) for row, place in found[:MAX_EXAMPLES]
    )
    evidence = f"Rows with a question or an answer without text: {len(found):,} of {len(subject.rows):,}."
    return GateCheck("turns_filled", share <= bound, share, at_most(bound, "rows"), evidence, examples)


def answers_differ(subject: Subject) -> GateCheck:
    """A preference says something only where the two answers differ."""
    pairs = [row for row in subject.rows if row.chosen or row.rejected]
    found = [row for row in pairs if _spoken(row.chosen) == _spoken(row.rejected)]
    examples = tuple(
        Example(row.source, "chosen and rejected are the same", excerpt(row.chosen[0].content))
        for row in found[:MAX_EXAMPLES]
    )
    evidence = f"Pairs of equal answers (white space at the ends of lines aside): {len(found):,} of {len(pairs):,}."
    if not pairs:
        evidence = "There are no pairs of answers."
    return GateCheck("answers_differ", not found, len(found) if pairs else None, "0 rows", evidence, examples)


def text_intact(subject: Subject) -> GateCheck:
    """Hardly any row holds U+FFFD, the mark that a wrong decoding leaves."""
    found = [(row, text) for row in subject.rows if (text := _damaged(row)) is not None]
    share = len(found) / max(1, len(subject.rows))
    bound = subject.policy.max_damaged_share
    examples = tuple(
        Example(row.source, "holds U+FFFD", excerpt(text, around=text.index("\ufffd")))
        for row, text in found[:MAX_EXAMPLES]
    )
    marks = subject.reading.facts.get("byte_order_marks") or {}
    evidence = f"Rows with U+FFFD, which a wrong decoding leaves: {len(found):,} of {len(subject.rows):,}."
    if marks:
        evidence += f" Files that begin with a byte order mark, which is not read as text: {sum(marks.values()):,}."
    return GateCheck("text_intact", share <= bound, share, at_most(bound, "rows"), evidence, examples)


def _examples(problems: Sequence[ReadProblem]) -> tuple[Example, ...]:
    return tuple(Example(problem.source, problem.what) for problem in problems[:MAX_EXAMPLES])


def _empty_turn(row: Row) -> str | None:
    """The place of the first turn without text, or None."""
    if row.text is not None:
        return None if _has_text(row.text) else "text"
    for name, turns in (("messages", row.messages), ("chosen", row.chosen), ("rejected", row.rejected)):
        for index, turn in enumerate(turns):
            if turn.role in ("user", "assistant") and not _has_text(turn.content) and not _calls(turn):
                return f"{name}[{index}] ({turn.role})"
    return None


def _has_text(text: str) -> bool:
    return bool(text.strip()) and bool(text.translate(_INVISIBLE).strip())


def _calls(turn: Message) -> bool:
    return bool(turn.extra.get("tool_calls") or turn.extra.get("function_call"))


def _spoken(turns: Iterable[Message]) -> list[tuple[str, str, str]]:
    return [(turn.role, _trimmed(turn.content), str(sorted(turn.extra.items()))) for turn in turns]


def _trimmed(text: str) -> str:
    """Without white space that nobody sees; indentation is part of an answer."""
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def _damaged(row: Row) -> str | None:
    texts = [row.text] if row.text is not None else [m.content for m in (*row.messages, *row.chosen, *row.rejected)]
    return next((text for text in texts if text is not None and "\ufffd" in text), None)
