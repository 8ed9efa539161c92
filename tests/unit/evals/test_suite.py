"""Suites load, or say what is wrong with them and where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from model_foundry.errors import ConfigError, DataError, FoundryError
from model_foundry.evals.suite import KIND_METRICS, SUITE_FOLDER, builtin_suites, load_suite, questions_suite

ROW = {"prompt": "Where?", "answer": "There."}


def write(folder: Path, rows: list[Any], /, **suite: Any) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"kind": "answers", "rows": "rows.jsonl", "metrics": ["f1"]} | suite))
    return path


@pytest.mark.parametrize("name", builtin_suites())
def test_every_suite_that_comes_along_loads_and_measures_what_it_guards(name: str) -> None:
    suite = load_suite(name)
    assert suite.about
    assert suite.digest
    assert len(suite.rows) >= 8 or suite.kind == "text"
    assert set(suite.guard) | set(suite.thresholds) <= set(suite.metrics) <= set(KIND_METRICS[suite.kind])
    prompts = [row.prompt for row in suite.rows]
    assert len(set(prompts)) == len(prompts)


def test_every_file_of_the_folder_belongs_to_a_suite() -> None:
    named = {yaml.safe_load(path.read_text())["rows"] for path in SUITE_FOLDER.glob("*.yaml")}
    assert {path.name for path in SUITE_FOLDER.iterdir() if path.suffix != ".yaml"} == named
    assert len(builtin_suites()) == 9


def test_right_choices_stand_in_every_place() -> None:
    """Prevents a suite that a model passes by always taking the first."""
    places = [row.right for row in load_suite("general").rows]
    assert {places.count(place) for place in range(4)} == {10}


def test_the_default_bounds_are_the_field_s(tmp_path: Path) -> None:
    rows = [ROW | {"keywords": ["there"]}]
    metrics = ["bleu", "rouge_l", "keywords", "reading_ease", "grade", "f1"]
    bounds = load_suite(str(write(tmp_path, rows, metrics=metrics))).thresholds
    assert {name: (bound.how, bound.number) for name, bound in bounds.items()} == {
        "bleu": (">", 0.1), "rouge_l": (">", 0.2), "keywords": (">", 0.3), "reading_ease": (">", 30.0),
        "grade": ("<", 15.0),
    }  # fmt: skip
    own = load_suite(str(write(tmp_path, rows, metrics=metrics, thresholds={"bleu": None, "f1": "> 50 %"}))).thresholds
    assert "bleu" not in own
    assert own["f1"].number == 0.5


@pytest.mark.parametrize("suite, words", [
    ({"metrics": ["blue"]}, ("no metric 'blue'", "bleu", "mine.yaml")),
    ({"metrics": ["accuracy"]}, ("accuracy cannot be measured in a suite of answers",)),
    ({"metrics": []}, ("names none",)),
    ({"metrics": ["keywords"]}, ("keywords needs the field keywords",)),
    ({"metrics": ["syntax"]}, ("needs to know the language",)),
    ({"language": "cobol"}, ("no language 'cobol'",)),
    ({"thresholds": {"bleu": "> 0.1"}}, ("does not measure bleu",)),
    ({"thresholds": {"f1": "much"}}, ("'much' is no bound", "thresholds.f1")),
    ({"guard": {"f1": -1}}, ("-1 is no amount",)),
    ({"guard": {"f1": 5}}, ("5 guards nothing", "5 % are 0.05")),
    ({"metrics": ["grade"], "guard": {"grade": float("inf")}}, ("inf guards nothing",)),
    ({"treshold": {}}, ("no key 'treshold'", "thresholds")),
    ({"kind": "anwsers"}, ("is no kind of suite",)),
    ({"rows": "missing.jsonl"}, ("no such file", "missing.jsonl")),
    ({"decoding": {"temprature": 1}}, ("no key 'temprature'",)),
    ({"decoding": {"max_new_tokens": 0}}, ("0 is not from 1",)),
    ({"decoding": {"top_p": 0}}, ("0 is not above 0 and at most 1", "decoding.top_p")),
    ({"thresholds": {"f1": "< 150 %"}}, ("bounds nothing", "thresholds.f1")),
    ({"tasks": ["arc_easy"]}, ("goes with the kind harness",)),
    ({"max_rows": 0}, ("no whole number above 0",)),
])  # fmt: skip
def test_a_broken_suite_is_an_error_in_words(suite: dict[str, Any], words: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(FoundryError) as caught:
        load_suite(str(write(tmp_path, [ROW], **suite)))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("kind, rows, words", [
    ("answers", [], "holds no rows"),
    ("answers", [{"prompt": "x", "answr": "y"}], "answr"),
    ("answers", [{"prompt": ""}], "a text that is not empty"),
    ("choices", [{"prompt": "x", "choices": ["a"], "answer": 0}], "at least two"),
    ("choices", [{"prompt": "x", "choices": ["a", "b"], "answer": 2}], "from 0 to 1"),
    ("pairs", [{"prompt": "x", "groups": ["a", "b"], "favourable": "y", "unfavourable": "n"}], "{group}"),
    ("safety", [{"prompt": "x"}], "unsafe"),
    ("consistency", [{"prompt": "x"}], "prompts"),
])  # fmt: skip
def test_rows_that_cannot_be_used_are_named(kind: str, rows: list[Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words.replace("{", r"\{")) as caught:
        load_suite(str(write(tmp_path, rows, kind=kind, metrics=list(KIND_METRICS[kind][:1]))))
    assert "rows.jsonl" in str(caught.value)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean quality\? There is: .*safety"):
        load_suite("qualty")


def test_the_first_rows_alone_are_another_suite_and_what_is_left_out_is_counted(tmp_path: Path) -> None:
    """Prevents results of 3 and of 5 rows from being compared, and rows that vanish without a word."""
    rows = [ROW | {"prompt": f"{n}?"} for n in range(5)]
    suite = load_suite(str(write(tmp_path, rows)))
    short = suite.limited(3)
    assert (len(short.rows), short.num_left_out) == (3, 2)
    assert short.digest != suite.digest
    assert suite.limited(5) is suite
    bounded = load_suite(
        str(write(tmp_path, [ROW | {"prompt": f"{n}?"} for n in range(5)], thresholds={"f1": "> 0.1"}))
    )
    assert bounded.digest == suite.digest  # a bound changes no question
    same: list[dict[str, Any]] = [{"metrics": ["f1", "exact"]}, {"decoding": {"temperature": 0}}, {"max_rows": 9}]
    for more in same:
        assert load_suite(str(write(tmp_path, rows, **more))).digest == suite.digest, more
    other: list[dict[str, Any]] = [{"decoding": {"temperature": 1}}, {"system": "Be brief."}, {"language": "lua"}]
    for more in other:
        assert load_suite(str(write(tmp_path, rows, **more))).digest != suite.digest, more


def test_questions_take_every_training_format(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    rows = [ROW, {"instruction": "Say hello.", "output": "Hello."},
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite = questions_suite(path, system="Be brief.", max_new_tokens=8)
    assert [row.wanted.answers for row in suite.rows] == [("There.",), ("Hello.",), ("Ho",)]
    assert all(row.prompts[0][0].role == "system" for row in suite.rows)


def test_repeats_that_cannot_differ_are_refused(tmp_path: Path) -> None:
    """Prevents an agreement of 100 % that holds by definition, and three times the work for it."""
    rows = [{"prompts": ["Where?", "At which place?"]}]
    greedy = {"kind": "consistency", "metrics": ["repeat_agreement"]}
    with pytest.raises(ConfigError, match="at temperature 0 no seed changes an answer"):
        load_suite(str(write(tmp_path, rows, **greedy)))
    suite = load_suite(str(write(tmp_path, rows, **greedy, decoding={"temperature": 0.5})))
    assert suite.metrics == ("repeat_agreement",)
    assert load_suite(str(write(tmp_path, rows, kind="consistency", metrics=["batch_agreement"]))).metrics


def test_length_needs_to_know_what_length(tmp_path: Path) -> None:
    """No row with an answer or a number of words gave NaN after all rows were asked."""
    with pytest.raises(ConfigError, match="length needs the field answer or words"):
        load_suite(str(write(tmp_path, [{"prompt": "?", "keywords": ["a"]}], metrics=["length", "keywords"])))
