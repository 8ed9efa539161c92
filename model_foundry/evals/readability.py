"""How hard an English text is to read: Flesch's reading ease (1948) and the grade of Kincaid et al. (1975).

Words and sentences are counted by textstat. Its syllables are not used: they come from a dictionary that it downloads
when it is first asked, so an evaluation would need a network and differ between machines. Ours are counted by rule.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from typing import Any

from model_foundry.errors import MissingExtraError

_GROUPS = re.compile(r"[aeiouy]+")
_SILENT = (r"[^aeiouy]e$", r"[^aeiouytd]ed$", r"[^aeiouyscxzg]es$")
_SOUNDED = (r"[^aeiouy]le$", r"(?:sh|ch|[^aeiouy]l)es$")
_SPLIT = re.compile(
    r"i[ao](?!u)(?<!ti[ao])(?<!ci[ao])(?<!si[ao])(?<!gi[ao])(?<!xi[ao])"
    r"|(?:eo|ua|uou|iu)(?!$)(?<!geo)(?<!qua)(?<!gua)|[^aeiou]y(?=ing)|(?<=s)m$|e(?=ing$)"
)


@dataclass(frozen=True, slots=True)
class Readability:
    """`ease`: 100 reads at a glance, 30 is a law text, below is worse. `grade`: years of school."""

    ease: float
    grade: float


@cache
def _textstat() -> Any:
    try:
        return import_module("textstat").textstat
    except ImportError as error:
        raise MissingExtraError("textstat", "eval") from error


def readability(text: str) -> Readability | None:
    """Of an English text; None for a text without words.

    Raises:
        MissingExtraError: textstat is not installed.
    """
    counter = _textstat()
    words = re.findall(r"[A-Za-z][A-Za-z'’-]*", text)
    if not words:
        return None
    num_words, num_sentences = counter.lexicon_count(text), max(1, counter.sentence_count(text))
    per_sentence = num_words / num_sentences
    per_word = sum(num_syllables(word) for word in words) / len(words)
    return Readability(
        ease=206.835 - 1.015 * per_sentence - 84.6 * per_word, grade=0.39 * per_sentence + 11.8 * per_word - 15.59
    )


@lru_cache(maxsize=16384)
def num_syllables(word: str) -> int:
    """Syllables of an English word by its vowels: right for nine of ten words of the CMU dictionary, and as often too
    few as too many.
    """
    parts = [re.sub("[^a-z]", "", part) for part in re.split("[-’']", word.lower())]
    return max(1, sum(_syllables(part) for part in parts if len(part) > 1 or part in ("a", "i")))


def _syllables(word: str) -> int:
    count = len(_GROUPS.findall(word))
    if len(word) > 3:
        is_sounded = any(re.search(end, word) for end in _SOUNDED)
        if not is_sounded and any(re.search(end, word) for end in _SILENT):
            count -= 1
        count += len(_SPLIT.findall(word))
    return max(1, count)
