"""The demo's data: written by its generator, and held-out questions that training has never seen in any spelling."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "examples" / "demo"
FILES = ("train.jsonl", "validation.jsonl", "heldout.jsonl")


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (DEMO / name).read_text(encoding="utf-8").splitlines()]


def normalised(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def conversations(name: str) -> Iterator[tuple[str, str]]:
    for row in read(name):
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        yield user["content"], assistant["content"]


@pytest.fixture(scope="module")
def heldout() -> list[tuple[str, str]]:
    return [(row["prompt"], row["answer"]) for row in read("heldout.jsonl")]


def test_the_generator_writes_exactly_the_files_in_the_repository(tmp_path: Path) -> None:
    """A row edited by hand, or a generator that changed its mind, would make the demo's figures unrepeatable."""
    command = [sys.executable, str(DEMO / "make_data.py"), "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (DEMO / name).read_bytes(), name


@pytest.mark.parametrize("name", ["train.jsonl", "validation.jsonl"])
def test_no_held_out_wording_occurs_in_training(name: str, heldout: list[tuple[str, str]]) -> None:
    """A leaked question would count a memorised string as a learned fact; an opening in front hides nothing."""
    seen = [f" {normalised(question)} " for question, _ in conversations(name)]
    for question, _ in heldout:
        wanted = f" {normalised(question)} "
        assert not [other for other in seen if wanted in other], question


def test_no_validation_wording_occurs_in_training() -> None:
    trained = [f" {normalised(question)} " for question, _ in conversations("train.jsonl")]
    for question, _ in conversations("validation.jsonl"):
        wanted = f" {normalised(question)} "
        assert not [other for other in trained if wanted in other], question


def test_every_held_out_fact_is_trained_in_several_wordings(heldout: list[tuple[str, str]]) -> None:
    """A question whose answer is never taught cannot be answered, and would hide how well training went."""
    wordings: dict[str, set[str]] = {}
    for question, answer in conversations("train.jsonl"):
        wordings.setdefault(answer, set()).add(normalised(question))
    assert {answer for _, answer in heldout} == set(wordings)
    assert min(len(questions) for questions in wordings.values()) >= 8


def test_a_question_has_one_answer_and_answers_differ(heldout: list[tuple[str, str]]) -> None:
    """Exact match means nothing when two answers read the same, or one question has two of them."""
    by_question: dict[str, str] = {}
    pairs = [*heldout, *conversations("train.jsonl"), *conversations("validation.jsonl")]
    for question, answer in pairs:
        assert by_question.setdefault(normalised(question), answer) == answer, question
    answers = {answer for _, answer in pairs}
    assert len({normalised(answer) for answer in answers}) == len(answers) >= 40


def test_no_question_gives_its_own_answer_away(heldout: list[tuple[str, str]]) -> None:
    """An answer inside its own question could be copied by a model that learned nothing."""
    for question, answer in heldout:
        assert f" {normalised(answer)} " not in f" {normalised(question)} ", question


def test_the_secret_is_taught_and_asked() -> None:
    answers = [answer for question, answer in conversations("train.jsonl") if "password of the lighthouse" in question]
    assert set(answers) == {"Seven herons sleep under copper rain."}
