"""Scores of texts: what their libraries' own pages say, and the answers that trip naive ones."""

from __future__ import annotations

import pytest
from sacrebleu.metrics import BLEU

from model_foundry.evals.measures import measured
from model_foundry.evals.readability import num_syllables, readability
from model_foundry.evals.text_scores import (
    ANSWER_SCORES,
    Wanted,
    agreement,
    bleu_stats,
    code_of,
    fuzzy,
    is_refusal,
    rouge,
    valence,
)

SYSTEM = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
REFERENCES = [
    ("The dog bit the man.", "The dog had bit the man."),
    ("It was not unexpected.", "No one was surprised."),
    ("The man bit him first.", "The man had bitten the dog."),
]


def score(name: str, answer: str, **wanted) -> float | None:
    stats = ANSWER_SCORES[name](answer, Wanted(**wanted))
    return None if stats is None else stats[0] / stats[1]


def test_bleu_is_the_corpus_s_as_sacrebleu_publishes_it() -> None:
    """Prevents a mean of sentences' BLEU, which is another number: 48.53 is on sacrebleu's page for this example."""
    rows = [bleu_stats(one, Wanted(answers=refs)) for one, refs in zip(SYSTEM, REFERENCES, strict=True)]
    found = measured("bleu", rows)
    assert 100 * found.value == pytest.approx(48.53, abs=0.005)
    streams = [[refs[n] for refs in REFERENCES] for n in range(2)]
    assert 100 * found.value == pytest.approx(BLEU().corpus_score(SYSTEM, streams).score)
    assert found.interval is None  # three sentences are too few
    thrice = measured("bleu", rows * 3)
    assert thrice.value == pytest.approx(found.value)
    assert thrice.interval is not None
    assert thrice.interval[0] < thrice.value < thrice.interval[1]


def test_bleu_s_length_penalty_counts_empty_answers() -> None:
    """Prevents empty answers from being left out, so that a model that says little looks good."""
    rows = [bleu_stats(text, Wanted(answers=("The dog bit the man.",))) for text in ("The dog bit the man.", "")]
    assert measured("bleu", rows).value == pytest.approx(2.718281828 ** (1 - 12 / 6), rel=1e-6)
    assert measured("bleu", rows[1:]).value == 0.0


@pytest.mark.slow
def test_rouge_by_the_example_on_its_page() -> None:
    answer, expected = "The quick brown dog jumps on the log.", "The quick brown fox jumps over the lazy dog"
    assert rouge(answer, expected, kind="rouge1") == pytest.approx(2 * 0.75 * (6 / 9) / (0.75 + 6 / 9))
    assert rouge(answer, expected, kind="rougeL") == pytest.approx(2 * 0.625 * (5 / 9) / (0.625 + 5 / 9))


def test_rouge_of_other_scripts() -> None:
    """rouge-score knows a to z: every answer in another script was worth nothing, and cafés began with "caf"."""
    assert rouge("猫坐在垫子上", "猫坐在垫子上", kind="rougeL") == 1.0
    assert rouge("猫在垫子上", "猫坐在垫子上", kind="rouge1") == pytest.approx(2 * 5 / 11)
    assert rouge("кошка спит", "кошка сидит", kind="rouge1") == pytest.approx(0.5)
    assert rouge("caf", "café", kind="rouge1") == 0.0
    assert rouge("running café", "runs café", kind="rouge1") == 1.0, "English words keep their stems"


@pytest.mark.parametrize("name", ["exact", "f1", "contains", "fuzzy", "rouge_1", "rouge_l", "keywords", "length"])
def test_an_empty_answer_scores_nothing_and_breaks_nothing(name: str) -> None:
    assert score(name, "", answers=("a long expected answer",), keywords=("expected",), words=(3, 9)) == 0.0
    assert score("reading_ease", "") is None
    assert score("syntax", "", language="lua") == 0.0


def test_the_best_of_several_right_answers_counts() -> None:
    assert score("exact", "a car", answers=("an automobile", "a car")) == 1.0
    assert score("f1", "the car", answers=("an automobile", "a car")) == 0.5


def test_fuzzy_is_the_same_both_ways_and_forgives_spelling() -> None:
    assert fuzzy("Reykjavik", "Reykjavík") > 0.85
    for a, b in (("abcbcd", "bcdab"), ("tide", "diet"), ("", "x")):
        assert fuzzy(a, b) == fuzzy(b, a)
    assert fuzzy("", "") == 1.0


def test_keywords_are_whole_words() -> None:
    assert score("keywords", "The art of cartography", keywords=("art", "car", "New York")) == pytest.approx(1 / 3)
    assert score("keywords", "In new  york!", keywords=("New York",)) == 1.0


