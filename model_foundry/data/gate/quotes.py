"""Held-out questions and answers that stand inside a longer row: quoted in a talk, a text, an example in a prompt.

Found by runs of words (`contained.find_contained`), and only where all of a question or an answer stands there: rows
about the same thing share words, and are what training is for. A short question must also end where the sentence that
quotes it ends, or the longer question that begins like it would be taken for it. Knows texts; knows no rows.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from model_foundry.data.contained import MIN_TOKENS, find_contained
from model_foundry.data.shingles import hash_tokens, normalise

MIN_ANSWER_TOKENS = 50
"""Shorter answers are facts and phrases that many rows may give."""
SHORT_QUESTION_WORDS = 20
_SENTENCE_ENDS = r"(?=[\s\"'”’»)\]*_`]*(?:[\n.?!:;。？！：；]|$))"


@dataclass(frozen=True, slots=True)
class Quote:
    """Text `index` holds the question or the answer (`what`) of held-out row `other`."""

    index: int
    other: int
    what: str


def find_quotes(
    texts: Sequence[str], wholes: Sequence[str], *, questions: Sequence[str], answers: Sequence[str]
) -> list[Quote]:
    """At most one quote for each text, in their order.

    Args:
        texts: all that is said in each training row.
        wholes: all that is said in each held-out row, looked for where there is no question that could be.
        questions, answers: of each held-out row; none at all where only whole rows count.
    """
    wanted: list[tuple[int, str, str]] = []  # held-out row, what of it, the text
    for other, whole in enumerate(wholes):
        if not questions or _num_tokens(questions[other]) < MIN_TOKENS:
            wanted.append((other, "question and answer", whole))
        else:
            wanted.append((other, "question", questions[other]))
    # An answer that several questions share is a phrase (I cannot help with that), and no leak.
    common = Counter(normalise(answer) for answer in answers)
    for other, answer in enumerate(answers):
        if common[normalise(answer)] == 1 and _num_tokens(answer) >= MIN_ANSWER_TOKENS:
            wanted.append((other, "answer", answer))
    quotes: dict[int, Quote] = {}
    for found in find_contained(texts, [text for _, _, text in wanted]):
        other, what, text = wanted[found.other]
        if found.exact and found.index not in quotes and _stands_alone(texts[found.index], text):
            quotes[found.index] = Quote(found.index, other, what)
    return list(quotes.values())


def _num_tokens(text: str) -> int:
    return int(hash_tokens([text]).counts[0])


def _stands_alone(text: str, quoted: str) -> bool:
    """Whether a sentence ends where the quoted words end; of many words it is not asked."""
    words = quoted.split()
    if len(words) >= SHORT_QUESTION_WORDS:
        return True
    words[-1] = words[-1].rstrip(".?!:;。？！：；") or words[-1]
    pattern = r"(?<!\w)" + r"\s+".join(map(re.escape, words)) + _SENTENCE_ENDS
    return re.search(pattern, text, re.IGNORECASE) is not None
