"""A bound as people write it, with its unit: "> 0.1", "at least 80 %", "< 15 grade", "within 0.25 nats".

Knows numbers and units; nothing of how anything was measured.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from model_foundry.errors import ConfigError

_WORDS = {"above": ">", "over": ">", "more than": ">", "at least": ">=", "below": "<", "under": "<", "less than": "<"}
_WORDS |= {"at most": "<="}
_FORM = re.compile(
    rf"\s*(?P<how>>=|<=|>|<|≥|≤|within|{'|'.join(_WORDS)})\s*±?\s*(?P<number>[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)"
    r"\s*(?P<unit>.*?)\s*"
)
SHARE = "share"


@dataclass(frozen=True, slots=True)
class Bound:
    """What a value must meet. `how` is >, >=, <, <= or within (of zero); `number` is in the metric's own unit."""

    how: str
    number: float
    text: str

    def holds(self, value: float, *, interval: tuple[float, float] | None = None) -> bool:
        """Whether a value meets it; NaN meets nothing. `within` fails only where the whole interval lies outside."""
        if math.isnan(value):
            return False
        if self.how == "within":
            low, high = interval or (value, value)
            return low <= self.number and high >= -self.number
        return {
            ">": value > self.number, ">=": value >= self.number, "<": value < self.number, "<=": value <= self.number,
        }[self.how]  # fmt: skip


def parse_bound(text: str, *, unit: str, where: str, span: tuple[float, float] | None = None) -> Bound:
    """Read a bound for a metric in `unit` (`share`: a number from 0 to 1, or a percentage).

    Args:
        span: least and largest value that the metric can have, where there are such.

    Raises:
        ConfigError: it cannot be read, names another unit than the metric's, or every value meets it, or none.
    """
    match = _FORM.fullmatch(str(text))
    example = "> 30 %" if unit == SHARE else f"< 15 {unit}".rstrip()
    if match is None:
        hint = f'Write a comparison and a number, for example "{example}"; within X means not beyond ±X for sure.'
        raise ConfigError(f"{text!r} is no bound", where=where, hint=hint)
    how = {"≥": ">=", "≤": "<="}.get(match["how"], _WORDS.get(match["how"], match["how"]))
    number, given = float(match["number"]), match["unit"].lower()
    if given in ("%", "percent") and unit == SHARE:
        number /= 100
    elif given not in ("", unit.lower()):
        measured = "a share: a number from 0 to 1, or a percentage" if unit == SHARE else f"in {unit or 'no unit'}"
        raise ConfigError(f"the unit of {text!r} is {given}, and the metric is {measured}", where=where)
    if unit == SHARE and not given and abs(number) > 1:
        hint = f'A share is a number from 0 to 1, or a percentage: "{how} {number:g} %".'
        raise ConfigError(f"{text!r} bounds nothing", where=where, hint=hint)
    if how == "within" and number < 0:
        raise ConfigError(f"{text!r} bounds nothing", where=where, hint="Leave out the sign.")
    shown = f"{how} {number * 100:.4g} %" if unit == SHARE else f"{how} {number:g} {unit}".rstrip()
    if how == "within":
        shown = shown.replace("within ", "within ±")
    bound = Bound(how, number, shown)
    if span is not None and len(met := {bound.holds(end) for end in span}) == 1 and not _parts(bound, span):
        low, high = (f"{end * 100:g} %" if unit == SHARE else f"{end:g}" for end in span)
        hint = f"The metric lies from {low} to {high}: {'every' if met == {True} else 'no'} value meets this."
        raise ConfigError(f"{text!r} bounds nothing", where=where, hint=hint)
    return bound


def _parts(bound: Bound, span: tuple[float, float]) -> bool:
    """Whether a bound around zero is met between the ends of a span and not at them."""
    return bound.how == "within" and not bound.holds(span[0]) and span[0] <= 0 <= span[1]
