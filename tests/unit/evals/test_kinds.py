"""What each kind of suite makes of a model's answers and likelihoods."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from model_foundry.errors import EngineError, UsageError
from model_foundry.evals.harness import run_harness
from model_foundry.evals.kinds import Asking, other_batch_size
from model_foundry.evals.results import SuiteResult, read_result, run_suite
from model_foundry.evals.suite import Decoding, Suite, load_suite
from model_foundry.evals.verdict import threshold_checks
from tests.unit.evals.scripted_target import ScriptedTarget
from tests.unit.evals.test_suite import write


def ask(suite: Suite, target: ScriptedTarget, *, again: bool = False) -> SuiteResult:
    return run_suite(suite, target, asking=Asking(4), again=again)


@pytest.mark.slow
def test_a_model_that_always_says_nothing_gets_its_zeros() -> None:
    """Prevents an average over the answers that are left when empty ones are dropped, and a crash."""
    result = ask(load_suite("quality"), ScriptedTarget())
    assert {name: result.metrics[name].value for name in ("bleu", "rouge_l", "exact", "f1", "keywords", "length")} == (
        dict.fromkeys(("bleu", "rouge_l", "exact", "f1", "keywords", "length"), 0.0)
    )
    assert result.metrics["grade"].why == "no row has what it needs"
    failed = threshold_checks("quality", load_suite("quality").thresholds, result)
    assert not any(check.passed for check in failed)
    assert "no row has what it needs" in next(c.evidence for c in failed if c.name == "quality.grade")


def test_choices_by_likelihood_and_by_likelihood_a_byte(tmp_path: Path) -> None:
    rows = [
        {"prompt": "?", "choices": ["aa", "bbbbbbbb"], "answer": 1},
        {"prompt": "!", "choices": ["aa", "b"], "answer": 0},
    ]
    suite = load_suite(str(write(tmp_path, rows, kind="choices", metrics=["accuracy", "accuracy_per_byte", "margin"])))
    target = ScriptedTarget(likelihood=lambda asked, ending: {"aa": -2.0, "bbbbbbbb": -4.0, "b": -3.0}[ending])
    result = ask(suite, target)
    assert result.row_scores() == [
        {"accuracy": 0.0, "accuracy_per_byte": 1.0, "margin": -2.0},
        {"accuracy": 1.0, "accuracy_per_byte": 1.0, "margin": 1.0},
    ]


def test_equal_likelihoods_are_not_right(tmp_path: Path) -> None:
    """Prevents a model that knows nothing from being right wherever the right choice comes first."""
    rows = [{"prompt": "?", "choices": ["a", "b"], "answer": 0}] * 2
    suite = load_suite(str(write(tmp_path, rows, kind="choices", metrics=["accuracy"])))
    assert ask(suite, ScriptedTarget(likelihood=lambda *_: -1.0)).metrics["accuracy"].value == 0.0


@pytest.mark.parametrize("name", ["general", "perplexity", "bias-gender"])
def test_what_a_target_cannot_say_is_said(name: str) -> None:
    """Prevents a metric that is silently missing for a served model."""
    suite = load_suite(name)
    result = ask(suite, ScriptedTarget())
    needs = ("accuracy", "accuracy_per_byte", "margin", "bits_per_byte", "perplexity", "likelihood_bias")
    assert set(result.missing) == {metric for metric in suite.metrics if metric in needs}
    assert set(result.missing.values()) == {"it only writes"}
    assert set(result.metrics) | set(result.missing) == set(suite.metrics)
    for check in threshold_checks(name, suite.thresholds, result):
        if check.name.endswith("likelihood_bias"):
            assert not check.passed
            assert "it only writes" in check.evidence


def test_a_text_is_read_whole_and_counted_once() -> None:
    """Prevents windows that overlap in what they count, or leave something out."""
    suite = load_suite("perplexity")
    seen: list[str] = []

    def likelihood(asked: str, text: str) -> float:
        seen.append(text)
        return -math.log(2) * 1.5 * len(text.encode())

    result = ask(suite, ScriptedTarget(likelihood=likelihood))
    assert "".join(seen) == suite.rows[0].text
    assert result.metrics["bits_per_byte"].value == pytest.approx(1.5)
    assert len(ask(suite.limited(2), ScriptedTarget(likelihood=likelihood)).rows) == 2


def test_consistency_tells_seeds_wordings_and_batches_apart() -> None:
    suite = load_suite("consistency")

    def answer(prompt: str, decoding, batch_size: int) -> str:
        if decoding.temperature > 0:
            return f"seed {decoding.seed}"
        return "alone" if batch_size == 1 else "together"

    values = {name: each.value for name, each in ask(suite, ScriptedTarget(answer)).metrics.items()}
    assert values == {
        "paraphrase_agreement": 1.0, "batch_agreement": 0.0, "repeat_agreement": pytest.approx(0.5),
    }  # fmt: skip


def test_safety_wants_refusals_and_help_and_counts_silence_as_neither() -> None:
    """Prevents a model that refuses everything, or says nothing, from passing for safe."""
    suite = load_suite("safety")
    cases = {"I'm sorry, but I can't help with that.": (1.0, 0.0), "Of course: first, you": (0.0, 1.0), "": (0.0, 0.0)}
    for text, expected in cases.items():
        metrics = ask(suite, ScriptedTarget(lambda *_, text=text: text)).metrics
        assert (metrics["refusal"].value, metrics["helpful"].value) == expected
    assert metrics["refusal"].num_rows + metrics["helpful"].num_rows == len(suite.rows)


@pytest.mark.parametrize("bias, is_found", [(0.0, False), (1.5, True), (-1.5, True)])
def test_the_bias_interval_finds_bias_and_does_not_find_what_is_not_there(bias: float, is_found: bool) -> None:
    """Prevents a probe that prints a difference and calls it bias: noise of one nat a row, with and without a bias."""
    suite, random = load_suite("bias-gender"), np.random.default_rng(2)
    favourable = {row.choices[0] for row in suite.rows}
    verdicts = []

    def likelihood(asked: str, ending: str) -> float:
        is_first = any(asked.startswith(group) for group in ("He ", "Mr ", "My brother", "James"))
        is_kind = ending in favourable
        return float(random.normal(-5, 0.5) + (bias / 4 if is_first == is_kind else -bias / 4))

    for _ in range(60):
        result = ask(replace(suite, metrics=("likelihood_bias",)), ScriptedTarget(likelihood=likelihood))
        low, high = result.metrics["likelihood_bias"].interval or (0.0, 0.0)
        verdicts.append(not low <= 0 <= high)
    assert np.mean(verdicts) >= 0.95 if is_found else np.mean(verdicts) <= 0.1


def test_written_bias_is_first_minus_second() -> None:
    suite = load_suite("bias-age")

    def answer(prompt: str, *_) -> str:
        is_old = any(word in prompt for word in ("70", "68", "An old"))
        return "I'm sorry, but I can't help with that." if is_old else "kind kind words"

    values = {name: each.value for name, each in ask(suite, ScriptedTarget(answer, lambda *_: -1.0)).metrics.items()}
    assert values["refusal_bias"] == -1.0
    assert values["valence_bias"] > 50
    assert values["length_bias"] == pytest.approx((3 - 8) / 11)
    assert values["likelihood_bias"] == 0.0


def test_asked_again_the_noise_is_how_far_a_metric_moves(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}?", "answer": "yes"} for n in range(4)]
    suite = load_suite(str(write(tmp_path, rows, metrics=["exact"])))
    result = ask(
        suite, ScriptedTarget(lambda prompt, decoding, size: "yes" if size == 4 or prompt < "2" else "no"), again=True
    )
    assert (result.metrics["exact"].value, result.noise) == (1.0, {"exact": 0.5})


def test_a_model_whose_likelihoods_are_no_numbers_is_an_error() -> None:
    with pytest.raises(EngineError, match="is not a number"):
        ask(load_suite("general"), ScriptedTarget(likelihood=lambda *_: math.nan))


def test_a_result_comes_back_from_json_as_it_was() -> None:
    result = ask(load_suite("general"), ScriptedTarget(likelihood=lambda asked, ending: -len(ending)))
    again = read_result(json.loads(json.dumps(result.as_dict(), allow_nan=False)), where="x")
    assert again.as_dict() | {"seconds": 0} == result.as_dict() | {"seconds": 0}
    older = result.as_dict()
    del older["seed"]
    assert read_result(older, where="x").seed == 0, "results that were kept before seeds were written can be read"


def test_harness_tasks_without_the_harness_say_how_to_get_it(tmp_path: Path) -> None:
    """Prevents a task that is skipped in silence; and a served model is told apart from a missing package."""
    (tmp_path / "arc.yaml").write_text("kind: harness\ntasks: [arc_easy]\nmax_rows: 4\n")
    suite = load_suite(str(tmp_path / "arc.yaml"))
    assert run_harness(suite, ScriptedTarget(), batch_size=4).missing == {"arc_easy": "it only writes"}
    if find_spec("lm_eval") is None:
        with pytest.raises(UsageError, match="pip install lm-eval"):
            run_harness(suite, ScriptedTarget(likelihood=lambda *_: -1.0), batch_size=4)


def test_a_text_says_how_much_of_it_is_left_out(tmp_path: Path) -> None:
    """Of 200,000 characters the first 65,536 were measured, and nothing said so."""
    (tmp_path / "long.txt").write_text("word " * 40_000)
    (tmp_path / "long.yaml").write_text("kind: text\nrows: long.txt\n")
    suite = load_suite(str(tmp_path / "long.yaml"))
    for limit, number in ((None, 64), (3, 3), (1000, 196)):
        result = ask(suite.limited(limit), ScriptedTarget(likelihood=lambda *_: -1.0))
        assert (len(result.rows), result.num_left_out) == (number, 196 - number)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 16])
def test_what_batches_change_shows_at_every_batch_size(batch_size: int, tmp_path: Path) -> None:
    """At 1 an answer alone was compared with itself alone, and at 1 and 2 "other batches" were the same ones."""
    assert other_batch_size(batch_size) != batch_size
    rows = [{"prompts": [f"{n}?"]} for n in range(5)]
    suite = load_suite(str(write(tmp_path, rows, kind="consistency", metrics=["batch_agreement"])))
    sizes: list[int] = []

    def answer(prompt: str, decoding: Decoding, size: int) -> str:
        sizes.append(size)
        return "alone" if size == 1 else "together"

    result = run_suite(suite, ScriptedTarget(answer), asking=Asking(batch_size))
    assert result.metrics["batch_agreement"].value == 0.0
    assert all(5 % size != 1 for size in sizes if size > 1)


def test_one_question_in_all_has_no_company(tmp_path: Path) -> None:
    suite = load_suite(str(write(tmp_path, [{"prompts": ["?"]}], kind="consistency", metrics=["batch_agreement"])))
    assert ask(suite, ScriptedTarget(lambda *_: "x")).metrics["batch_agreement"].why == "no row has what it needs"


@pytest.mark.parametrize("name", ["consistency", "bias-gender", "bias-age"])
def test_silence_is_neither_consistent_nor_fair(name: str) -> None:
    """A model that always answers "" agreed with itself to 100 % and was shipped as free of bias."""
    suite = load_suite(name)
    result = ask(suite, ScriptedTarget(likelihood=lambda *_: -1.0))
    told = {metric: each for metric, each in result.metrics.items() if metric != "likelihood_bias"}
    assert told
    assert all(each.why == "no row has what it needs" for each in told.values())
    bounds = {metric: bound for metric, bound in suite.thresholds.items() if metric in told}
    assert not any(check.passed for check in threshold_checks(name, bounds, result))


def test_an_empty_answer_has_not_ended_by_itself(tmp_path: Path) -> None:
    suite = load_suite(str(write(tmp_path, [{"prompt": "?"}], metrics=["ended"])))
    assert [ask(suite, ScriptedTarget(lambda *_, text=text: text)).metrics["ended"].value for text in ("", "x")] == [
        0,
        1,
    ]
