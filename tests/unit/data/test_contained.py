"""Questions that stand inside longer rows, beside the slow truth over lists of words."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from model_foundry.data.contained import find_contained
from model_foundry.errors import DataError


def ngrams(words: list[str], length: int) -> set[tuple[str, ...]]:
    return {tuple(words[start : start + length]) for start in range(len(words) - length + 1)}


def slow_contained(texts: list[str], reference: list[str], ngram: int) -> list[tuple[int, int, float, bool]]:
    wanted = []
    for text in reference:
        length = min(ngram, len(text.split()))
        wanted.append((length, ngrams(text.split(), length) if length >= 8 else set()))
    counts = Counter(gram for _, grams in wanted for gram in grams)
    found = []
    for index, text in enumerate(texts):
        for other, (length, grams) in enumerate(wanted):
            rare = {gram for gram in grams if counts[gram] <= 10}
            shared = len(rare & ngrams(text.split(), length))
            if shared:
                found.append((index, other, shared / len(rare), shared == len(rare)))
    return found


@pytest.mark.parametrize("seed, vocabulary, ngram", [(0, 1, 13), (1, 3, 13), (2, 40, 13), (3, 3, 8), (4, 40, 20)])
def test_what_is_found_is_what_comparing_every_run_of_words_finds(seed: int, vocabulary: int, ngram: int) -> None:
    chance = random.Random(seed)

    def words(number: int) -> list[str]:
        return [f"{chance.choice('abc')}{chance.randrange(vocabulary)}" for _ in range(number)]

    opening = words(14)
    reference = [" ".join((opening if chance.random() < 0.3 else []) + words(chance.randint(0, 25))) for _ in range(50)]
    texts = []
    for _ in range(80):
        quoted = chance.choice(reference).split()[chance.randrange(5) :] if chance.random() < 0.5 else []
        texts.append(" ".join(words(chance.randint(0, 9)) + quoted + words(chance.randint(0, 9))))
    found = [
        (item.index, item.other, item.similarity, item.exact) for item in find_contained(texts, reference, ngram=ngram)
    ]
    assert found == slow_contained(texts, reference, ngram)


def test_a_question_quoted_in_a_longer_row_is_named_however_it_is_written() -> None:
    question = "When was the bell called Old Winifred cast, and who paid for it?"
    row = (
        "Of all that I was ever asked,  WHEN was the bell\ncalled Old Winifred cast, and who paid for it? is the best."
    )
    (found,) = find_contained(["", "nothing", row], ["too short to tell", question])
    assert (found.index, found.other, found.similarity, found.exact) == (2, 1, 1.0, True)


def test_a_prompt_that_all_questions_share_is_no_leak() -> None:
    prompt = "Answer the question below in one sentence and do not explain how you found the answer."
    questions = [f"{prompt} What is {number} times seven?" for number in range(30)]
    assert find_contained([f"{prompt} Name a river."], questions) == []
    assert [item.other for item in find_contained([questions[4]], questions)] == [4]


def test_runs_that_are_met_by_chance_are_refused() -> None:
    with pytest.raises(DataError, match="8"):
        find_contained(["a"], ["b"], ngram=5)
    assert find_contained([], ["a b c d e f g h"]) == find_contained(["a b c d e f g h"], []) == []
