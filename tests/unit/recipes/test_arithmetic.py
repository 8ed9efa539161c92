"""The arithmetic environment: what it asks, and what it takes for right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from model_foundry.errors import DataError
from model_foundry.recipes.arithmetic import Arithmetic
from model_foundry.tokenizer import Tokenizer


@pytest.fixture
def tokenizer(chatml_folder: Path) -> Tokenizer:
    return Tokenizer.load(chatml_folder)


def test_held_out_problems_are_never_given(tokenizer: Tokenizer) -> None:
    environment = Arithmetic(tokenizer, largest=4, num_held_out=6, problems_per_step=8, seed=3)
    held_out = {problem.text for problem in environment.held_out}
    given = {problem.text for step in range(40) for problem in environment.problems(step)}
    assert len(held_out) == 6
    assert len(given) == 23 - 6
    assert not held_out & given
    assert [p.text for p in environment.problems(5)] == [p.text for p in environment.problems(5)]


@pytest.mark.parametrize(("operation", "its_sign"), [("add", "+"), ("subtract", "-"), ("multiply", "x")])
def test_only_the_right_number_is_worth_something(operation: str, its_sign: str, tokenizer: Tokenizer) -> None:
    environment = Arithmetic(tokenizer, operation=operation, largest=4, num_held_out=15, seed=0)
    asked = [*environment.held_out, *environment.problems(0)]
    for problem in asked:
        left, sign, right, _ = problem.text.split()
        assert sign == its_sign
        right_answer = {"+": int(left) + int(right), "-": int(left) - int(right), "x": int(left) * int(right)}[sign]
        assert problem.answer == str(right_answer)
        for reply, worth in ((problem.answer, 1.0), (f" {problem.answer}\n", 1.0), (f"{problem.answer} (", 0.0)):
            assert environment.reward(problem, np.array(tokenizer.encode(reply), np.int32)) == worth


def test_too_many_held_out(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="23 problems"):
        Arithmetic(tokenizer, largest=4, num_held_out=20, problems_per_step=8)