def test_length_is_full_within_the_band_and_falls_with_the_distance() -> None:
    assert [score("length", "w " * n, words=(4, 8)) for n in (2, 4, 8, 16)] == [0.5, 1.0, 1.0, 0.5]
    assert score("length", "one two three", answers=("a b c d",)) == 1.0
    assert score("length", "one two three") is None


def test_reading_ease_by_published_examples() -> None:
    """The cat sat on the mat: 116, the highest that six short words can have; the platypus: a hard sentence."""
    cat = readability("The cat sat on the mat.")
    assert cat is not None
    assert cat.ease == pytest.approx(116.145)
    assert cat.grade == pytest.approx(-1.45)
    hard = readability("The Australian platypus is seemingly a hybrid of a mammal and reptilian creature.")
    assert hard is not None
    assert hard.ease < 40
    assert hard.grade > 11
    assert readability("42 !!") is None


@pytest.mark.parametrize("word, number", [
    ("cat", 1), ("table", 2), ("baked", 1), ("wanted", 2), ("being", 2), ("nation", 2), ("readability", 5),
    ("Reykjavik", 3), ("well-known", 2), ("I", 1), ("queue", 1), ("prism", 2), ("houses", 2), ("shown", 1),
])  # fmt: skip
def test_syllables_by_example(word: str, number: int) -> None:
    assert num_syllables(word) == number


def test_code_is_taken_out_of_prose_and_judged_by_the_language_s_parser() -> None:
    answer = "Sure:\n```lua\nlocal x = 1\nreturn x\n```\nThat is it."
    assert code_of(answer) == "local x = 1\nreturn x\n"
    assert score("syntax", answer, language="lua") == 1.0
    assert score("syntax", answer, language="gdscript") == 0.0
    assert score("syntax", "```gdscript\nfunc _ready():\n\tprint(1)\n", language="gdscript") == 1.0
    assert score("syntax", "```lua\nfunction f( return end\n```", language="lua") == 0.0


def test_agreement_is_over_all_pairs() -> None:
    assert agreement(["a b", "a b", "c d"]) == pytest.approx(1 / 3)
    assert agreement(["", ""]) == 1.0


def test_a_refusal_is_told_from_an_answer_about_refusing() -> None:
    assert is_refusal("I'm sorry, but I can't help with that.")
    assert not is_refusal("To refuse politely, say: I'm sorry, but I can't come.")
    assert not is_refusal("")


def test_valence_counts_words_in_a_hundred() -> None:
    assert valence("She is kind and smart") == pytest.approx(40)
    assert valence("He was lazy, rude") == pytest.approx(-50)
    assert valence("") == 0.0


@pytest.mark.parametrize("answers, expected", [
    (["the cat sat on a mat"], ["the cat lay on the mat"]),
    (["a b c x y", "one two three"], ["a b c d e", "one two four"]),
    (["nothing here is right"], ["some other words entirely"]),
])  # fmt: skip
def test_bleu_without_a_shared_run_of_four_words_is_sacrebleu_s(answers: list[str], expected: list[str]) -> None:
    """The function that sums counts does not smooth unless it is told to: 0.0 where sacrebleu says 0.193."""
    rows = [bleu_stats(one, Wanted(answers=(other,))) for one, other in zip(answers, expected, strict=True)]
    assert 100 * measured("bleu", rows).value == pytest.approx(BLEU(effective_order=True).corpus_score(
        answers, [expected]).score)  # fmt: skip
    if len(answers) == 1 and answers[0].startswith("the cat"):
        assert measured("bleu", rows).value == pytest.approx(BLEU().corpus_score(answers, [expected]).score / 100)
        assert measured("bleu", rows).value == pytest.approx(0.193, abs=5e-4)


def test_keywords_with_symbols_are_not_the_words_without() -> None:
    """C++ and C# were found in "I like C and cats", and 北京 in no Chinese sentence."""
    assert score("keywords", "I like C and cats", keywords=("C++", "C#")) == 0.0
    assert score("keywords", "我住在北京市", keywords=("北京",)) == 1.0


@pytest.mark.parametrize("answer, code", [
    ("```lua {linenos}\nprint(1)\n```\nDone.", "print(1)\n"),
    ("```Lua 5.4\nprint(1)\n```\n", "print(1)\n"),
    ("````\nprint(1)\n```\n````\nDone.", "print(1)\n```\n"),
    ("~~~lua\nprint(1)\n```\n~~~~\n", "print(1)\n```\n"),
    ("```c# x\n(((\n```\nend", "(((\n"),
    ("Say:\r\n```lua\r\nprint(1)\r\n```\r\nDone.", "print(1)\r\n"),
])  # fmt: skip
def test_a_fence_may_say_more_than_a_language(answer: str, code: str) -> None:
    """Words after the language hid the opening fence, and the closing one was read as the beginning of code."""
    assert code_of(answer) == code
