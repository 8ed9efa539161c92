"""Synthetic rows: the same bytes for ever, in formats that the readers know, with answers that are right."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from model_foundry.data.rows import read_rows
from model_foundry.data.synth.dice import Dice
from model_foundry.data.synth.facts import OBJECTIVE_SETS
from model_foundry.data.synth.writing import ENDLESS_SETS, KINDS, synthetic_rows, write_synthetic
from model_foundry.errors import DataError
from model_foundry.evals.generation import read_questions

FORMATS = {
    "chat": "messages", "instruction": "alpaca", "preference": "preference", "kto": "kto", "text": "text",
    "geography": "messages", "arithmetic": "messages", "pattern": "messages",
}  # fmt: skip
# sha256 of 200 rows of seed 7 (and 20 questions), as they were first published.
PUBLISHED = {
    "chat": "3685e7fd13dd37d7",
    "instruction": "ecc8119d7daf8cc4",
    "preference": "23334a82cfb8c319",
    "kto": "4f40314cd0f5db6e",
    "text": "6da0dfb25696afcc",
    "geography": "b43172a043b2281a",
    "arithmetic": "7e1ab94cfdbb9836",
    "pattern": "87e78a9560905ccc",
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_a_seed_never_change(kind: str, tmp_path: Path) -> None:
    """Prevents a figure in a report from standing for other data than it did."""
    heldout = tmp_path / "questions.jsonl" if kind in OBJECTIVE_SETS else None
    write_synthetic(kind, tmp_path / "rows.jsonl", num_rows=200, seed=7, heldout=heldout, num_heldout=20)
    data = (tmp_path / "rows.jsonl").read_bytes() + (b"" if heldout is None else heldout.read_bytes())
    assert hashlib.sha256(data).hexdigest()[:16] == PUBLISHED[kind]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_are_of_a_known_format_all_different_and_other_for_another_seed(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    assert write_synthetic(kind, path, num_rows=300).num_rows == 300
    rows = read_rows(path)
    assert (rows.format, len(rows.rows), rows.ignored_fields) == (FORMATS[kind], 300, {})
    assert len({repr((row.messages, row.text, row.chosen)) for row in rows.rows}) == 300
    assert all(row.chosen != row.rejected for row in rows.rows if row.chosen)
    write_synthetic(kind, tmp_path / "other.jsonl", num_rows=300, seed=1)
    others = read_rows(tmp_path / "other.jsonl").rows
    assert [(row.messages, row.text) for row in others] != [(row.messages, row.text) for row in rows.rows]


@pytest.mark.parametrize("kind", ENDLESS_SETS)
def test_a_row_does_not_depend_on_how_many_are_made(kind: str) -> None:
    assert list(synthetic_rows(kind, num_rows=9, seed=3))[:4] == list(synthetic_rows(kind, num_rows=4, seed=3))


def questions_and_answers(row: dict[str, Any]) -> tuple[str, str]:
    question, answer = row["messages"]
    return question["content"], answer["content"]


@pytest.mark.parametrize("kind", OBJECTIVE_SETS)
def test_held_out_questions_are_questions_and_never_trained_on(kind: str, tmp_path: Path) -> None:
    """Prevents a measured success that is a memorised string."""
    rows, questions = tmp_path / "rows.jsonl", tmp_path / "questions.jsonl"
    write_synthetic(kind, rows, num_rows=400, heldout=questions, num_heldout=50)
    asked = read_questions(questions)
    trained = dict(questions_and_answers(json.loads(line)) for line in rows.read_text().splitlines())
    assert (len(asked), len(trained)) == (50, 400)
    assert not {question.prompt for question in asked} & trained.keys()
    if kind == "geography":
        assert {question.answer for question in asked} <= set(trained.values())


def test_arithmetic_is_right_and_no_held_out_problem_is_trained_in_other_words() -> None:
    """Prevents 3 + 5 from being held out while 5 + 3 is trained."""
    rows, questions = OBJECTIVE_SETS["arithmetic"](3000, 300, 5)
    pairs = [questions_and_answers(row) for row in rows] + [(row["prompt"], row["answer"]) for row in questions]
    problems = []
    for question, answer in pairs:
        match = re.search(r"(\d+) ([+×-]) (\d+)", question)
        assert match is not None
        one, sign, other = int(match[1]), match[2], int(match[3])
        assert {"+": one + other, "-": one - other, "×": one * other}[sign] == int(answer)
        problems.append((sign, *sorted((one, other))))
    assert len(set(problems)) == len(problems)


def test_the_numbers_of_patterns_go_on_as_they_began() -> None:
    rows, _ = OBJECTIVE_SETS["pattern"](700, 0, 5)
    num_checked = 0
    for question, answer in map(questions_and_answers, rows):
        numbers = [int(word) for word in re.findall(r"-?\d+", question)]
        if len(numbers) != 4:
            continue
        num_checked += 1
        if numbers[1] - numbers[0] == numbers[2] - numbers[1]:
            assert int(answer) - numbers[3] == numbers[1] - numbers[0]
        else:
            assert int(answer) * numbers[2] == numbers[3] ** 2
    assert num_checked > 400


def test_capitals_name_one_country_each() -> None:
    rows, _ = OBJECTIVE_SETS["geography"](1000, 0, 0)
    answers: dict[str, set[str]] = {}
    for question, answer in map(questions_and_answers, rows):
        answers.setdefault(question, set()).add(answer)
    assert all(len(found) == 1 for found in answers.values())
    assert len({answer for found in answers.values() for answer in found}) > 170


def test_more_rows_than_there_are_is_refused_and_writes_nothing(tmp_path: Path) -> None:
    """Prevents a set padded with the same rows."""
    with pytest.raises(DataError, match=r"geography has .* different rows, and 100,000 are asked for"):
        write_synthetic("geography", tmp_path / "rows.jsonl", num_rows=100_000)
    with pytest.raises(DataError, match="chat rows have no held-out questions"):
        write_synthetic("chat", tmp_path / "rows.jsonl", num_rows=1, heldout=tmp_path / "q.jsonl")
    with pytest.raises(DataError, match="would be one file"):
        write_synthetic("pattern", tmp_path / "rows.jsonl", num_rows=1, heldout=tmp_path / "rows.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_dice_are_fair_and_shuffle_without_loss() -> None:
    dice = Dice(0, "a")
    counts = [0] * 6
    for _ in range(6000):
        counts[dice.below(6)] += 1
    assert min(counts) > 900
    assert sorted(dice.shuffled(range(20))) == list(range(20))
    assert [Dice(0, "a").below(1000), Dice(0, "b").below(1000)] != [Dice(1, "a").below(1000), Dice(1, "b").below(1000)]
