"""Which rows repeat an earlier one: alike as a whole, and not merely the same answer to another question.

A long answer outweighs its question, so rows that ask for the same code in several ways look alike as texts. They are
what reverse prompting makes, and no duplicates: of rows that are only alike, the questions must be alike as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from model_foundry.data.dedup import Duplicates, find_duplicates

MIN_QUESTION_LIKENESS = 0.5
MAX_QUESTIONS_A_GROUP = 50


def find_repeats(texts: Sequence[str], questions: Sequence[str], *, threshold: float) -> Duplicates:
    """Duplicates among rows.

    Args:
        texts: what each row is compared by.
        questions: what each row asks; empty where it asks nothing, and only the text counts.
        threshold: the Jaccard similarity from which texts are alike. Questions are from half of their words on.
    """
    return only_same_questions(find_duplicates(texts, threshold=threshold), questions)


def only_same_questions(found: Duplicates, questions: Sequence[str] | Mapping[int, str]) -> Duplicates:
    """Duplicates without the rows that are only alike and ask something else.

    Args:
        questions: what each row asks that is in a group of several.
    """
    first, exact, similarity = found.first.copy(), found.exact.copy(), found.similarity.copy()
    asked: dict[int, list[int]] = {}  # by a group's first row: rows of it that ask different things
    for index in np.flatnonzero(found.first != np.arange(found.num_texts)).tolist():
        group = int(found.first[index])
        others = asked.setdefault(group, [group])
        same = next((other for other in others if _asks_alike(questions[index], questions[other])), None)
        if same is not None:
            first[index] = same
        elif not exact[index]:
            first[index], similarity[index] = index, 0.0
            if len(others) < MAX_QUESTIONS_A_GROUP:
                others.append(index)
    return Duplicates(found.num_texts, first, exact, similarity)


def _asks_alike(question: str, other: str) -> bool:
    """Whether two questions have at least half of their words in common, or there is none to compare."""
    if not question or not other or question == other:
        return True
    words, others = set(question.lower().split()), set(other.lower().split())
    return len(words & others) >= MIN_QUESTION_LIKENESS * len(words | others)
