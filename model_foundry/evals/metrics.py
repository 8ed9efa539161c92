"""Scores of one answer against the expected one, each between 0 and 1.

Pure text in, numbers out: knows nothing of models, runs or files.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

_MEANT = "%\u2030"
"""Punctuation to Unicode that carries meaning all the same."""
_QUOTES = "`"
"""A symbol to Unicode that only sets code apart."""
_ENDS_WORDS = "+#%\u2030\u266f"
"""Those that belong to the word before them (C++, F#)."""
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U000323af]"
)
"""Thai, Lao, Burmese, Khmer, kana and Han: scripts that put no spaces between words."""


@lru_cache(maxsize=8192)
def normalise(text: str) -> str:
    """What must be equal for two answers to count as the same.

    Case, punctuation and white space are set aside; letters, digits, marks and symbols of any script stay, and so does
    the order of the words. A symbol is a word of its own ("x+y" is "x + y", "5%" is "5 %"), or the end of one (C++).
    Compatible spellings of one character (ligatures, full-width forms) are one. Where nothing would be left ("...",
    "?"), the text itself without white space counts, so that two marks are not both "".
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    # An apostrophe joins (don't = dont); a mark inside a number is part of it (3.5, 1,000), any other one separates.
    joined = folded.replace("'", "").replace("\u2019", "").replace("\u2044", "/")
    kept = "".join(_kept(joined, index) for index in range(len(joined)))
    return " ".join(part for word in kept.split() for part in _parts(word)) or "".join(folded.split())


def _kept(text: str, index: int) -> str:
    character = text[index]
    category, following = unicodedata.category(character)[0], text[index + 1 : index + 2]
    if category in "LNM" or character in _MEANT or (character == "!" and following == "="):
        return character
    if character == "#":  # after a letter alone (C#), else it is a heading's or a number's
        return character if index > 0 and unicodedata.category(text[index - 1])[0] in "LM" else " "
    follows_digit, precedes_digit = index > 0 and text[index - 1].isdigit(), following.isdigit()
    if character in ".,:/*" and follows_digit and precedes_digit:
        return character
    # Minus signs a number, but only where no word ends before it: "-5", not "page-5".
    begins_word = index == 0 or text[index - 1].isspace()
    if character in "-\u2212" and begins_word and precedes_digit:
        return "-"
    return character if category == "S" and character not in _QUOTES else " "


def _parts(word: str) -> list[str]:
    """A word and the symbols in it, apart; a symbol that ends a word of letters stays with it."""
    if word.isalnum():
        return [word]
    parts: list[tuple[str, bool]] = []
    for character in word:
        category = unicodedata.category(character)[0]
        is_symbol = category == "S" or character in _MEANT or character == "!"
        ends = bool(parts) and parts[-1][0].endswith("#")  # it is kept where it ends a word, whatever follows
        if parts and (category == "M" or character == "#" or (parts[-1][1] == is_symbol and not ends)):
            parts[-1] = parts[-1][0] + character, parts[-1][1]
        else:
            parts.append((character, is_symbol))
    joined: list[str] = []
    for place, (part, is_symbol) in enumerate(parts):
        is_last = place == len(parts) - 1
        if is_symbol and joined and _ends_word(joined[-1], part) and (is_last or part != "+"):
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def _ends_word(word: str, symbols: str) -> bool:
    if unicodedata.category(word[-1])[0] not in "LM":
        return False
    return all(character in _ENDS_WORDS for character in symbols)


def occurs(wanted: str, text: str) -> bool:
    """Whether normalised words stand in a normalised text side by side and whole: "12" is not in "120", nor C in C++.

    In scripts that put no spaces between words, every character may begin or end one.
    """
    start = text.find(wanted)
    while start >= 0:
        if _parted(text, start) and _parted(text, start + len(wanted)):
            return True
        start = text.find(wanted, start + 1)
    return False


def _parted(text: str, place: int) -> bool:
    """Whether a word may begin or end at a place of a normalised text."""
    if place in (0, len(text)):
        return True
    sides = text[place - 1 : place + 1]
    return unicodedata.category(sides[1])[0] != "M" and (" " in sides or _UNSPACED.search(sides) is not None)


def exact_match(answer: str, expected: str) -> float:
    """1.0 when both normalise to the same text. An empty answer matches only an empty expectation."""
    return float(normalise(answer) == normalise(expected))


def words(text: str) -> list[str]:
    """Normalised; in scripts that put no spaces between words each character, with its marks, is one."""
    found: list[str] = []
    for word in normalise(text).split():
        begins = True
        for character in word:
            is_unspaced = _UNSPACED.match(character) is not None
            is_mark = unicodedata.category(character)[0] == "M"
            if begins or (not is_mark and (is_unspaced or _UNSPACED.match(found[-1]))):
                found.append(character)
            else:
                found[-1] += character
            begins = False
    return found


def word_f1(answer: str, expected: str) -> float:
    """Harmonic mean of precision and recall over the words, counted with repetition (SQuAD: Rajpurkar et al. 2016)."""
    ours, theirs = Counter(words(answer)), Counter(words(expected))
    if not ours or not theirs:
        return float(ours == theirs)
    num_common = sum((ours & theirs).values())
    # 2PR / (P + R), with the division done once: equal answers give exactly 1.
    return 2 * num_common / (sum(ours.values()) + sum(theirs.values()))


def contains(answer: str, expected: str) -> float:
    """1.0 when the expected words occur in the answer (see `occurs`)."""
    wanted = normalise(expected)
    if not wanted:
        return exact_match(answer, expected)
    return float(occurs(wanted, normalise(answer)))


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
