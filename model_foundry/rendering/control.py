"""Keep control tokens in people's text from being read as such.

Before a template runs, each control token inside a message becomes one private-use character that the row does not
hold; after it, whatever control token the rendered text has was written by the template. One character, so that no
template can cut it in two. Where a text begins or ends with part of a token, a guard character keeps the neighbouring
text from completing it. Knows tokens as strings only.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from model_foundry.errors import DataError

_PRIVATE_USE = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFF0), range(0xE000, 0xF900))


class Escapes:
    """The private characters of one row and what each stands for."""

    def __init__(self, taken: str) -> None:
        self._free = _free_characters(taken)
        self._by_text: dict[str, str] = {}
        self.table: dict[int, str] = {}

    def character(self, text: str) -> str:
        """The character that stands for `text`; the empty text gives the guard."""
        if text not in self._by_text:
            character = next(self._free, None)
            if character is None:
                raise DataError("the row uses every private-use character of Unicode", hint="Remove some")
            self._by_text[text] = character
            self.table[ord(character)] = text
        return self._by_text[text]

    def undo(self, text: str) -> str:
        return text.translate(self.table)

    def positions(self, text: str) -> Callable[[int], int]:
        """Where a character of the escaped `text` is once the escapes are undone."""
        places: list[int] = []
        shifts = [0]
        for match in re.finditer(f"[{''.join(map(chr, self.table))}]" if self.table else "(?!)", text):
            places.append(match.start())
            shifts.append(shifts[-1] + len(self.table[ord(match.group())]) - 1)
        return lambda index: index + shifts[bisect_left(places, index)]

    def holds(self, text: str) -> bool:
        return any(chr(code) in text for code in self.table)


class ControlText:
    """Finds and escapes `tokens` in values of messages."""

    def __init__(self, tokens: Collection[str]) -> None:
        self.tokens = tuple(sorted(tokens, key=lambda token: (-len(token), token)))
        self._first = tuple({token[0] for token in tokens})
        self._last = tuple({token[-1] for token in tokens})
        self._reach = max([2, *map(len, tokens)]) - 1
        self._prefixes = tuple({token[:n] for token in tokens for n in range(1, len(token))})
        self._suffixes = tuple({token[n:] for token in tokens for n in range(1, len(token))})
        self._pattern = re.compile("|".join(map(re.escape, self.tokens)) or r"(?!)")

    def occurs(self, text: str) -> bool:
        """Whether the text holds a control token."""
        return _holds(text, self._first) and self._pattern.search(text) is not None

    def find(self, text: str) -> tuple[str, ...]:
        """The control tokens in the text, each once, in order."""
        if not any(first in text for first in self._first):
            return ()
        return tuple(dict.fromkeys(match.group() for match in self._pattern.finditer(text)))

    def concerns(self, text: str) -> bool:
        """Whether the text holds a control token, or part of one at either end."""
        if _holds(text, self._first):
            if self._pattern.search(text) is not None:
                return True
            if _holds(text[-self._reach :], self._first) and text.endswith(self._prefixes):
                return True
        return _holds(text[: self._reach], self._last) and text.startswith(self._suffixes)

    def escape(self, text: str, escapes: Escapes) -> str:
        escaped = self._pattern.sub(lambda match: escapes.character(match.group()), text)
        if escaped.startswith(self._suffixes):
            escaped = escapes.character("") + escaped
        if escaped.endswith(self._prefixes):
            escaped += escapes.character("")
        return escaped

    def escape_value(self, value: Any, escapes: Escapes) -> Any:
        """`value` with every text in it escaped, keys of mappings too."""
        if isinstance(value, str):
            return self.escape(value, escapes) if self.concerns(value) else value
        if isinstance(value, Mapping):
            return {self.escape_value(k, escapes): self.escape_value(v, escapes) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.escape_value(item, escapes) for item in value]
        return value

    def ending(self, text: str) -> tuple[str, ...]:
        """The control tokens that `text` ends with, white space aside, in order."""
        found: list[str] = []
        text = text.rstrip()
        while token := next((token for token in self.tokens if text.endswith(token)), None):
            found.insert(0, token)
            text = text[: -len(token)].rstrip()
        return tuple(found)


def _holds(text: str, characters: Collection[str]) -> bool:
    # A loop, for it runs over every text: any() with a generator takes three times as long.
    for character in characters:  # noqa: SIM110
        if character in text:
            return True
    return False


def texts(value: Any) -> Iterator[str]:
    """Every text inside plain data."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from texts(key)
            yield from texts(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from texts(item)


def _free_characters(taken: str) -> Iterator[str]:
    for block in _PRIVATE_USE:
        for code in block:
            if chr(code) not in taken:
                yield chr(code)
