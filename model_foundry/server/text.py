"""From tokens to text as they come: never half a character, never part of a stop string.

Knows a tokenizer only as a function from token ids to text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_HALF = "\ufffd"
"""What a tokenizer writes for bytes that make no character (yet)."""
_MOST_TOKENS_PER_CHARACTER = 4


class Detokenizer:
    """Text of a growing row of tokens. Joined, the pieces are the text of the whole row.

    Each piece is decoded together with the tokens of the piece before it, so that a tokenizer that joins words
    differently at the beginning of a text does not do so in the middle. What is left of a character whose last bytes
    were never written is left out.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._start = 0  # first token of the window
        self._done = 0  # tokens before this one have been given out

    def push(self, token: int) -> str:
        """The whole characters that this token completes."""
        self._tokens.append(token)
        return self._take(final=False)

    def finish(self) -> str:
        """What was still held back."""
        return self._take(final=True).rstrip(_HALF)

    def _take(self, *, final: bool) -> str:
        before = self._decode(self._tokens[self._start : self._done])
        now = self._decode(self._tokens[self._start :])
        waiting = len(self._tokens) - self._done
        # More tokens than a character can have are not one that lacks bytes: they are no text at all.
        if now.endswith(_HALF) and not final and waiting < 2 * _MOST_TOKENS_PER_CHARACTER:
            return ""
        if len(now) <= len(before):
            return ""
        self._start, self._done = self._done, len(self._tokens)
        return now[len(before) :]


class StopStrings:
    """Holds text back while it may be the beginning of a stop string, and ends it before one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """What may be shown, and whether a stop string has come."""
        if not self._stops:
            return text, False
        self._held += text
        found = [place for place in (self._held.find(stop) for stop in self._stops) if place >= 0]
        if found:
            shown, self._held = self._held[: min(found)], ""
            return shown, True
        keep = max(self._overlap(stop) for stop in self._stops)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown, False

    def finish(self) -> str:
        """What was held back and turned out to be no stop string."""
        held, self._held = self._held, ""
        return held

    def _overlap(self, stop: str) -> int:
        """How many characters at the end of what is held begin this stop string."""
        most = min(len(stop) - 1, len(self._held))
        return next((size for size in range(most, 0, -1) if self._held.endswith(stop[:size])), 0)
