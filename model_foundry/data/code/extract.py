"""The units of one source file: cut out by the grammar, with their comments and what they stand in.

Knows one text and one grammar; knows nothing of files or folders. Never recurses, so depth does not matter.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from model_foundry.data.code.comments import Block, CommentFinder, line_start
from model_foundry.data.code.languages import COMMENTS, CONTEXTS, TRIED_BYTES, Grammar, Match
from model_foundry.data.code.mend import mend
from model_foundry.data.code.units import CodeUnit, Skipped, UnitRules

if TYPE_CHECKING:
    import tree_sitter

MAX_NAME_CHARS = 120
MAX_FILE_CONTEXTS = 4


@dataclass(frozen=True, slots=True)
class FileUnits:
    """What one file gave: its units in order, and whether the grammar found errors in it."""

    units: tuple[CodeUnit, ...]
    has_error: bool


@dataclass(frozen=True, slots=True)
class _Found:
    """A match of a unit query, in bytes of the source; `start` is that of its line where it begins one."""

    kind: str
    name: str
    start: int
    end: int
    starts_line: bool
    has_error: bool
    context: str = ""


def extract_units(
    text: str, *, path: str, grammar: Grammar, rules: UnitRules, skipped: Skipped, seen: set[bytes]
) -> FileUnits | None:
    """The units of `text` that meet `rules`, the outer one where they lie in each other; None when it is no such code.

    Args:
        path: the file's name, for the units and for what is skipped.
        seen: digests of the code taken so far; added to.
    """
    if len(text) > TRIED_BYTES and not grammar.reads_as_code(text):
        return None
    source = _Source(text.encode(), path, grammar)
    if not source.is_code:
        return None
    kept: list[CodeUnit] = []
    covered = -1
    for found, of in _found(source, skipped):
        reason = "inside another unit" if found.start < covered else _refused(found, of, rules)
        if reason is not None:
            skipped.add(reason, f"{path}:{source.line_of(found.start)} {found.name}")
            continue
        unit = of.unit(found, rules)
        reason = _unit_refused(unit, rules, seen)
        if reason is not None:
            skipped.add(reason, f"{unit.place} {found.name}")
            continue
        kept.append(unit)
        covered = found.end
    return FileUnits(tuple(kept), source.has_error)


def _found(source: _Source, skipped: Skipped) -> list[tuple[_Found, _Source]]:
    """What stands in a text, with its source; where it has errors, also what stands there without its broken parts."""
    found = [(item, source) for item in source.found()]
    mended = mend(source.data, source.grammar) if source.has_error else None
    if mended is None:
        return found
    known = {(item.start, item.end) for item, _ in found}
    second = _Source(mended.data, source.path, source.grammar)
    found += [(item, second) for item in second.found() if (item.start, item.end) not in known]
    for start, end in mended.broken:
        if not any(item.has_error and item.start < end and item.end > start for item, _ in found):
            skipped.add("syntax error", f"{source.path}:{source.line_of(start)}")
    return sorted(found, key=lambda pair: (pair[0].start, -pair[0].end))


def _refused(found: _Found, source: _Source, rules: UnitRules) -> str | None:
    """Why a match is no unit to take, from its span alone."""
    if rules.kinds and found.kind not in rules.kinds:
        return f"of kind {found.kind}"
    if found.has_error:
        return "syntax error"
    if not found.starts_line:
        return "begins within a line"
    num_lines = source.line_of(found.end - 1) - source.line_of(found.start) + 1
    if num_lines < rules.min_lines and found.kind not in source.grammar.language.declarations:
        return f"under {rules.min_lines} lines"
    if num_lines > rules.max_lines:
        return f"over {rules.max_lines:,} lines"
    return f"over {rules.max_chars:,} characters" if source.num_chars(found) > rules.max_chars else None


def _unit_refused(unit: CodeUnit, rules: UnitRules, seen: set[bytes]) -> str | None:
    if rules.require_comment and not unit.comment:
        return "without a comment"
    if not rules.skip_duplicates:
        return None
    digest = bytes.fromhex(unit.sha256)
    if digest in seen:
        return "the same code as an earlier unit"
    seen.add(digest)
    return None


class _Source:
    """One text with its tree, its comments and its contexts."""

    def __init__(self, data: bytes, path: str, grammar: Grammar) -> None:
        self.grammar = grammar
        self.path = path
        self.data = data
        self._parsed = grammar.parse(data)
        leading = grammar.language.leading_nodes
        blocks = [
            Block(node.start_byte, node.end_byte, node.type in leading)
            for match in self._parsed.matches
            if match.role == COMMENTS
            for node in match.captures["comment"]
        ]
        self._comments = CommentFinder(self.data, blocks, grammar)
        self._newlines = [match.start() for match in re.finditer(b"\n", self.data)]

    @property
    def has_error(self) -> bool:
        return self._parsed.root.has_error

    @property
    def is_code(self) -> bool:
        return self._parsed.is_code

    def line_of(self, offset: int) -> int:
        """The line of a byte, counted from 1."""
        return bisect_left(self._newlines, offset) + 1

    def num_chars(self, found: _Found) -> int:
        return len(self.data[found.start : found.end].decode())

    def unit(self, found: _Found, rules: UnitRules) -> CodeUnit:
        code = self.data[found.start : found.end]
        return CodeUnit(
            path=self.path,
            language=self.grammar.language.name,
            kind=found.kind,
            name=found.name,
            code=code.decode(),
            comment=self._comments.before(found.start, rules.comments),
            first_line=self.line_of(found.start),
            last_line=self.line_of(found.end - 1),
            sha256=hashlib.sha256(code).hexdigest(),
            context=found.context,
        )

    def found(self) -> Iterator[_Found]:
        """Every match in the order of the source, outer ones first."""
        said_of_all, contexts = self._contexts()
        standing: list[tuple[int, str]] = []
        waiting = 0
        for kind, name, node in self._matches():
            while waiting < len(contexts) and contexts[waiting][0] < node.start_byte:
                standing = [item for item in standing if item[0] > contexts[waiting][0]]
                standing.append(contexts[waiting][1:])
                waiting += 1
            around = [header for end, header in standing if end >= node.end_byte]
            start, end = self._comments.lead(node.start_byte), node.end_byte
            begin = line_start(self.data, start)
            starts_line = not self.data[begin:start].strip()
            while end > start and self.data[end - 1 : end].isspace():
                end -= 1
            yield _Found(
                kind=kind,
                name=name,
                start=begin if starts_line else start,
                end=end,
                starts_line=starts_line,
                has_error=node.has_error,
                context=", ".join(dict.fromkeys([*said_of_all, *around])),
            )

    def _matches(self) -> list[tuple[str, str, tree_sitter.Node]]:
        """(kind, name, node) in order. One for each place, and for each name the longest."""
        places: dict[tuple[int, int], Match] = {}
        for match in self._parsed.matches:
            if "unit" in match.captures:
                span = match.captures["unit"][0].byte_range
                if span not in places or match.index < places[span].index:
                    places[span] = match
        best: dict[int, tuple[int, Match]] = {}
        for (start, end), match in places.items():
            named = match.captures.get("name")
            key = named[0].start_byte if named else start
            if key not in best or end - start > best[key][0]:
                best[key] = (end - start, match)
        chosen = sorted(best.values(), key=lambda item: (item[1].captures["unit"][0].start_byte, -item[0]))
        return [(*self._named(match), match.captures["unit"][0]) for _, match in chosen]

    def _named(self, match: Match) -> tuple[str, str]:
        """A unit's kind, which its name may tell better, and its name: the file's where the code gives none."""
        named = match.captures.get("name")
        name = self._text(named[0]).strip("\"'") if named else PurePosixPath(self.path).stem
        pattern = self.grammar.callback_names
        if pattern is None or match.role in self.grammar.language.declarations:
            return match.role, name
        return "callback" if pattern.fullmatch(re.split(r"[.:]", name)[-1]) else match.role, name

    def _contexts(self) -> tuple[list[str], list[tuple[int, int, str]]]:
        """What is said of the whole file, and (start, end, first line) of what units may stand in, outer ones first."""
        said_of_all: list[str] = []
        spans: dict[int, tuple[int, int, str]] = {}
        for match in self._parsed.matches:
            if match.role != CONTEXTS:
                continue
            said_of_all += [self._text(node) for node in match.captures.get("file", ())]
            for node in match.captures.get("context", ()):
                # `local M = {}` is found as declaration and as assignment: both end at one place, the outer one counts.
                outer = spans.get(node.end_byte)
                if outer is None or node.start_byte < outer[0]:
                    spans[node.end_byte] = (node.start_byte, node.end_byte, self._text(node).rstrip(" \t{:=("))
        return said_of_all[:MAX_FILE_CONTEXTS], sorted(spans.values(), key=lambda span: (span[0], -span[1]))

    def _text(self, node: tree_sitter.Node) -> str:
        """A node's first line, shortened."""
        end = min(node.end_byte, node.start_byte + 4 * MAX_NAME_CHARS)
        first = self.data[node.start_byte : end].decode(errors="ignore").strip().splitlines() or [""]
        return first[0].strip()[:MAX_NAME_CHARS]
