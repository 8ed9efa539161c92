"""What a run will send and cost, said before anything is sent.

Input tokens come from the API's counter for a few requests spread over the corpus, scaled by bytes; where it does not
answer, one token for two bytes is assumed, which errs high for code. Neither decides anything: the ceiling is held by
the ledger, with bytes as the bound of input and max_tokens as the bound of output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from model_foundry.data.code.units import CodeUnit
from model_foundry.generate.client import AnswerLostError, Client, NotSentError, RefusedError
from model_foundry.generate.pacing import refusal
from model_foundry.generate.pricing import PRICES_SOURCE, Usage, dollars
from model_foundry.generate.requests import Recipe, max_input_tokens

BYTES_A_TOKEN = 2
ASSUMED_TOKENS_A_QUESTION = 60
ASSUMED_TOKENS_OF_THOUGHT = 300


@dataclass(frozen=True)
class Estimate:
    """Money in nano-dollars.

    Attributes:
        num_requests: that this run may send; num_done: that have an outcome.
        input_how, output_how: where the numbers of tokens come from, in words.
        worst_case: no run of these requests can cost more; a batch's price unless they are sent one by one.
    """

    num_requests: int
    num_done: int
    input_tokens: int
    input_how: str
    output_tokens: int
    output_how: str
    expected: int
    worst_case: int
    model: str
    batch: bool
    price_date: str

    def as_dict(self) -> dict[str, Any]:
        return {
            "requests": self.num_requests,
            "requests_done": self.num_done,
            "model": self.model,
            "mode": "batch" if self.batch else "messages",
            "input_tokens": self.input_tokens,
            "input_tokens_from": self.input_how,
            "output_tokens": self.output_tokens,
            "output_tokens_from": self.output_how,
            "expected_usd": self.expected / 1e9,
            "worst_case_usd": self.worst_case / 1e9,
            "prices_of": self.price_date,
        }

    def lines(self) -> list[str]:
        how = "as batches" if self.batch else "one by one"
        return [
            f"requests    {self.num_requests:,} to send {how} to {self.model}, {self.num_done:,} done before",
            f"input       about {self.input_tokens:,} tokens ({self.input_how})",
            f"output      about {self.output_tokens:,} tokens ({self.output_how})",
            f"cost        about {dollars(self.expected)}, at the very most {dollars(self.worst_case)}",
            f"prices      of {self.price_date}, {PRICES_SOURCE}",
        ]


def estimate(
    units: Sequence[CodeUnit],
    recipe: Recipe,
    *,
    batch: bool,
    client: Client | None,
    sample: int,
    num_done: int = 0,
    mean_output_tokens: float | None = None,
) -> Estimate:
    """What sending `units` will cost.

    Args:
        client: asked to count a few requests; None, or one that can't be reached, leaves the local estimate.
        sample: requests to count at most.
        mean_output_tokens: of the replies that there are, if there are any.

    Raises:
        FoundryError: the API refuses the key, the model or the parameters.
    """
    sizes, worst_case = [], 0
    for unit in units:
        params = recipe.params(unit)
        sizes.append(max_input_tokens(params))
        worst_case += recipe.worst_case(params, batch=batch)
    input_tokens, input_how = _count(units, recipe, sizes, client, sample)
    each, output_how = mean_output_tokens, "the mean of the replies so far"
    if each is None:
        num_questions = len(recipe.prompt.voices) * recipe.prompt.questions_per_voice
        each = min(recipe.max_tokens, num_questions * ASSUMED_TOKENS_A_QUESTION + ASSUMED_TOKENS_OF_THOUGHT)
        output_how = f"{each} assumed a reply; {recipe.max_tokens:,} at most"
    output_tokens = math.ceil(each * len(units))
    mean = Usage(input_tokens // max(1, len(units)), math.ceil(each))
    return Estimate(
        num_requests=len(units),
        num_done=num_done,
        input_tokens=input_tokens,
        input_how=input_how,
        output_tokens=output_tokens,
        output_how=output_how,
        expected=recipe.price.cost(mean, batch=batch) * len(units),
        worst_case=worst_case,
        model=recipe.model,
        batch=batch,
        price_date=recipe.price.date,
    )


def _count(
    units: Sequence[CodeUnit], recipe: Recipe, sizes: Sequence[int], client: Client | None, sample: int
) -> tuple[int, str]:
    total = sum(sizes)
    local = math.ceil(total / BYTES_A_TOKEN)
    assumed = f"one token for {BYTES_A_TOKEN} bytes, which errs high"
    if client is None or not units or sample <= 0:
        return local, assumed
    chosen = range(0, len(units), max(1, len(units) // sample))[:sample]
    tokens = 0
    for index in chosen:
        try:
            tokens += client.count_tokens(recipe.params(units[index]))
        except RefusedError as error:
            if not error.passes:
                raise refusal(error, "counting the tokens of a request") from error
            return local, f"{assumed}; the API's counter is busy"
        except (NotSentError, AnswerLostError) as error:
            return local, f"{assumed}; the API's counter does not answer: {error}"
    if len(chosen) == len(units):
        return tokens, "the API's counter"
    scaled = math.ceil(tokens * total / sum(sizes[index] for index in chosen))
    return scaled, f"the API's counter for {len(chosen)} of them, scaled by bytes"
