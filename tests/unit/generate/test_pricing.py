"""Prices: exact sums, bounds that hold, and no guess for a model that nobody knows."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_foundry.errors import ConfigError
from model_foundry.generate.pricing import PRICES, Usage, dollars, find_price, nano


def test_a_request_costs_what_the_table_says() -> None:
    """Prevents a factor of a thousand, and a batch at the full price."""
    price = find_price("claude-haiku-4-5")  # $1 and $5 a million
    usage = Usage(input_tokens=1000, output_tokens=100)
    assert price.cost(usage, batch=False) == 1_500_000  # nano-dollars
    assert price.cost(usage, batch=True) == 750_000


def test_prompts_over_the_threshold_cost_more_in_everything() -> None:
    """Prevents pricing a long prompt, and its output, at a fifth of the bill."""
    price = find_price("claude-haiku-5-5")
    short, long = Usage(100_000, 10), Usage(100_001, 10)
    assert price.cost(short, batch=False) == 100_000 * 100 + 10 * 500
    assert price.cost(long, batch=False) == (100_001 * 100 + 10 * 500) * 5


def test_inference_in_the_us_alone_costs_a_tenth_more() -> None:
    usage = Usage.from_api({"input_tokens": 1000, "output_tokens": 0, "inference_geo": "us"})
    assert usage is not None
    assert find_price("claude-haiku-4-5").cost(usage, batch=False) == 1_100_000


@given(
    model=st.sampled_from(sorted(PRICES)),
    bound=st.tuples(st.integers(0, 300_000), st.integers(0, 100_000)),
    shares=st.tuples(*[st.floats(0, 1)] * 2),
    us=st.booleans(),
    batch=st.booleans(),
)
def test_nothing_within_the_bounds_costs_more_than_the_worst_case(
    model: str, bound: tuple[int, int], shares: tuple[float, float], us: bool, batch: bool
) -> None:
    """Prevents a ceiling that reserves less than a bill can be."""
    price = PRICES[model]
    usage = Usage(int(bound[0] * shares[0]), int(bound[1] * shares[1]), us_inference=us)
    worst = price.worst_case(max_input_tokens=bound[0], max_output_tokens=bound[1], batch=batch)
    assert price.cost(usage, batch=batch) <= worst


def test_an_unknown_model_is_refused_until_its_prices_are_given() -> None:
    """Prevents a ceiling made of a guessed price."""
    with pytest.raises(ConfigError, match=r"price\.input and price\.output"):
        find_price("claude-of-tomorrow")
    with pytest.raises(ConfigError, match=r"Give price\.output"):
        find_price("claude-of-tomorrow", given={"input": 3.0, "output": None})
    price = find_price("claude-of-tomorrow", given={"input": 3.0, "output": 15.0, "date": "2027-01-01"})
    assert (price.input, price.output, price.date) == (Decimal(3), Decimal(15), "2027-01-01")
    assert price.cost(Usage(cache_write_tokens=10**6), batch=False) == nano(6)  # never cheaper than the kinds there are


def test_given_prices_replace_those_of_the_table() -> None:
    price = find_price("claude-haiku-5-5", given={"input": 7.0, "output": None, "batch_share": 0.25})
    assert (price.input, price.output, price.batch_share) == (Decimal(7), Decimal("0.50"), Decimal("0.25"))
    assert price.long_prompt_tokens == 100_000


@pytest.mark.parametrize(
    "value",
    [None, [], {}, {"input_tokens": 5}, {"output_tokens": "7"}, {"output_tokens": -1}, {"output_tokens": True}],
)
def test_a_usage_that_cannot_be_read_is_none(value: object) -> None:
    """Prevents counting a reply as free because its usage was spoilt."""
    assert Usage.from_api(value) is None


def test_money_is_shown_so_that_small_sums_are_not_nothing() -> None:
    assert dollars(nano("1234.5")) == "$1,234.50"
    assert dollars(nano("0.00042")) == "$0.00042"
    assert dollars(0) == "$0.00"
    assert nano("0.0000000019") == 1  # rounded down: a ceiling is never raised
