"""A run that should not be shipped is not: before and after are asked the same, and the exit code says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tiny_runs import (
    COLOURS,
    assert_one_paragraph,
    chat_row,
    foundry_here,
    write_jsonl,
    write_project,
    write_questions,
)

NUMBERS = dict(zip(COLOURS, ("four", "nine", "two", "six", "one", "five", "ten", "six"), strict=True))


def write_suite(folder: Path, **more: Any) -> Path:
    """What the first run teaches, as multiple choice."""
    colours = sorted(set(COLOURS.values()))
    rows = [{"prompt": f"Colour of {name}? ", "choices": colours, "answer": colour} for name, colour in COLOURS.items()]
    write_jsonl(folder / "colours.jsonl", rows)
    suite = {"kind": "choices", "rows": "colours.jsonl", "guard": {"accuracy": 0.05, "margin": 1.0}} | more
    (folder / "colours.yaml").write_text(yaml.safe_dump(suite))
    return folder / "colours.yaml"


@pytest.fixture(scope="module")
def taught(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned eight colours, all of them: knowledge that can be lost."""
    folder = tmp_path_factory.mktemp("taught")
    config = write_project(
        folder, model=model, training__max_steps=80, training__learning_rate=0.01, evaluation__max_new_tokens=8,
        evaluation__file=str(write_questions(folder / "questions.jsonl")),
    )  # fmt: skip
    done = foundry_here("train", config)
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "run" / "report.json").read_bytes())
    assert report["evaluation"]["after"]["exact"] == 1.0
    return folder / "run"


def taught_numbers(folder: Path, taught: Path, **changes: Any) -> Path:
    """A configuration that goes on from what is taught with other facts about the same things."""
    config = write_project(folder, model=taught, **changes)
    write_jsonl(folder / "train.jsonl", [chat_row(f"How many has {name}? ", word) for name, word in NUMBERS.items()])
    return config


def test_a_run_that_forgets_is_not_shipped_and_a_gentle_one_is(taught: Path, tmp_path: Path) -> None:
    """Prevents a run whose own questions go well from being shipped although it has lost all else."""
    suite = write_suite(tmp_path)
    questions = [{"prompt": f"How many has {name}? ", "answer": word} for name, word in NUMBERS.items()]
    asked = {"evaluation__suites": [str(suite)], "evaluation__max_new_tokens": 8,
             "evaluation__file": str(write_jsonl(tmp_path / "numbers.jsonl", questions))}  # fmt: skip
    rough = taught_numbers(tmp_path / "rough", taught, training__max_steps=60, training__learning_rate=0.02, **asked)
    done = foundry_here("train", rough)
    assert done.returncode == 1, done.stderr
    assert "failed · DON'T SHIP" in done.stdout
    assert "FAIL  colours: not behind" in done.stdout
    run = tmp_path / "rough" / "run"
    report = json.loads((run / "report.json").read_bytes())
    assert report["evaluation"]["after"]["exact"] >= 0.75, "it has learned what it was to learn"
    found = json.loads((run / "evaluation" / "evaluation.json").read_bytes())
    assert (found["ship"], found["verdict"]) == (False, "DON'T SHIP")
    assert "margin" in found["reasons"][0]
    colours = found["suites"]["colours"]["changes"]
    assert colours["margin"]["interval"][1] < -1
    assert found["suites"]["questions"]["changes"]["exact"]["verdict"] == "better"
    assert "DON&#x27;T SHIP" in (run / "evaluation" / "evaluation.html").read_text()

    gentle = taught_numbers(tmp_path / "gentle", taught, training__max_steps=4, training__learning_rate=1e-5, **asked)
    done = foundry_here("train", gentle)
    assert done.returncode == 0, done.stderr
    assert "passed · SHIP" in done.stdout

    # Asked again later, by itself, the run gets the same verdict from the same numbers.
    done = foundry_here("evaluate", run, "--json")
    assert done.returncode == 1, done.stderr
    again = json.loads(done.stdout)
    assert (again["ship"], again["against"]) == (False, str(taught))
    assert again["reasons"]
    assert all("Wanted: " in reason for reason in again["reasons"])
    assert "DON&#x27;T SHIP" in Path(again["page"]).read_text()
    assert again["suites"]["colours"]["changes"]["accuracy"] == colours["accuracy"]
    compared = foundry_here("runs", "compare", tmp_path / "gentle" / "run", run)
    assert next(line for line in compared.stdout.splitlines() if "colours.margin" in line).endswith("worse")


def test_criteria_with_units_decide_the_exit_code(taught: Path, tmp_path: Path) -> None:
    """Prevents a criterion that is read, shown and not acted on."""
    suite = write_suite(tmp_path)
    asked = {"evaluation__suites": [str(suite)], "training__max_steps": 2, "training__learning_rate": 1e-5}
    for bound, code in (("> 1 %", 0), ("< 1 %", 1)):
        folder = tmp_path / str(code)
        config = taught_numbers(folder, taught, **asked, criteria__metrics={"colours.accuracy": bound})
        done = foundry_here("train", config)
        assert done.returncode == code, done.stderr
        checks = json.loads((folder / "run" / "report.json").read_bytes())["checks"]
        check = next(check for check in checks if check["name"] == "colours.accuracy")
        assert (check["passed"], check["bound"]) == (code == 0, bound)


