"""Filters over rows: each keeps a row or says in a sentence why not, and all are counted.

A filter is any function from a row to None (keep) or a reason. They are asked in the order given; the first that
refuses is the one counted, so a row stands in one count only. Knows mappings of fields; nothing of files or formats.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

from model_foundry.data.code.languages import Language, find_language
from model_foundry.data.code.syntax import syntax_problem
from model_foundry.errors import DataError

Filter: TypeAlias = Callable[[Mapping[str, Any]], str | None]
"""None keeps the row; a sentence rejects it."""

MAX_EXAMPLES = 5
SHOWN_CHARS = 80


@dataclass(frozen=True, slots=True)
class FilterReport:
    """What filters did: rejected rows by the name of the first filter that refused, and the first sentences of each."""

    num_rows: int
    num_kept: int
    rejected: Mapping[str, int]
    examples: Mapping[str, tuple[str, ...]]

    def as_dict(self) -> dict[str, Any]:
        return {
            "num_rows": self.num_rows,
            "num_kept": self.num_kept,
            "rejected": dict(self.rejected),
            "examples": {name: list(shown) for name, shown in self.examples.items()},
        }


def apply_filters(
    rows: Iterable[Mapping[str, Any]], filters: Mapping[str, Filter]
) -> tuple[list[Mapping[str, Any]], FilterReport]:
    """The rows that every filter keeps, in order, and what was refused by which.

    Args:
        filters: name -> filter, asked in this order. Every name is in the report, with 0 where it refused nothing.
    """
    kept: list[Mapping[str, Any]] = []
    rejected: Counter[str] = Counter(dict.fromkeys(filters, 0))
    examples: dict[str, list[str]] = {name: [] for name in filters}
    num_rows = 0
    for num_rows, row in enumerate(rows, start=1):
        name, reason = _first_refusal(row, filters)
        if reason is None:
            kept.append(row)
            continue
        rejected[name] += 1
        if len(examples[name]) < MAX_EXAMPLES:
            examples[name].append(f"row {num_rows}: {reason}")
    shown = {name: tuple(texts) for name, texts in examples.items() if texts}
    return kept, FilterReport(num_rows, len(kept), dict(rejected), shown)


def _first_refusal(row: Mapping[str, Any], filters: Mapping[str, Filter]) -> tuple[str, str | None]:
    for name, keep in filters.items():
        reason = keep(row)
        if reason is not None:
            return name, reason
    return "", None


def required(*fields: str) -> Filter:
    """Refuses rows in which one of these fields is missing, null, or blank text."""

    def check(row: Mapping[str, Any]) -> str | None:
        for field in fields:
            value = row.get(field)
            if value is None or (isinstance(value, str) and not value.strip()):
                return f"{field} is {'missing' if field not in row else 'empty'}"
        return None

    return check


def length(
    field: str,
    *,
    min_chars: int = 0,
    max_chars: int | None = None,
    min_lines: int = 0,
    max_lines: int | None = None,
) -> Filter:
    """Refuses texts outside these bounds (both ends allowed), white space around them not counted."""

    def check(row: Mapping[str, Any]) -> str | None:
        text = _text(row, field).strip()
        num_lines = len(text.splitlines())
        for count, unit, least, most in (
            (len(text), "characters", min_chars, max_chars),
            (num_lines, "lines", min_lines, max_lines),
        ):
            if count < least:
                return f"{field} has {count:,} {unit}, fewer than {least:,}"
            if most is not None and count > most:
                return f"{field} has {count:,} {unit}, more than {most:,}"
        return None

    return check


_CANNOT = r"(?:can't|cannot|can not|won't|will not|am unable to|'m unable to|am not able to|'m not able to|couldn't)"
_HELPING = (
    r"(?:assist|comply|fulfil|fulfill|accommodate|engage|participate|proceed|answer (?:that|this)"
    r"|help (?:you )?(?:with|out)\b|help you\b|do (?:that|this)\b|in good conscience"
    r"|(?:provide|create|generate|write|produce|offer|give|share|discuss|continue|complete|respond)"
    r"(?: to| with| you| any| that| this| such| a| an| the)*"
    r" (?:request|content|assistance|instructions|guidance|information|response|conversation|kind|type|sort)s?\b)"
)
_REFUSALS = (
    rf"(?:i'm|i am|we're|we are) (?:very |so |really |truly )?(?:sorry|afraid)\b[^.!?\n]{{0,40}}?\b(?:i|we) ?{_CANNOT}",
    rf"(?:i'm |i am )?(?:very |so )?sorry,? (?:but )?(?:i|we) ?{_CANNOT} {_HELPING}",
    rf"(?:(?:unfortunately|regrettably|apologies),? )?(?:but )?(?:i|we) ?{_CANNOT} {_HELPING}",
    rf"(?:my apologies|i apologi[sz]e)[^.!?\n]{{0,40}}\b(?:i|we) ?{_CANNOT}",
    r"as an? (?:ai|artificial intelligence|large language model|language model)\b",
    r"i(?: must|'ll have to| have to| will have to|'d have to) (?:respectfully |politely )?(?:decline|refuse)"
    r"(?:[.!]|$| (?:this|that|your|the) (?:request|prompt)| to (?:answer|help|assist|write|create|generate|provide))",
    r"(?:this|that|your|the) (?:request|prompt|content) (?:violates|goes against|is against)\b",
)
_REFUSAL = re.compile("|".join(_REFUSALS))


def refusal(field: str, *, stop_field: str = "stop_reason") -> Filter:
    """Refuses replies that decline instead of answering.

    Told by the start of the text, where a refusal stands, so that a text about refusals is kept; and by a stop reason
    of `refusal`.
    """

    def check(row: Mapping[str, Any]) -> str | None:
        if row.get(stop_field) == "refusal":
            return f"{stop_field} is refusal"
        text = _text(row, field)
        start = re.sub(r"\s+", " ", text[:400].replace("’", "'")).lower().lstrip(" \"'*_>#-“”")
        return f"{field} begins as a refusal: {_shown(text)}" if _REFUSAL.match(start) else None

    return check


CUT_STOP_REASONS = ("max_tokens", "length", "model_context_window_exceeded", "pause_turn")
"""Stop reasons of a reply that was not finished."""

_DANGLING = re.compile(r"(?:[,;:({\[\-–—/&+=\\]|\b(?:a|an|the|and|or|but|because|if|whether|my|your|its|their))$")
_LONG_CHARS = 400


def truncation(field: str, *, language: str | Language | None = None, stop_field: str = "stop_reason") -> Filter:
    """Refuses texts that were cut off.

    By the stop reason, by a code fence that is never closed, and by the end: prose that ends in a comma, an open
    bracket or a word that wants another, or (over 400 characters) in a letter or digit; code of `language` with
    brackets that stay open.

    Raises:
        DataError: an unknown language.
    """
    known = None if language is None else find_language(language)

    def check(row: Mapping[str, Any]) -> str | None:
        if row.get(stop_field) in CUT_STOP_REASONS:
            return f"{stop_field} is {row[stop_field]}"
        text = _text(row, field).rstrip()
        problem = _prose_cut(text) if known is None else open_bracket(text, known)
        return None if problem is None else f"{field} {problem}"

    return check


def _prose_cut(text: str) -> str | None:
    fences = re.findall(r"^[ \t]*(?:```|~~~)", text, re.MULTILINE)
    if len(fences) % 2:
        return "has a code fence that is never closed"
    if _DANGLING.search(text[-20:]):
        return f"breaks off: …{text[-30:]!r}"
    last_line = text.splitlines()[-1] if text else ""
    is_prose = not re.match(r"\s*(?:[-*+|#>]|\d+[.)])", last_line)
    if len(text) > _LONG_CHARS and is_prose and text[-1].isalnum():
        return f"ends without a closing mark: …{text[-30:]!r}"
    return None


def open_bracket(code: str, language: Language) -> str | None:
    """The innermost bracket that is never closed, outside strings and comments; None where all are.

    Coarser than the grammar and indifferent to everything else, so it tells cut code from wrong code.
    """
    stack: list[tuple[str, int]] = []
    for match in _bracket_tokens(language).finditer(code):
        mark = match[0]
        if mark in ("(", "[", "{"):
            stack.append((mark, match.start()))
        elif mark in (")", "]", "}") and stack:
            stack.pop()
    if not stack:
        return None
    mark, offset = stack[-1]
    return f"leaves '{mark}' of line {code.count(chr(10), 0, offset) + 1} open"


@lru_cache(maxsize=16)
def _bracket_tokens(language: Language) -> re.Pattern[str]:
    """Brackets, and before them all that brackets may stand in without meaning."""
    marks = sorted(language.line_prefixes, key=len, reverse=True)
    parts = [language.block_comment, language.long_text, *(f"{re.escape(mark)}[^\\n]*" for mark in marks)]
    escape = r"\\(?:z\s*|.)"
    parts += [rf"\"(?:{escape}|[^\"\\\n])*\"", rf"'(?:{escape}|[^'\\\n])*'", r"[][(){}]"]
    try:
        return re.compile("|".join(part for part in parts if part), re.DOTALL)
    except re.error as error:
        what = f"block_comment and long_text cannot be read together: {error}"
        raise DataError(what, where=f"corpus.grammar of {language.name}") from error


def syntax(field: str, language: str | Language) -> Filter:
    """Refuses code that the grammar of `language` finds an error in; what is there besides the code is an error too.

    Raises:
        DataError: an unknown language.
    """
    known = find_language(language)

    def check(row: Mapping[str, Any]) -> str | None:
        problem = syntax_problem(_text(row, field), known)
        return None if problem is None else f"{field}, {problem}"

    return check


def _text(row: Mapping[str, Any], field: str) -> str:
    """The field as text; anything else counts as none, which `required` is there to refuse."""
    value = row.get(field)
    return value if isinstance(value, str) else ""


def _shown(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= SHOWN_CHARS else f"{flat[:SHOWN_CHARS]}…"
