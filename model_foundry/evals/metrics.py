"""Scores of one answer against the expected one, each between 0 and 1.

Pure text in, numbers out: knows nothing of models, runs or files.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache


@lru_cache(maxsize=8192)
def normalise(text: str) -> str:
    """What must be equal for two answers to count as the same.

    Case, punctuation and white space are set aside; letters, digits and marks of any script stay, and so does the
    order of the words. Compatible spellings of one character (ligatures, full-width forms) are one. Where nothing
    would be left ("->", "+"), the text itself without white space counts, so that two symbols are not both "".
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    # An apostrophe joins (don't = dont); a mark inside a number is part of it (3.5, 1,000), any other one separates.
    joined = folded.replace("'", "").replace("\u2019", "")
    kept = "".join(_kept(joined, index) for index in range(len(joined)))
    return " ".join(kept.split()) or "".join(folded.split())


def _kept(text: str, index: int) -> str:
    character = text[index]
    if unicodedata.category(character)[0] in "LNM":
        return character
    follows_digit = index > 0 and text[index - 1].isdigit()
    precedes_digit = index + 1 < len(text) and text[index + 1].isdigit()
    if character in ".,:" and follows_digit and precedes_digit:
        return character
    # Minus signs a number, but only where no word ends before it: "-5", not "page-5".
    begins_word = index == 0 or text[index - 1].isspace()
    if character in "-\u2212" and begins_word and precedes_digit:
        return "-"
    return " "


def exact_match(answer: str, expected: str) -> float:
    """1.0 when both normalise to the same text. An empty answer matches only an empty expectation."""
    return float(normalise(answer) == normalise(expected))


def word_f1(answer: str, expected: str) -> float:
    """Harmonic mean of precision and recall over the words, counted with repetition (SQuAD: Rajpurkar et al. 2016)."""
    ours, theirs = Counter(normalise(answer).split()), Counter(normalise(expected).split())
    if not ours or not theirs:
        return float(ours == theirs)
    num_common = sum((ours & theirs).values())
    # 2PR / (P + R), with the division done once: equal answers give exactly 1.
    return 2 * num_common / (sum(ours.values()) + sum(theirs.values()))


def contains(answer: str, expected: str) -> float:
    """1.0 when the expected words occur in the answer, side by side and whole ("12" is not in "120")."""
    wanted = normalise(expected)
    if not wanted:
        return exact_match(answer, expected)
    return float(f" {wanted} " in f" {normalise(answer)} ")


METRICS: Mapping[str, Callable[[str, str], float]] = {
    "exact": exact_match,
    "f1": word_f1,
    "contains": contains,
}


@dataclass(frozen=True, slots=True)
class Score:
    """The scores of one answer, each in [0, 1]."""

    exact: float
    f1: float
    contains: float

    def as_dict(self) -> dict[str, float]:
        return {"exact": self.exact, "f1": self.f1, "contains": self.contains}


def score(answer: str, expected: str) -> Score:
    """Every metric of one answer."""
    return Score(**{name: metric(answer, expected) for name, metric in METRICS.items()})


def mean_scores(scores: Sequence[Score]) -> dict[str, float]:
    """The mean of every metric over the cases; empty for no cases."""
    if not scores:
        return {}
    return {name: sum(one.as_dict()[name] for one in scores) / len(scores) for name in METRICS}
