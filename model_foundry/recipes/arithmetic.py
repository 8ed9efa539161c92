"""Arithmetic as an environment: problems by seed and step, and a reward that needs no judge."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from model_foundry.errors import DataError
from model_foundry.tokenizer import Tokenizer

OPERATIONS: dict[str, tuple[str, Callable[[int, int], int]]] = {
    "add": ("+", operator.add),
    "subtract": ("-", operator.sub),
    "multiply": ("x", operator.mul),
}
"""Name -> its sign, and what it does."""
_EXAMPLES = ((1, 1), (3, 2))
"""Shown in every prompt, and so neither trained on nor asked."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A prompt, as text and as int32 tokens [T], and the answer that is right."""

    text: str
    prompt: np.ndarray
    answer: str


class Arithmetic:
    """Two numbers and one operation, after two worked examples.

    Args:
        num_held_out: problems that `problems` never gives; `held_out` are they.

    Raises:
        DataError: there are not that many problems, or an end of line is not one token.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        operation: str = "add",
        largest: int = 9,
        num_held_out: int = 20,
        problems_per_step: int = 8,
        seed: int = 0,
    ) -> None:
        self._tokenizer, self._operation = tokenizer, operation
        self._problems_per_step, self._seed = problems_per_step, seed
        pairs = [(a, b) for a in range(largest + 1) for b in range(largest + 1) if (a, b) not in _EXAMPLES]
        if num_held_out + problems_per_step > len(pairs):
            what = f"there are {len(pairs)} problems with numbers to {largest}; {num_held_out} are to be held out"
            raise DataError(what, where="problems", hint="Raise problems.largest, or hold out fewer.")
        shuffled = np.random.default_rng([seed, 0]).permutation(len(pairs))
        self.held_out = tuple(self._problem(*pairs[index]) for index in shuffled[:num_held_out])
        self._trained_on = [pairs[index] for index in shuffled[num_held_out:]]
        end = tokenizer.encode("\n")
        if len(end) != 1:
            raise DataError(f"an end of line is {len(end)} tokens here, and an answer ends with one", where="tokenizer")
        ends = (end[0], tokenizer.eos_id)
        self.stop_token_ids = tuple(token for token in ends if token is not None)

    def _problem(self, left: int, right: int) -> Problem:
        sign, compute = OPERATIONS[self._operation]
        shown = "".join(f"{a} {sign} {b} = {compute(a, b)}\n" for a, b in _EXAMPLES)
        text = f"{left} {sign} {right} = "
        ids = self._tokenizer.encode(shown + text, add_special=True)
        return Problem(text, np.array(ids, np.int32), str(compute(left, right)))

    def problems(self, step: int) -> Sequence[Problem]:
        """Those of a step: a function of the seed and the step."""
        chosen = np.random.default_rng([self._seed, 1, step]).choice(
            len(self._trained_on), self._problems_per_step, replace=False
        )
        return [self._problem(*self._trained_on[index]) for index in chosen]

    def reply(self, tokens: np.ndarray) -> str:
        return self._tokenizer.decode(tokens.tolist(), skip_special=True).strip()

    def reward(self, problem: Problem, tokens: np.ndarray) -> float:
        """1 for the right number and nothing else."""
        return float(self.reply(tokens) == problem.answer)
