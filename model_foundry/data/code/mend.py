"""A text without its broken parts, so that what stands beside a syntax error is still read as what it is.

An unclosed bracket makes a grammar swallow the functions after it. Where a line can only begin something new at the top
level, the text is cut; parts that are broken alone are blanked out, byte for byte, so that every offset stays.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from model_foundry.data.code.languages import Grammar


@dataclass(frozen=True, slots=True)
class Mended:
    """The text with broken parts blank, and where those are, in bytes."""

    data: bytes
    broken: tuple[tuple[int, int], ...]


def mend(data: bytes, grammar: Grammar) -> Mended | None:
    """Blank the broken parts of a text that has errors; None where that would leave nothing, or the same text."""
    if grammar.restarts is None:
        return None
    borders = _borders(data, grammar.restarts, grammar)
    spans = list(zip(borders, [*borders[1:], len(data)], strict=True))
    broken = [(start, end) for start, end in spans if grammar.parse(data[start:end]).root.has_error]
    if not broken or len(broken) == len(spans):
        return None
    mended = bytearray(data)
    for start, end in broken:
        mended[start:end] = re.sub(rb"[^\r\n]", b" ", data[start:end])
    return Mended(bytes(mended), tuple(broken))


def _borders(data: bytes, restarts: re.Pattern[str], grammar: Grammar) -> list[int]:
    """Where parts begin: at each restart, or at the comments and annotations above it."""
    marks = tuple(mark.encode() for mark in grammar.language.line_prefixes)
    borders = [0]
    for match in re.finditer(restarts.pattern.encode(), data, restarts.flags & re.MULTILINE):
        border = match.start()
        while marks and border > borders[-1]:
            above = data.rfind(b"\n", 0, border - 1) + 1
            if not data[above:border].startswith(marks):
                break
            border = above
        if border > borders[-1]:
            borders.append(border)
    return borders
