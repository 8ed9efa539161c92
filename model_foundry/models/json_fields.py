"""Typed reading of a JSON object that somebody else wrote; every complaint names the key and the file.

It knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from model_foundry.errors import ModelError


@dataclass(frozen=True, slots=True)
class JsonFields:
    """A JSON object, what stands in for missing keys, and where it came from."""

    values: Mapping[str, Any]
    where: str
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def wrong(self, key: str, value: Any, wanted: str) -> ModelError:
        return ModelError(f"{key} is {value!r}; it must be {wanted}", where=self.where)

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, self.defaults.get(key, default))

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1."""
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.wrong(key, value, "a whole number of at least 1")
        return value

    def number(self, key: str, default: float | None = None, *, least: float = 0.0) -> float:
        """A finite number of at least `least`."""
        value = self.get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not least <= value < float("inf"):
            raise self.wrong(key, value, f"a number of at least {least:g}")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        return None if self.get(key) is None else self.number(key)

    def flag(self, key: str) -> bool:
        """A boolean; null and absent are false."""
        value = self.get(key) or False
        if not isinstance(value, bool):
            raise self.wrong(key, value, "true or false")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """None, one id or a list of ids, as a tuple."""
        value = self.get(key)
        values = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in values):
            raise self.wrong(key, value, "a token id or a list of them")
        return tuple(values)

    def token_id(self, key: str) -> int | None:
        value = self.token_ids(key)
        if len(value) > 1:
            raise self.wrong(key, list(value), "one token id")
        return value[0] if value else None
