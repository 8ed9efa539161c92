"""Numbers and names as people read them: units from a name's ending, no digits that mean nothing.

Shared by the page and the summary on the console. Knows no run and no markup.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

_UNITS = ("_bytes", "_seconds", "_share")
_BYTE_NAMES = ("B", "KiB", "MiB", "GiB", "TiB")
_NAMES = {
    "exact": "exact match",
    "f1": "word F1",
    "contains": "contains the answer",
    "seconds": "time",
    "sha256": "SHA-256",
    "cpu": "CPU",
    "gpu": "GPU",
    "argv": "command line",
}
MISSING = "–"
SHIPPING = {"passed": "SHIP", "failed": "DON'T SHIP", "unchecked": "NOT JUDGED"}
"""What a report's verdict means for the model."""


def label(name: str) -> str:
    """A key as words: `peak_bytes` is "peak"."""
    if name in _NAMES:
        return _NAMES[name]
    for unit in _UNITS:
        if name.endswith(unit) and name != unit:
            name = name.removesuffix(unit)
    return name.replace("_", " ").strip() or MISSING


def value_text(value: Any, name: str = "") -> str:
    """A JSON value as text, in the unit that its name says."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return _number_text(value, name)
    if isinstance(value, list | tuple):
        return ", ".join(value_text(each) for each in value) or MISSING
    return str(value)


def check_value(value: float | str | None, bound: str) -> str:
    """A check's value: a percentage where its bound is one, all else as it is."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and "%" in bound:
        return f"{value:.1%}".replace("%", " %")
    return value_text(value)


def bytes_text(num_bytes: float) -> str:
    """A size to three digits, in the unit that gives it so few."""
    power = 0
    while abs(num_bytes) >= 1024 and power < len(_BYTE_NAMES) - 1:
        num_bytes /= 1024
        power += 1
    size = abs(num_bytes)
    num_digits = 0 if power == 0 or size >= 100 else 1 if size >= 10 else 2
    return f"{num_bytes:,.{num_digits}f} {_BYTE_NAMES[power]}"


def duration_text(seconds: float) -> str:
    """A time span: 12.3 s, 2 min 05 s, 3 h 20 min."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def share_text(share: float) -> str:
    """A share as a whole percentage, never 0 % or 100 % unless it is."""
    percent = share * 100
    if 0 < percent < 0.5 or 99.5 < percent < 100:
        return f"{percent:.1f} %" if 0.05 <= percent <= 99.95 else ("< 0.1 %" if percent < 1 else "> 99.9 %")
    return f"{percent:.0f} %"


def flattened(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """(label, last key, value) of every leaf of a section, in its order; empty lists and dicts are left out."""
    for key, value in section.items():
        name = str(key)
        words = f"{prefix} · {label(name)}" if prefix else label(name)
        if isinstance(value, Mapping):
            yield from flattened(value, words)
        elif value not in ([], (), None):
            yield words, name, value


def _number_text(value: float, name: str) -> str:
    if name.endswith("bytes"):
        return bytes_text(value)
    if name.endswith("seconds"):
        return duration_text(value)
    if name.endswith("_share"):
        return share_text(value)
    if isinstance(value, int):
        # A seed or a year is a name in digits; counts are grouped.
        return str(value) if name.endswith(("seed", "year")) else f"{value:,}"
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:.3g}"
