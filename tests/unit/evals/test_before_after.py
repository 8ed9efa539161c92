"""Before and after: what training taught is told from what luck and manner alone would show."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_foundry.errors import FoundryError
from model_foundry.evals.before_after import Comparison, compare
from model_foundry.evals.criteria import answers_improved

NUM = 60
PROMPTS = [f"Question {index}?" for index in range(NUM)]
EXPECTED = [f"unique{index} word{index}" for index in range(NUM)]
RAMBLING = [f"I would say that it is something like thing{index}" for index in range(NUM)]


def noisy(texts: list[str], *, seed: int) -> list[str]:
    """Every answer with half of its words swapped for words of other expected answers: different, no better."""
    source = random.Random(seed)
    pool = [word for text in EXPECTED for word in text.split()]
    return [" ".join(source.choice([word, source.choice(pool)]) for word in text.split()) for text in texts]


def compared(before: list[str], after: list[str], **options) -> Comparison:
    return compare(PROMPTS, expected=EXPECTED, before=before, after=after, **options)


def first_learned(number: int) -> Comparison:
    """The first questions alone, all of them learned."""
    return compare(PROMPTS[:number], expected=EXPECTED[:number], before=RAMBLING[:number], after=EXPECTED[:number])


def test_a_model_that_learned_everything_has_improved() -> None:
    result = compared(RAMBLING, EXPECTED)
    assert (result.improved, result.same, result.worse) == (1.0, 0.0, 0.0)
    assert result.verdict == "improved"
    assert result.noise_floor == 0.0
    assert (result.before["exact"], result.after["exact"]) == (0.0, 1.0)
    assert {case.change for case in result.cases} == {"improved"}


def test_a_model_that_answers_the_same_has_not() -> None:
    result = compared(RAMBLING, RAMBLING)
    assert (result.improved, result.same) == (0.0, 1.0)
    assert result.verdict == "unclear"


def test_a_model_that_forgot_is_worse() -> None:
    result = compared(EXPECTED, RAMBLING)
    assert result.worse == 1.0
    assert result.verdict == "worse"


@pytest.mark.slow
def test_change_without_learning_is_called_progress_no_more_often_than_stated() -> None:
    """Answers that merely differ improve on many questions by luck; counting those alone calls any change progress.

    95 % intervals err on this side in 2.5 of 100 cases.
    """
    before = [f"{own} or {other}" for own, other in zip(EXPECTED, reversed(EXPECTED), strict=True)]
    results = [compared(noisy(before, seed=seed), noisy(before, seed=seed + 1000)) for seed in range(40)]
    assert sum(result.improved > 0.3 for result in results) > 20
    assert sum(result.verdict == "improved" for result in results) <= 2


def test_manner_without_knowledge_stays_in_the_noise() -> None:
    """Learning only that answers begin with "The" raises word overlap on every question, of this model or any other."""
    expected = [f"The thing{index}." for index in range(NUM)]
    after = [f"The thing{(index * 7 + 3) % NUM}." for index in range(NUM)]
    result = compare(PROMPTS, expected=expected, before=RAMBLING, after=after)
    assert result.improved > 0.9
    assert result.noise["shuffled"] > 0.9
    assert result.verdict == "unclear"


def test_repeated_decodings_set_a_floor() -> None:
    """Where the untrained model's own answers scatter, a gain must exceed that scatter."""
    half = [own if index % 2 else other for index, (own, other) in enumerate(zip(EXPECTED, RAMBLING, strict=True))]
    result = compared(RAMBLING, half, repeats=[half])
    assert result.noise["repeated"] == pytest.approx(0.25)
    assert result.noise_floor == pytest.approx(0.25)
    assert "repeated" not in compared(RAMBLING, half).noise


def test_a_clear_gain_on_few_distinct_answers_still_counts() -> None:
    """Yes or no: half of the right answers are right by chance, the other half are not."""
    expected = ["yes" if index % 2 else "no" for index in range(NUM)]
    result = compare(PROMPTS, expected=expected, before=RAMBLING, after=expected)
    assert result.verdict == "improved"
    constant = compare(PROMPTS, expected=expected, before=RAMBLING, after=["yes"] * NUM)
    assert constant.verdict == "unclear"


