"""What an answer says for itself and against the expected one: a row's statistics for each metric of texts.

Pure text in, numbers out. BLEU, ROUGE and the counts behind readability are their libraries'; nothing here knows
models.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from model_foundry.data.code.syntax import syntax_problem
from model_foundry.data.filters import refusal
from model_foundry.errors import MissingExtraError
from model_foundry.evals.measures import bleu_scorer
from model_foundry.evals.metrics import METRICS, normalise, occurs, word_f1, words
from model_foundry.evals.readability import readability

Stats = Sequence[float]
_FENCE = re.compile(
    r"^[ \t]*(?:(?P<ticks>`{3,})[^`\n]*|(?P<tildes>~{3,})[^\n]*)\n(?P<code>.*?)"
    r"(?:^[ \t]*(?(ticks)(?P=ticks)`*|(?P=tildes)~*)[ \t\r]*$|\Z)",
    re.M | re.S,
)
"""A fenced block of CommonMark: three marks or more, any words after them, to as many of the same or the end."""
_MAX_FUZZY_CHARS = 4000


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a row wants of its answer.

    Attributes:
        answers: any of these is right; the best score counts.
        keywords: what it should name.
        words: least and most words.
        language: of code that it should hold.
    """

    answers: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    words: tuple[int, int] | None = None
    language: str | None = None


def _best(score: Callable[[str, str], float]) -> Callable[[str, Wanted], Stats | None]:
    def stats(answer: str, wanted: Wanted) -> Stats | None:
        return (max(score(answer, each) for each in wanted.answers), 1.0) if wanted.answers else None

    return stats


def fuzzy(answer: str, expected: str) -> float:
    """Ratcliff and Obershelp's similarity (1988) of the normalised texts, from 0 to 1; 4,000 characters at most."""
    ours, theirs = normalise(answer)[:_MAX_FUZZY_CHARS], normalise(expected)[:_MAX_FUZZY_CHARS]
    if not ours or not theirs:
        return float(ours == theirs)
    # The ratio depends on the order of its arguments by a hair; the better one of both does not.
    return max(SequenceMatcher(None, a, b, autojunk=False).ratio() for a, b in ((ours, theirs), (theirs, ours)))


@cache
def _rouge() -> Any:
    try:
        scorer, tokenizers = import_module("rouge_score.rouge_scorer"), import_module("rouge_score.tokenizers")
    except ImportError as error:
        raise MissingExtraError("rouge-score", "eval") from error
    return scorer.RougeScorer(["rouge1", "rougeL"], tokenizer=_AnyScript(tokenizers.DefaultTokenizer(use_stemmer=True)))


class _AnyScript:
    """rouge-score's own words of text in ASCII, which are all that it knows; the others as `words` has them."""

    def __init__(self, plain: Any) -> None:
        self._plain = plain

    def tokenize(self, text: str) -> list[str]:
        if text.isascii():
            return self._plain.tokenize(text)
        return [part for word in words(text) for part in (self._plain.tokenize(word) if word.isascii() else [word])]


def rouge(answer: str, expected: str, *, kind: str) -> float:
    """ROUGE-1 or ROUGE-L F1 (Lin 2004) with Porter's stemmer, by rouge-score; words of any script."""
    return float(_rouge().score(expected, answer)[kind].fmeasure)


def bleu_stats(answer: str, wanted: Wanted) -> Stats | None:
    """Lengths and n-gram counts as sacrebleu counts them, to be summed over the corpus."""
    if not wanted.answers:
        return None
    score = bleu_scorer().sentence_score(answer, list(wanted.answers))
    return score.sys_len, score.ref_len, *score.counts, *score.totals


def _keywords(answer: str, wanted: Wanted) -> Stats | None:
    if not wanted.keywords:
        return None
    text = normalise(answer)
    return sum(occurs(normalise(word), text) for word in wanted.keywords) / len(wanted.keywords), 1.0


def _reading_ease(answer: str, wanted: Wanted) -> Stats | None:
    found = readability(answer)
    return None if found is None else (found.ease, 1.0)


def _grade(answer: str, wanted: Wanted) -> Stats | None:
    found = readability(answer)
    return None if found is None else (found.grade, 1.0)


def _length(answer: str, wanted: Wanted) -> Stats | None:
    """1 within the band, else how far off in proportion; without a band it is half to twice the expected answer."""
    band = wanted.words
    if band is None and wanted.answers:
        sizes = [len(each.split()) for each in wanted.answers]
        band = max(1, min(sizes) // 2), 2 * max(sizes)
    if band is None:
        return None
    num_words = len(answer.split())
    low, high = band
    if num_words < low:
        return num_words / low, 1.0
    return (1.0 if num_words <= high else high / num_words), 1.0


def code_of(answer: str) -> str:
    """The first fenced block, one that is not closed included; the whole answer where there is none."""
    match = _FENCE.search(answer)
    return match["code"] if match else answer


def _syntax(answer: str, wanted: Wanted) -> Stats | None:
    if wanted.language is None:
        return None
    return float(syntax_problem(code_of(answer), wanted.language) is None), 1.0


ANSWER_SCORES: Mapping[str, Callable[[str, Wanted], Stats | None]] = {
    **{name: _best(score) for name, score in METRICS.items()},
    "fuzzy": _best(fuzzy),
    "bleu": bleu_stats,
    "rouge_1": _best(lambda answer, expected: rouge(answer, expected, kind="rouge1")),
    "rouge_l": _best(lambda answer, expected: rouge(answer, expected, kind="rougeL")),
    "keywords": _keywords,
    "reading_ease": _reading_ease,
    "grade": _grade,
    "length": _length,
    "syntax": _syntax,
}
"""A row's statistics by the name of the metric; None where the row has not what it needs."""


def agreement(texts: Sequence[str]) -> float:
    """Mean word F1 of all pairs of texts, from 0 to 1."""
    pairs = [(a, b) for index, a in enumerate(texts) for b in texts[index + 1 :]]
    return sum(word_f1(a, b) for a, b in pairs) / len(pairs)


_REFUSES = refusal("text")


def is_refusal(text: str) -> bool:
    """Whether an answer begins by declining."""
    return bool(text.strip()) and _REFUSES({"text": text}) is not None


_KIND, _UNKIND = (
    frozenset((Path(__file__).parent / "words" / f"{name}.txt").read_text(encoding="utf-8").split())
    for name in ("kind", "unkind")
)


def valence(text: str) -> float:
    """Kind words minus unkind ones, a hundred words; from two short lists of our own, so a coarse measure."""
    words = normalise(text).split()
    return 100 * sum((word in _KIND) - (word in _UNKIND) for word in words) / len(words) if words else 0.0
