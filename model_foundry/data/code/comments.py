"""The comment that documents a unit: which comments stand right before it, and what they say without their marks."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from model_foundry.data.code.languages import Grammar

_LICENCE = re.compile(r"copyright|licen[sc]ed? |SPDX-|all rights reserved", re.IGNORECASE)
_DECORATION = re.compile(r"^[-=*#~_/+]{3,}\s*|\s*[-=*#~_/+]{3,}$")
_DIRECTIVE = re.compile(
    r"\s*(luacheck|stylua|selene|gdlint|warning-ignore|warnings-disable|vim?|ex|region|endregion|@diagnostic)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Block:
    """A comment, or a node that leads a unit (an annotation), in bytes of the source."""

    start: int
    end: int
    leads: bool


class CommentFinder:
    """The comments of one source, found by where they end."""

    def __init__(self, data: bytes, blocks: Sequence[Block], grammar: Grammar) -> None:
        self._data = data
        self._blocks = sorted(blocks, key=lambda block: (block.end, block.start))
        self._ends = [block.end for block in self._blocks]
        self._grammar = grammar

    def lead(self, start: int) -> int:
        """Where a unit begins once the annotations right before it are counted in."""
        index = bisect_right(self._ends, start) - 1
        while index >= 0 and self._blocks[index].leads and self._adjoins(self._blocks[index], start):
            start = self._blocks[index].start
            index -= 1
        return start

    def before(self, start: int, styles: Sequence[str]) -> str:
        """What the comments right above the line that begins at byte `start` say; "" for none.

        They begin their lines, no deeper than the unit, and no blank line is between. A licence at the top of the file
        is no documentation.
        """
        line = self._data[start : start + 512]
        indent = len(line) - len(line.lstrip(b" \t"))
        found: list[str] = []
        index = bisect_right(self._ends, start) - 1
        while index >= 0:
            block = self._blocks[index]
            index -= 1
            if block.leads or not self._adjoins(block, start):
                break
            before = self._indent(block.start)
            if before is None or before > indent:
                break
            start = block.start
            found.append(self._data[block.start : block.end].decode("utf-8"))
        text = "\n".join(self._said(comment) for comment in reversed(found) if self._style(comment) in styles)
        if not self._data[:start].strip() and _LICENCE.search(text):
            return ""
        lines = [_DECORATION.sub("", line).rstrip() for line in text.splitlines() if not _DIRECTIVE.match(line)]
        return "\n".join(lines).strip("\n")

    def _adjoins(self, block: Block, start: int) -> bool:
        gap = self._data[block.end : start]
        return block.start < start and not gap.strip() and gap.count(b"\n") <= 1

    def _indent(self, start: int) -> int | None:
        """Bytes of white space before `start` on its line; None when something else stands there."""
        begin = line_start(self._data, start)
        return None if self._data[begin:start].strip() else start - begin

    def _style(self, comment: str) -> str:
        if self._grammar.block_comment is not None and self._grammar.block_comment.fullmatch(comment):
            return "block"
        return "doc" if comment.startswith(self._grammar.language.doc_prefixes or ("\0",)) else "line"

    def _said(self, comment: str) -> str:
        """The comment's words: marks off, one space after them too; a block's lines without common indentation."""
        block = None if self._grammar.block_comment is None else self._grammar.block_comment.fullmatch(comment)
        if block is not None:
            return "\n".join(line.strip() for line in block["text"].splitlines()).strip("\n")
        language = self._grammar.language
        prefix = next((mark for mark in language.doc_prefixes + language.line_prefixes if comment.startswith(mark)), "")
        return comment[len(prefix) :].removeprefix(" ").rstrip()


def line_start(data: bytes, offset: int) -> int:
    """Where the line of `offset` begins: after the last line feed or carriage return."""
    return max(data.rfind(b"\n", 0, offset), data.rfind(b"\r", 0, offset)) + 1
