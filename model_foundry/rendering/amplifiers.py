"""Operations that make something big out of something small, measured before they are done."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jinja2.sandbox import SecurityError

from model_foundry.rendering.budget import Budget

MAX_INTEGER_BITS = 1_024
_WIDE_PERCENT = re.compile(r"%[^a-zA-Z%]*(?:\d{4}|\*)")
_WIDE_NAMED_PERCENT = re.compile(r"\d{4}|\*")
_WIDE_FORMAT = re.compile(r"\{[^{}]*(?:\{|\d{4})")


def allow_bits(num_bits: int) -> None:
    if num_bits > MAX_INTEGER_BITS:
        raise SecurityError("the chat template computes too big a number")


def allow_product(budget: Budget, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        allow_bits(left.bit_length() + right.bit_length())
        return
    for value, times in ((left, right), (right, left)):
        if isinstance(value, (str, list, tuple)) and isinstance(times, int):
            budget.allow(budget.weigh(value) * max(times, 0))


def allow_percent(budget: Budget, text: str, values: Any) -> None:
    if _WIDE_PERCENT.search(text) or ("%(" in text and _WIDE_NAMED_PERCENT.search(text)):
        raise SecurityError("the chat template pads a text too widely")
    budget.allow(len(text) + text.count("%") * budget.weigh(values))


def allow_str_method(budget: Budget, text: str, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    if name == "replace":
        allow_replace(budget, text, *args, **kwargs)
    elif name == "join":
        allow_join(budget, text, *args)
    elif name == "format":
        if _WIDE_FORMAT.search(text.replace("{{", "")):
            raise SecurityError("the chat template pads a text too widely")
        budget.allow(len(text) + text.count("{") * budget.weigh([list(args), kwargs]))
    else:
        budget.allow(len(text))


def allow_replace(budget: Budget, text: Any, old: Any = "", new: Any = "", *_: Any, **__: Any) -> None:
    text, old, new = str(text), str(old), str(new)
    budget.allow(len(text) + text.count(old) * len(new))


def allow_join(budget: Budget, separator: str, values: Any = ()) -> None:
    if isinstance(values, (list, tuple)):
        budget.allow(budget.weigh(values) + len(values) * len(separator))


def check_filter(budget: Budget, name: str, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Measure what the filter `name` would make of `value`."""
    options = [*args, *kwargs.values()]
    texts = [len(option) for option in options if isinstance(option, str)]
    numbers = [abs(option) for option in options if isinstance(option, int)]
    if name in ("indent", "tojson", "round") and max(numbers, default=0) > 1_000:
        raise SecurityError(f"the chat template gives too big a number to the filter {name!r}")
    if name == "format":
        allow_percent(budget, str(value), options)
    elif name == "sum" and any(isinstance(option, (list, tuple)) for option in options):
        raise SecurityError("chat templates may only sum numbers")
    elif name == "join":
        budget.allow(budget.weigh(value) + len(value) * max(texts, default=0))
    elif name == "replace":
        named = dict(zip(("old", "new"), args, strict=False)) | dict(kwargs)
        allow_replace(budget, value, named.get("old", ""), named.get("new", ""))
    elif name in ("indent", "tojson"):
        num_lines = value.count("\n") + 1 if isinstance(value, str) else budget.weigh(value)
        budget.allow(budget.weigh(value) + num_lines * max([4, *texts, *numbers]))
    else:
        budget.weigh(value)
