"""What a corpus of code is made of: units with where they stand, the rules they must meet, and what was left out.

Values only; knows nothing of grammars or files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

MAX_EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class CodeUnit:
    """A piece of a source file that can be asked about alone.

    Attributes:
        path: the file below its root, with forward slashes.
        kind: function, method, callback, signal, or what the language's table names.
        name: as written: `update`, `Sector:update`, `body_entered`.
        code: the source from the first character of its first line to its last, untouched (line endings too).
        comment: the comments right before it without their marks, or "".
        first_line, last_line: counted from 1; the comment is not among them.
        sha256: of `code` in UTF-8, hexadecimal.
        context: the class, table, namespace or base class that it stands in, or "".
    """

    path: str
    language: str
    kind: str
    name: str
    code: str
    comment: str
    first_line: int
    last_line: int
    sha256: str
    context: str = ""

    @property
    def num_lines(self) -> int:
        return self.last_line - self.first_line + 1

    @property
    def place(self) -> str:
        return f"{self.path}:{self.first_line}"


@dataclass(frozen=True, slots=True)
class UnitRules:
    """Which units are taken. An empty `kinds` takes every kind of the language.

    Attributes:
        comments: styles that count as a unit's documentation: doc, line, block.
        min_lines: declarations of one line (signals) are exempt.
        max_lines, max_chars: of a longer unit, the units inside it are taken.
    """

    kinds: tuple[str, ...] = ()
    comments: tuple[str, ...] = ("doc", "line", "block")
    require_comment: bool = False
    min_lines: int = 1
    max_lines: int = 1_000_000
    max_chars: int = 10_000_000
    skip_duplicates: bool = False


class Skipped:
    """What was left out: how many by reason, and the first few places."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = {}

    def add(self, reason: str, place: str) -> None:
        self._counts[reason] += 1
        examples = self._examples.setdefault(reason, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(place)

    @property
    def counts(self) -> Mapping[str, int]:
        """Reason -> number, most frequent first."""
        return dict(sorted(self._counts.items(), key=lambda item: (-item[1], item[0])))

    @property
    def examples(self) -> Mapping[str, list[str]]:
        """Reason -> the first places."""
        return {reason: list(self._examples[reason]) for reason in self.counts}
