"""What a request may cost and what it did cost, in whole nano-dollars so that sums are exact.

The table holds list prices with the day they were read. A model that isn't in it is refused unless its prices are
given: a guessed price would make a guessed ceiling. Every rounding is upwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from model_foundry.errors import ConfigError

PRICES_DATE = "2026-10-24"
PRICES_SOURCE = "https://platform.claude.com/docs/en/about-claude/pricing"
BATCH_SHARE = Decimal("0.5")
US_INFERENCE_FACTOR = Decimal("1.1")
"""A workspace may run its inference in the US alone, at this factor; a request can't know, so it may always apply."""
NANO = 10**9
_TOKENS_A_PRICE = 10**6


@dataclass(frozen=True, slots=True)
class Price:
    """Dollars a million tokens, for requests sent one by one.

    Attributes:
        cache_write: of the dearest kind (kept for an hour).
        long_prompt_tokens: prompts of more tokens than this cost `long_prompt_factor` times as much in everything.
        date: the day the price was read.
    """

    input: Decimal
    output: Decimal
    cache_write: Decimal
    cache_read: Decimal
    long_prompt_tokens: int | None = None
    long_prompt_factor: Decimal = Decimal(1)
    batch_share: Decimal = BATCH_SHARE
    date: str = PRICES_DATE

    def cost(self, usage: Usage, *, batch: bool) -> int:
        """Nano-dollars of a request that came back."""
        dollars = (
            usage.input_tokens * self.input
            + usage.output_tokens * self.output
            + usage.cache_write_tokens * self.cache_write
            + usage.cache_read_tokens * self.cache_read
        )
        factor = US_INFERENCE_FACTOR if usage.us_inference else Decimal(1)
        return self._nano(dollars * factor, prompt_tokens=usage.prompt_tokens, batch=batch)

    def worst_case(self, *, max_input_tokens: int, max_output_tokens: int, batch: bool) -> int:
        """Nano-dollars that a request cannot exceed."""
        dollars = (max_input_tokens * self.input + max_output_tokens * self.output) * US_INFERENCE_FACTOR
        return self._nano(dollars, prompt_tokens=max_input_tokens, batch=batch)

    def _nano(self, dollars_million: Decimal, *, prompt_tokens: int, batch: bool) -> int:
        if self.long_prompt_tokens is not None and prompt_tokens > self.long_prompt_tokens:
            dollars_million *= self.long_prompt_factor
        if batch:
            dollars_million *= self.batch_share
        return int((dollars_million * NANO / _TOKENS_A_PRICE).to_integral_value(rounding="ROUND_CEILING"))


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that the API says it billed."""

    input_tokens: int = 0
    output_tokens: int = 0
    cache_write_tokens: int = 0
    cache_read_tokens: int = 0
    us_inference: bool = False

    @property
    def prompt_tokens(self) -> int:
        return self.input_tokens + self.cache_write_tokens + self.cache_read_tokens

    @staticmethod
    def from_api(value: Any) -> Usage | None:
        """The `usage` of a reply; None when it isn't one, so that the caller counts the worst case."""
        if not isinstance(value, Mapping):
            return None
        names = ("input_tokens", "output_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
        numbers = [value.get(name) or 0 for name in names]
        if value.get("output_tokens") is None or not all(type(number) is int and number >= 0 for number in numbers):
            return None
        return Usage(*numbers, us_inference=value.get("inference_geo") == "us")


def _price(input: str, output: str, cache_write: str, cache_read: str, *, long: tuple[int, int] | None = None) -> Price:
    tokens, factor = long if long is not None else (None, 1)
    return Price(
        Decimal(input), Decimal(output), Decimal(cache_write), Decimal(cache_read), tokens, Decimal(factor)
    )  # fmt: skip


PRICES: dict[str, Price] = {
    "claude-fable-5-1": _price("10", "50", "20", "0.25"),
    "claude-fable-5": _price("10", "50", "20", "1"),
    "claude-opus-5-5": _price("4", "20", "8", "0.20"),
    "claude-opus-5": _price("5", "25", "10", "0.50"),
    "claude-opus-4-8": _price("5", "25", "10", "0.50"),
    "claude-opus-4-7": _price("5", "25", "10", "0.50"),
    "claude-opus-4-6": _price("5", "25", "10", "0.50"),
    "claude-opus-4-5": _price("5", "25", "10", "0.50"),
    "claude-opus-4-5-20251101": _price("5", "25", "10", "0.50"),
    "claude-sonnet-5-5": _price("2", "10", "4", "0.10"),
    "claude-sonnet-5": _price("2", "10", "4", "0.20"),
    "claude-sonnet-4-6": _price("3", "15", "6", "0.30"),
    "claude-haiku-5-5": _price("0.10", "0.50", "0.20", "0.01", long=(100_000, 5)),
    "claude-haiku-4-5": _price("1", "5", "2", "0.10"),
    "claude-haiku-4-5-20251001": _price("1", "5", "2", "0.10"),
}
"""List prices as of PRICES_DATE, from PRICES_SOURCE; batches cost BATCH_SHARE of them."""


def find_price(model: str, *, given: Mapping[str, float | str | None] | None = None) -> Price:
    """The price of a model.

    Args:
        given: what the configuration says instead: `input`, `output`, `cache_write`, `cache_read` (dollars a million
            tokens), `batch_share` and `date`; None leaves the table's.

    Raises:
        ConfigError: the model isn't in the table and its prices aren't given.
    """
    said = {name: value for name, value in (given or {}).items() if value is not None}
    known = PRICES.get(model)
    missing = [name for name in ("input", "output") if name not in said]
    if known is None and missing:
        raise ConfigError(
            f"the price of {model} is not in the table of {PRICES_DATE} ({PRICES_SOURCE})",
            where="generation.model",
            hint=f"Give {' and '.join(f'price.{name}' for name in missing)} in dollars a million tokens, or choose one "
            f"of {', '.join(PRICES)}",
        )
    if not said:
        assert known is not None
        return known
    number = {name: Decimal(str(value)) for name, value in said.items() if name != "date"}
    input, output = number.get("input"), number.get("output")
    base = known or Price(number["input"], number["output"], 2 * number["input"], number["input"])
    return Price(
        input=input if input is not None else base.input,
        output=output if output is not None else base.output,
        cache_write=number.get("cache_write", 2 * input if input is not None else base.cache_write),
        cache_read=number.get("cache_read", input if input is not None else base.cache_read),
        long_prompt_tokens=base.long_prompt_tokens,
        long_prompt_factor=base.long_prompt_factor,
        batch_share=number.get("batch_share", base.batch_share),
        date=str(said.get("date", f"given in the configuration ({PRICES_DATE} for the rest)")),
    )


def dollars(nano: int, *, places: int = 2) -> str:
    """`$1.23`; small sums keep enough digits to be told from nothing."""
    value = Decimal(nano) / NANO
    if 0 < value < Decimal(1).scaleb(-places):
        places = min(9, 2 - value.adjusted() - 1)
    return f"${value:,.{places}f}"


def nano(dollars: float | str | Decimal) -> int:
    """Whole nano-dollars of a sum in dollars, rounded down: a ceiling is never raised by rounding."""
    return int((Decimal(str(dollars)) * NANO).to_integral_value(rounding="ROUND_FLOOR"))