def test_one_expected_answer_leaves_the_shuffle_out() -> None:
    result = compare(PROMPTS, expected=["seven"] * NUM, before=RAMBLING, after=["seven"] * NUM)
    assert "shuffled" not in result.noise
    assert result.verdict == "improved"


def test_the_same_seed_gives_the_same_numbers() -> None:
    """A verdict that changes from one run of the report to the next is none."""
    after = EXPECTED[:40] + RAMBLING[40:]
    assert compared(RAMBLING, after, seed=3).as_dict() == compared(RAMBLING, after, seed=3).as_dict()


def test_the_interval_is_about_as_wide_as_theory_says() -> None:
    """A bootstrap over the wrong axis, or over too few resamples, gives intervals of any width."""
    share = 40 / NUM
    result = compared(RAMBLING, EXPECTED[:40] + RAMBLING[40:])
    half_width = 1.96 * (share * (1 - share) / NUM) ** 0.5
    assert result.margin_interval is not None
    for low, high in (result.interval, result.margin_interval):
        assert low == pytest.approx(share - half_width, abs=0.03)
        assert high == pytest.approx(share + half_width, abs=0.03)


def test_all_of_a_few_is_not_all() -> None:
    """Every resample of 3 improved answers out of 3 is 3 of 3: a bootstrap alone would be certain."""
    few = first_learned(3)
    assert few.interval[0] < 0.5
    assert few.interval[1] == 1.0
    texts = {"expected": EXPECTED[:3], "before": RAMBLING[:3], "after": EXPECTED[:3], "repeats": [EXPECTED[:3]]}
    assert compare(PROMPTS[:3], **texts).verdict == "unclear"


def test_the_report_s_dict_is_plain_json() -> None:
    import orjson

    values = compared(RAMBLING, EXPECTED, sources=[f"heldout.jsonl:{index + 1}" for index in range(NUM)]).as_dict()
    assert orjson.loads(orjson.dumps(values)) == values
    assert values["cases"][4]["source"] == "heldout.jsonl:5"
    assert {"before", "after", "cases", "improved", "noise_floor", "verdict"} <= values.keys()


def test_lengths_that_do_not_match_are_refused() -> None:
    """zip would drop the last questions without a word."""
    with pytest.raises(FoundryError, match="do not match"):
        compare(PROMPTS, expected=EXPECTED, before=RAMBLING, after=EXPECTED[:-1])
    with pytest.raises(FoundryError, match="no questions"):
        compare([], expected=[], before=[], after=[])
    with pytest.raises(FoundryError, match="no metric 'bleu'"):
        compared(RAMBLING, EXPECTED, metric="bleu")


answers = st.lists(st.tuples(*[st.text("ab ", max_size=6)] * 3), min_size=1, max_size=12)


@settings(max_examples=25, deadline=None)
@given(answers)
def test_shares_add_up_whatever_the_answers(rows: list[tuple[str, str, str]]) -> None:
    expected, before, after = (list(column) for column in zip(*rows, strict=True))
    result = compare(["?"] * len(rows), expected=expected, before=before, after=after)
    assert result.improved + result.same + result.worse == pytest.approx(1.0)
    assert 0.0 <= result.interval[0] <= result.interval[1] <= 1.0
    assert sum(result.count(change) for change in ("improved", "same", "worse")) == len(rows)


def test_one_right_answer_is_no_progress_beyond_the_noise() -> None:
    """Resamples of one question are that question, "above that by +100 % to +100 %": a coin would pass one in four."""
    for number in (1, 5):
        few = first_learned(number)
        assert (few.verdict, few.margin_interval, few.change_interval) == ("unclear", None, None)
        assert not (check := answers_improved(few, bound=0.3)).passed
        assert "cannot be told" in check.evidence
    assert first_learned(6).verdict == "improved"


@pytest.mark.slow
@pytest.mark.parametrize("number", [6, 8, 12])
def test_luck_on_few_questions_is_called_progress_no_more_often_than_stated(number: int) -> None:
    """Plain percentiles are too narrow for few questions; one-sided, 95 % intervals err in 2.5 of 100 cases."""
    source, errors = random.Random(number), 0
    for _ in range(200):
        answers = [[source.choice(pair) for pair in zip(EXPECTED[:number], RAMBLING, strict=False)] for _ in range(2)]
        found = compare(PROMPTS[:number], expected=EXPECTED[:number], before=answers[0], after=answers[1])
        errors += found.verdict == "improved"
    assert errors <= 10
