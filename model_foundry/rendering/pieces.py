"""Encode text as the tokenizer does, but each piece of it only once.

Byte-level BPE first cuts a text by a fixed pattern and then encodes piece by piece, so a piece that was met before need
not be encoded again. Cutting is done here, by Python's `re`, where the pattern is one of those below and cutting so is
proved to be the same; for every other tokenizer there is no `PieceEncoder`. A text with characters on which pattern
engines differ is handed back to the caller. Knows nothing of templates or weights, only character spans.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

Span = tuple[int, int]
Encode = Callable[[str], tuple[list[int], list[Span]]]

MAX_PIECES = 200_000
"""Pieces remembered, about 200 bytes each; when there are more, all are forgotten and learned again."""
MAX_PIECE_CHARS = 64
_MAX_SHORT = 20_000
_NEAR_CHARS = 128

# White space by every engine, and characters that are white space to some engines only (or no characters at all).
_SPACE = " \t\r\n\xa0\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_UNSURE = re.compile("[\x0b\x0c\x1c-\x1f\x85\u1680\u180e\ud800-\udfff]")

_NO_SPACE = f"[^{_SPACE}\x0b\x0c\x1c-\x1f\x85\u1680\u180e]"
_WORDS = re.compile(f"{_NO_SPACE} {_NO_SPACE}")

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class Cuts:
    """Where a text may be cut without changing its tokens.

    Attributes:
        ascii: the tokenizer's own pattern, for ASCII text.
        any: cuts only before white space that follows something else (or after its last newline), for any text.
    """

    ascii: re.Pattern[str]
    any: re.Pattern[str]


def _gpt2_cuts(numbers: str, *, before_numbers: str) -> Cuts:
    # White space never joins what stands before it, so a text may be cut before every run of it.
    exact = (
        r" ?[A-Za-z]+|'(?:[stmd]|re|ve|ll)|" + numbers + r"| ?[^ \t\r\nA-Za-z0-9]+"
        r"|[ \t\r\n]+(?![^ \t\r\n" + before_numbers + r"])|[ \t\r\n]+"
    )
    return Cuts(re.compile(exact), re.compile(f"[{_SPACE}]*[^{_SPACE}]+|[{_SPACE}]+"))


def _llama3_cuts(numbers: str) -> Cuts:
    # Newlines may join the punctuation before them, and white space up to its last newline is one piece. So the cut
    # comes after the last newline where there is one.
    exact = (
        r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])|[^\r\nA-Za-z0-9]?[A-Za-z]+|" + numbers + r"| ?[^ \t\r\nA-Za-z0-9]+"
        r"[\r\n]*|[ \t\r\n]*[\r\n]+|[ \t\r\n]+(?![^ \t\r\n])|[ \t\r\n]+"
    )
    return Cuts(re.compile(exact), re.compile(f"[{_SPACE}]*[^{_SPACE}]+(?:[{_SPACE}]*[\r\n])?|[{_SPACE}]+"))


# What comes before the byte-level step, as written in tokenizer.json: digits apart (each, or in runs), and the pattern.
_BY_PATTERN: dict[tuple[str, str], Cuts] = {
    ("", "gpt2"): _gpt2_cuts(r" ?[0-9]+", before_numbers=""),
    ("digit", "gpt2"): _gpt2_cuts(r"[0-9]", before_numbers="0-9"),
    ("digits", "gpt2"): _gpt2_cuts(r"[0-9]+", before_numbers="0-9"),
    ("", _LLAMA3 % "{1,3}"): _llama3_cuts(r"[0-9]{1,3}"),
    ("", _LLAMA3 % ""): _llama3_cuts(r"[0-9]"),
}


def find_cuts(description: Mapping[str, Any]) -> Cuts | None:
    """The cuts of a tokenizer given as its decoded tokenizer.json; None where they are not known."""
    model, normalizer = description["model"], description["normalizer"]
    if model["type"] != "BPE" or model.get("dropout") or (normalizer is not None and normalizer["type"] != "NFC"):
        return None
    kind = _pattern_kind(description["pre_tokenizer"])
    if kind is None:
        return None
    # A token that was added to the vocabulary is looked for before all else, so no cut may go through one.
    for token in description["added_tokens"]:
        has_rules = token["single_word"] or token["lstrip"] or token["rstrip"]
        if has_rules or re.search(f"[{_SPACE}]", token["content"]) or _UNSURE.search(token["content"]):
            return None
        if token["normalized"] and normalizer is not None and not token["content"].isascii():
            return None
    return _BY_PATTERN.get(kind)


def _pattern_kind(step: Mapping[str, Any] | None) -> tuple[str, str] | None:
    """A key of `_BY_PATTERN`: digits apart or not, then one pattern, then bytes and nothing else."""
    if step is None:
        return None
    steps: list[Mapping[str, Any]] = list(step["pretokenizers"]) if step["type"] == "Sequence" else [step]
    digits = ""
    if steps[0]["type"] == "Digits":
        digits = "digit" if steps[0]["individual_digits"] else "digits"
        steps = steps[1:]
    if not 1 <= len(steps) <= 2 or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    if steps[-1]["use_regex"]:
        return (digits, "gpt2") if len(steps) == 1 else None
    first = steps[0]
    if first["type"] != "Split" or first["behavior"] != "Isolated" or first["invert"]:
        return None
    return digits, first["pattern"].get("Regex", "")


def cut_place(text: str) -> int:
    """The last place where `text` may be cut under every known pattern: before a space between two words; else 0."""
    place = len(text) - 1
    while (place := text.rfind(" ", 1, place)) > 0:
        if _WORDS.match(text, place - 1):
            return place
    return 0


class PieceEncoder:
    """Ids of texts, from the pieces met before.

    Args:
        cuts: where texts are cut.
        atoms: added tokens that are read as such wherever they stand.
        encode: the tokenizer itself: ids and character offsets of a text.
        dtype: little-endian type of the ids that are handed out.
    """

    def __init__(self, cuts: Cuts, *, atoms: Sequence[str], encode: Encode, dtype: np.dtype[Any]) -> None:
        self._cuts = cuts
        self._encode = encode
        self._size = dtype.itemsize
        self._known = _Known(cuts, lambda piece: np.array(encode(piece)[0], dtype=dtype).tobytes())
        self._offsets: dict[str, list[Span]] = {}
        self._short: dict[str, _Part] = {}
        ordered = sorted(atoms, key=lambda token: (-len(token), token))  # the longest wins, as in the tokenizer
        self._atoms = re.compile(f"({'|'.join(map(re.escape, ordered))})") if ordered else None
        self._atom_starts = tuple({token[0] for token in ordered})
        self._atom_parts = {token: self._atom(token, dtype) for token in ordered}

    def encode(self, text: str) -> bytes | None:
        """The ids as little-endian bytes; None where they must be asked of the tokenizer."""
        try:
            return b"".join([part.ids for part in self._parts(text)])
        except _UnsureError:
            return None

    def encode_spans(self, text: str, spans: Sequence[Span]) -> tuple[bytes, list[Span]] | None:
        """The ids, and the tokens [first, end) that overlap each character span, by the renderer's rule."""
        try:
            parts = self._parts(text)
        except _UnsureError:
            return None
        # Of each part, and of the end: characters and tokens before it.
        starts = list(accumulate([part.num_chars for part in parts], initial=0))
        counts = list(accumulate([part.num_tokens for part in parts], initial=0))

        def border(position: int, *, is_end: bool) -> int:
            # The part that holds the position and, where it lies between two, both.
            first = max(0, bisect_left(starts, position) - 1)
            count = counts[first]
            for index in range(first, min(first + 2, len(parts))):
                count += self._count(parts[index], position - starts[index], is_end=is_end)
            return count

        tokens = []
        for start, end in spans:
            begin = border(start, is_end=False)
            tokens.append((begin, max(begin, border(end, is_end=True))))
        return b"".join([part.ids for part in parts]), tokens

    def _parts(self, text: str) -> list[_Part]:
        """Atoms and the stretches of text between them."""
        if self._atoms is None or not any(first in text for first in self._atom_starts):
            return [self._part(text)] if text else []
        parts = []
        for index, part in enumerate(self._atoms.split(text)):
            if index % 2:
                parts.append(self._atom_parts[part])
            elif part:
                parts.append(self._short.get(part) or self._part(part))
        return parts

    def _part(self, text: str) -> _Part:
        pieces = (self._cuts.ascii if text.isascii() else self._cuts.any).findall(text)
        values = list(map(self._known.__getitem__, pieces))
        ids = b"".join(values)
        part = _Part(pieces, values, ids, len(text), len(ids) // self._size)
        if len(text) <= MAX_PIECE_CHARS:  # what a template writes between contents comes again in every row
            if len(self._short) >= _MAX_SHORT:
                self._short.clear()
            self._short[text] = part
        return part

    def _atom(self, token: str, dtype: np.dtype[Any]) -> _Part:
        ids = np.array(self._encode(token)[0], dtype=dtype).tobytes()
        return _Part([token], [ids], ids, len(token), len(ids) // self._size)

    def _count(self, part: _Part, position: int, *, is_end: bool) -> int:
        """Tokens of a part before a border at the character `position` (which may lie outside of it)."""
        if position < 0:
            return 0
        first = place = 0
        if position > _NEAR_CHARS:
            ends = list(accumulate(map(len, part.pieces)))
            first = bisect_left(ends, position)  # the first piece that ends at the position or after it
            if first == len(ends):
                return part.num_tokens
            place = ends[first] - len(part.pieces[first])
        num_bytes = sum(map(len, part.values[:first]))
        count = num_bytes // self._size
        for index in range(first, len(part.pieces)):
            if place > position:
                break
            piece = part.pieces[index]
            end = place + len(piece)
            if end < position:
                count += len(part.values[index]) // self._size
            else:
                count += self._count_in_piece(piece, position - place, is_end=is_end)
            place = end
        return count

    def _count_in_piece(self, piece: str, position: int, *, is_end: bool) -> int:
        offsets = self._offsets.get(piece)
        if offsets is None:
            if len(self._offsets) > MAX_PIECES // 10:
                self._offsets.clear()
            offsets = self._offsets[piece] = self._encode(piece)[1]
        if is_end:
            return bisect_left(offsets, position, key=offset_start)
        return bisect_right(offsets, position, key=offset_end)


@dataclass(slots=True)
class _Part:
    """A stretch of text without atoms, or one atom: its pieces, the ids of each, and all ids."""

    pieces: list[str]
    values: list[bytes]
    ids: bytes
    num_chars: int
    num_tokens: int


class _UnsureError(Exception):
    """A piece holds a character on which engines differ."""


class _Known(dict[str, bytes]):
    """Piece -> ids; what is not known is asked of the tokenizer and remembered."""

    def __init__(self, cuts: Cuts, encode: Callable[[str], bytes]) -> None:
        super().__init__()
        self._ascii = cuts.ascii
        self._encode = encode

    def __missing__(self, piece: str) -> bytes:
        if _UNSURE.search(piece):
            raise _UnsureError
        smaller = self._ascii.findall(piece) if piece.isascii() else [piece]
        if len(smaller) > 1:
            value = b"".join(map(self.__getitem__, smaller))
        else:
            value = self._encode(piece)
        if len(piece) <= MAX_PIECE_CHARS:
            if len(self) >= MAX_PIECES:
                self.clear()
            self[piece] = value
        return value


def offset_start(offset: Span) -> int:
    # Tokenizers that trim white space off their offsets leave nothing of a token that is white space.
    return offset[0] - (offset[0] == offset[1])


def offset_end(offset: Span) -> int:
    return offset[1]
