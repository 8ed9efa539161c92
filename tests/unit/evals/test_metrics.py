"""Scores: what counts as the same answer, and what does not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_foundry.evals.metrics import METRICS, contains, exact_match, mean_scores, normalise, score, word_f1, words


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("in 1871", "In 1871."),
        ("  In\n1871 !", "In 1871."),
        ("Slow water steady hands", "Slow water, steady hands."),
        ("Don't", "dont"),
        ("\uff22\uff41\uff52\uff4e\uff41\uff43\uff4c\uff45", "Barnacle"),
        ("STRASSE", "Straße"),
        ("well-known", "well known"),
    ],
)
def test_case_punctuation_and_space_do_not_count(answer: str, expected: str) -> None:
    """A right answer without its full stop was scored as wrong."""
    assert exact_match(answer, expected) == 1.0


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("In 1872.", "In 1871."),
        ("It was in 1871.", "In 1871."),
        ("3.5", "35"),
        ("-5", "5"),
        ("", "In 1871."),
        ("...", "In 1871."),
        ("->", "+"),
        ("hands steady", "steady hands"),
        ("东京", "京都"),
        ("كتاب", "كتب"),
    ],
)
def test_what_differs_in_meaning_is_not_equal(answer: str, expected: str) -> None:
    """Stripping every sign makes 3.5 equal to 35, and two answers that are all punctuation equal to each other."""
    assert exact_match(answer, expected) == 0.0


def test_f1_counts_words_with_repetition() -> None:
    assert word_f1("a b c d", "a b") == pytest.approx(2 * 0.5 * 1 / 1.5)
    assert word_f1("yes yes yes yes", "yes") == pytest.approx(2 * 0.25 * 1 / 1.25)
    assert word_f1("x", "a b") == 0.0
    # Where no spaces part words, each character is one, and keeps its marks: a whole sentence was one word.
    assert word_f1("猫在垫子上", "猫坐在垫子上") == pytest.approx(2 * 5 / 11)
    assert words("GPU很快。ที่ x") == ["gpu", "很", "快", "ที่", "x"]
    assert word_f1("", "") == 1.0
    assert word_f1("", "a") == 0.0


def test_contains_wants_whole_words() -> None:
    """Text search finds 12 in 120, and an empty expectation in everything."""
    assert contains("It has 12 keys.", "12 keys") == 1.0
    assert contains("It has 120 keys.", "12") == 0.0
    assert contains("anything", "") == 0.0
    assert contains("The answer is: Slow water, steady hands!", "slow water steady hands") == 1.0


@given(st.text())
def test_an_answer_equals_itself_by_every_metric(text: str) -> None:
    assert all(metric(text, text) == 1.0 for metric in METRICS.values())


@given(st.text(), st.text())
def test_scores_lie_between_0_and_1_and_agree(answer: str, expected: str) -> None:
    scores = score(answer, expected)
    assert all(0.0 <= value <= 1.0 for value in scores.as_dict().values())
    if scores.exact:
        assert scores.f1 == scores.contains == 1.0


@given(st.text())
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


def test_a_sharp_belongs_to_its_word_whatever_follows() -> None:
    assert normalise("C#=5") == normalise("C# = 5") == "c# = 5"
    assert normalise("a#\u00ac") == "a# \u00ac"
    assert normalise("F#/C# f#x") == "f# c# f# x"


def test_means_of_no_cases_are_absent_not_zero() -> None:
    assert mean_scores([]) == {}
    assert mean_scores([score("a", "a"), score("b", "a")])["exact"] == 0.5


def test_symbols_carry_meaning_however_they_are_spaced() -> None:
    """a == b was a != b, C was C++, and 5 was 5 %; while x+y must stay x + y, and Markdown's marks say nothing."""
    for answer, expected in (("a == b", "a != b"), ("x + y", "x - y"), ("C", "C++"), ("C", "C#"), ("5", "5%"),
                             ("≥ 3", "≤ 3"), ("1/2", "1 2"), ("a < b", "a > b"), ("$5", "€5")):  # fmt: skip
        assert exact_match(answer, expected) == 0.0, (answer, expected)
    for answer, expected in (("x+y", "x + y"), ("5%", "5 %"), ("≥3", "≥ 3"), ("## `C++`!", "c++"), ("½", "1/2")):
        assert exact_match(answer, expected) == 1.0, (answer, expected)


def test_a_symbol_beside_a_word_does_not_hide_it() -> None:
    """Paris🎉 did not contain Paris, and Yes👍 was not Yes 👍: what is no end of a word is a word of its own."""
    for answer, expected in (("The capital is Paris🎉", "Paris"), ("Windows® 11", "Windows"), ("$x$", "x")):
        assert contains(answer, expected) == 1.0, (answer, expected)
    for answer, expected in (("Yes👍", "Yes 👍"), ("x^2", "x ^ 2")):
        assert exact_match(answer, expected) == 1.0, (answer, expected)


def test_words_are_found_in_scripts_without_spaces() -> None:
    """北京 was not in 我住在北京市, for it has no spaces around it; in other scripts a word still must be whole."""
    assert contains("我住在北京市", "北京") == 1.0
    assert contains("我用Python写代码", "Python") == 1.0
    assert contains("ฉันอยู่ที่กรุงเทพ", "กรุงเทพ") == 1.0
    assert contains("2012年", "12年") == 0.0
    assert contains("I know C++17 and C#.", "C++") == 1.0
    assert contains("I know C++ and C#.", "C") == 0.0
