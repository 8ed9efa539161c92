"""What the gate says: checks with value, bound, evidence and examples; and the thresholds that it was told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from model_foundry.types import Check

MAX_EXAMPLES = 5
EXCERPT_CHARS = 80


@dataclass(frozen=True, slots=True)
class GatePolicy:
    """What is allowed. Shares are of all rows; see the section `gate` of a training configuration for each."""

    min_cases: int = 2
    max_lost_share: float = 0.1
    max_duplicate_share: float = 0.2
    similarity: float = 0.8
    max_overlap_share: float = 0.0
    max_short_overlap_share: float = 0.05
    max_quoted_share: float = 0.0
    max_empty_share: float = 0.0
    max_mismatch_share: float = 0.01
    max_special_share: float = 0.01
    max_damaged_share: float = 0.05
    unread_fields: tuple[str, ...] = ()
    allow_control_tokens: bool = False


@dataclass(frozen=True, slots=True)
class Example:
    """One row that shows what a check found: where it stands, what is wrong there, a piece of its text."""

    where: str
    problem: str
    excerpt: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}" + (f" | {self.excerpt}" if self.excerpt else "")


@dataclass(frozen=True, slots=True)
class GateCheck:
    """One check.

    Attributes:
        name: short and stable, for programs.
        passed: whether the value keeps to the bound; true as well where there was nothing to judge.
        value: what was measured; None where there was nothing to measure.
        bound: what it must keep to, in words.
        evidence: a sentence or two on what was looked at.
        examples: the first rows found, at most `MAX_EXAMPLES`.
    """

    name: str
    passed: bool
    value: float | str | None
    bound: str
    evidence: str
    examples: tuple[Example, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        values = Check(self.name, self.passed, self.value, self.bound, self.evidence).as_dict()
        examples = [{"where": e.where, "problem": e.problem, "excerpt": e.excerpt} for e in self.examples]
        return {**values, "examples": examples}

    def sentence(self) -> str:
        """What failed, in a line: name, evidence, the first row."""
        first = f" For example {self.examples[0]}" if self.examples else ""
        return f"{self.name}: {self.evidence}{first}"


@dataclass(frozen=True, slots=True)
class GateReport:
    """Every check, and facts that nobody judges (format, encoding, counts)."""

    checks: tuple[GateCheck, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def failed(self) -> tuple[GateCheck, ...]:
        return tuple(check for check in self.checks if not check.passed)

    def as_dict(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "checks": [check.as_dict() for check in self.checks],
            "facts": dict(self.facts),
        }


def excerpt(text: str, *, around: int = 0) -> str:
    """A piece of a text on one line, from a little before character `around`."""
    start = max(0, around - EXCERPT_CHARS // 4)
    piece = " ".join(text[start : start + 2 * EXCERPT_CHARS].split())
    cut = len(piece) > EXCERPT_CHARS or start + 2 * EXCERPT_CHARS < len(text)
    return ("…" if start else "") + piece[:EXCERPT_CHARS] + ("…" if cut else "")


def at_most(share: float, of: str) -> str:
    """A bound in words: `at most 10 % of rows`, `0 % of rows`."""
    return f"at most {share_text(share)} of {of}" if share else f"0 % of {of}"


def share_text(share: float) -> str:
    """A share in per cent, with as many digits as it takes not to read 0 % where there is something."""
    percent = 100 * share
    if percent and percent < 0.95:
        return f"{percent:.2g} %"
    return f"{percent:.0f} %" if percent == round(percent) or percent >= 10 else f"{percent:.1f} %"