@pytest.mark.parametrize("change, words", [
    ({"criteria__metrics": {"colours.bleu": "> 0.1"}}, ("colours.bleu", "colours.accuracy, ")),
    ({"criteria__metrics": {"colours.accuracy": "> 3 nats"}}, ("criteria.metrics.colours.accuracy", "nats", "share")),
    ({"evaluation__suites": ["qualty"]}, ("no suite 'qualty'", "quality")),
    ({"evaluation__suites": []}, ("colours.accuracy", "no suite is asked")),
    ({"evaluation__suites": [], "evaluation__max_rows": 3, "criteria__metrics": {}},
     ("evaluation.max_rows", "none is asked")),
])  # fmt: skip
def test_what_cannot_be_asked_is_an_error_before_the_run(
    change: dict[str, Any], words: tuple[str, ...], taught: Path, tmp_path: Path
) -> None:
    """Prevents a criterion that is found to be impossible after hours of training."""
    asked = {"evaluation__suites": [str(write_suite(tmp_path))], "criteria__metrics": {"colours.accuracy": "> 1 %"}}
    config = taught_numbers(tmp_path / "project", taught, **(asked | change))
    assert_one_paragraph(foundry_here("train", config), code=2, words=words)
    assert not (tmp_path / "project" / "run").exists()


def test_a_suite_that_does_not_fit_the_model_s_context_is_named(taught: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "long.jsonl", [{"prompt": "why? " * 600, "choices": ["a", "b"], "answer": 0}])
    (tmp_path / "long.yaml").write_text(yaml.safe_dump({"kind": "choices", "rows": "long.jsonl"}))
    done = foundry_here("evaluate", taught, "--suite", tmp_path / "long.yaml")
    assert_one_paragraph(done, code=2, words=("suite long", "context of 2,048", "leave the suite out"))


def test_what_a_run_cannot_be_asked_is_found_before_there_is_a_run(taught: Path, tmp_path: Path) -> None:
    """Prevents a run that trains for hours and fails at its second round of questions."""
    write_jsonl(tmp_path / "long.jsonl", [{"prompt": "why? " * 600, "answer": "so"}])
    (tmp_path / "long.yaml").write_text(yaml.safe_dump({"rows": "long.jsonl", "metrics": ["f1"]}))
    config = taught_numbers(tmp_path / "project", taught, evaluation__suites=[str(tmp_path / "long.yaml")])
    for command in (("train", config), ("train", config, "--dry-run")):
        assert_one_paragraph(foundry_here(*command), code=2, words=("suite long", "context of 2,048"))
    assert not (tmp_path / "project" / "run").exists()


def test_a_run_is_asked_later_what_it_was_asked_in_training(model: Path, tmp_path: Path) -> None:
    """Prevents a verdict that turns with who asks: the run's own suites and all of its questions belong to it."""
    questions = write_questions(tmp_path / "questions.jsonl")
    config = write_project(
        tmp_path, model=model, training__max_steps=2, seed=5, evaluation={
            "file": str(questions), "suites": ["general", str(write_suite(tmp_path))], "max_rows": 5,
            "max_new_tokens": 8,
        },
    )  # fmt: skip
    assert foundry_here("train", config).returncode == 0
    trained = json.loads((tmp_path / "run" / "evaluation" / "evaluation.json").read_bytes())["suites"]
    done = foundry_here("evaluate", tmp_path / "run", "--json")
    asked = json.loads(done.stdout)["suites"]
    assert asked.keys() == trained.keys() == {"questions", "general", "colours"}
    assert trained["questions"]["after"]["seed"] == 5, "what its intervals were drawn by"
    alone = foundry_here("evaluate", tmp_path / "run", f"evaluation.file={questions}", "--json")
    assert json.loads(alone.stdout)["suites"].keys() == {"questions"}, "the run's max_rows is not in the way"
    said = foundry_here("evaluate", tmp_path / "run", f"evaluation.file={questions}", "evaluation.max_rows=3")
    assert_one_paragraph(said, code=2, words=("evaluation.max_rows", "none is asked", "all asked"))
    for name, suite in asked.items():
        assert suite["after"]["digest"] == trained[name]["after"]["digest"], name
        assert suite["after"]["num_rows"] == (8 if name == "questions" else 5)
        assert suite["changes"] == trained[name]["changes"] or name == "questions"


def test_a_seed_moves_every_interval_and_nothing_else(taught: Path, tmp_path: Path) -> None:
    """Prevents a seed that is taken and does not reach the intervals of what changed."""
    suite, found = write_suite(tmp_path), []
    for seed in ((), ("seed=7",), ("seed=7",)):
        done = foundry_here("evaluate", taught, "--suite", suite, "--json", f"out={tmp_path / 'out'}", *seed)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout)["suites"]["colours"])
    plain, seven, again = found
    assert seven["changes"] == again["changes"]
    assert seven["after"]["metrics"]["margin"]["value"] == plain["after"]["metrics"]["margin"]["value"]
    assert seven["after"]["metrics"]["margin"]["interval"] != plain["after"]["metrics"]["margin"]["interval"]
    assert seven["changes"]["margin"]["interval"] != plain["changes"]["margin"]["interval"]
