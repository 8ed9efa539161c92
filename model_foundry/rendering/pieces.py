"""Encode text as the tokenizer does, but each piece of it only once.

Byte-level BPE first cuts a text by a fixed pattern and then encodes piece by piece, so a piece that was met before need
not be encoded again. Cutting is done here, by Python's `re`, where the pattern is one of those below and cutting so is
proved to be the same; for every other tokenizer there is no `PieceEncoder`. A text with characters on which pattern
engines differ is handed back to the caller. Knows nothing of templates or weights, only character spans.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import tokenizers

Span = tuple[int, int]
Encode = Callable[[str], tuple[list[int], list[Span]]]
# How the byte-level step writes ASCII: what is printable as itself, the rest from U+0100 on.
_AS_BYTES = {byte: 0x100 + byte for byte in range(33)} | {127: 0x121}

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
        digits: how numbers are cut where the pattern is GPT-2's (see `WordTable`), else None.
    """

    ascii: re.Pattern[str]
    any: re.Pattern[str]
    digits: str | None = None


def _gpt2_cuts(numbers: str, *, before_numbers: str, digits: str) -> Cuts:
    # White space never joins what stands before it, so a text may be cut before every run of it.
    exact = (
        r" ?[A-Za-z]+|'(?:[stmd]|re|ve|ll)|" + numbers + r"| ?[^ \t\r\nA-Za-z0-9]+"
        r"|[ \t\r\n]+(?![^ \t\r\n" + before_numbers + r"])|[ \t\r\n]+"
    )
    return Cuts(re.compile(exact), re.compile(f"[{_SPACE}]*[^{_SPACE}]+|[{_SPACE}]+"), digits)


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
    ("", "gpt2"): _gpt2_cuts(r" ?[0-9]+", before_numbers="", digits=""),
    ("digit", "gpt2"): _gpt2_cuts(r"[0-9]", before_numbers="0-9", digits="digit"),
    ("digits", "gpt2"): _gpt2_cuts(r"[0-9]+", before_numbers="0-9", digits="digits"),
    ("", _LLAMA3 % "{1,3}"): _llama3_cuts(r"[0-9]{1,3}"),
    ("", _LLAMA3 % ""): _llama3_cuts(r"[0-9]"),
}


def find_cuts(backend: tokenizers.Tokenizer) -> Cuts | None:
    """The cuts of a tokenizer; None where they are not known."""
    normalizer = backend.normalizer
    if not isinstance(backend.model, tokenizers.models.BPE) or backend.model.dropout:
        return None
    if backend.pre_tokenizer is None or not (normalizer is None or isinstance(normalizer, tokenizers.normalizers.NFC)):
        return None
    kind = _pattern_kind(json.loads(backend.pre_tokenizer.__getstate__()))
    if kind is None:
        return None
    # A token that was added to the vocabulary is looked for before all else, so no cut may go through one.
    for token in backend.get_added_tokens_decoder().values():
        if token.single_word or token.lstrip or token.rstrip:
            return None
        if re.search(f"[{_SPACE}]", token.content) or _UNSURE.search(token.content):
            return None
        if token.normalized and normalizer is not None and not token.content.isascii():
            return None
    return _BY_PATTERN.get(kind)


def _pattern_kind(step: Mapping[str, Any]) -> tuple[str, str] | None:
    """A key of `_BY_PATTERN`: digits apart or not, then one pattern, then bytes and nothing else."""
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
        encode: the tokenizer itself: ids and character offsets of a text, which leave out no space.
        model: asked for its model (of the `tokenizers` package) once there is a new piece.
        dtype: little-endian type of the ids that are handed out.
    """

    def __init__(
        self,
        cuts: Cuts,
        *,
        atoms: Sequence[str],
        encode: Encode,
        model: Callable[[], Any],
        dtype: np.dtype[Any],
    ) -> None:
        self.digits = cuts.digits
        self.atoms = tuple(atoms)
        self._cuts = cuts
        self._encode = encode
        self._size = dtype.itemsize
        self._known = _Known(cuts, encode, model, dtype)
        self._counts: dict[tuple[str, int, bool], int] = {}
        self._short: dict[str, _Part] = {}
        ordered = sorted(atoms, key=lambda token: (-len(token), token))  # the longest wins, as in the tokenizer
        self._atoms = re.compile(f"({'|'.join(map(re.escape, ordered))})") if ordered else None
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
            index = min(bisect_right(starts, position), len(parts)) - 1
            return counts[index] + self._count(parts[index], position - starts[index], is_end=is_end) if parts else 0

        tokens = []
        for start, end in spans:
            begin = border(start, is_end=False)
            tokens.append((begin, max(begin, border(end, is_end=True))))
        return b"".join([part.ids for part in parts]), tokens

    def _parts(self, text: str) -> list[_Part]:
        """Atoms and the stretches of text between them."""
        if self._atoms is None:
            return [self._part(text)] if text else []
        parts, short, atoms = [], self._short, self._atom_parts
        for index, part in enumerate(self._atoms.split(text)):
            if index % 2:
                parts.append(atoms[part])
            elif part:
                parts.append(short.get(part) or self._part(part))
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
        """Tokens of a part before a border at the character `position`, which lies in it or at its end."""
        if position >= part.num_chars:
            return part.num_tokens
        first = place = 0
        if position > _NEAR_CHARS:
            ends = list(accumulate(map(len, part.pieces)))
            first = bisect_right(ends, position)  # the piece that begins at the position, or holds it
            place = ends[first] - len(part.pieces[first])
        count = sum(map(len, part.values[:first])) // self._size
        for index in range(first, len(part.pieces)):
            piece = part.pieces[index]
            if place + len(piece) > position:
                return (
                    count if place == position else count + self.count_in_piece(piece, position - place, is_end=is_end)
                )
            count += len(part.values[index]) // self._size
            place += len(piece)
        return count

    def ids_of_words(self, words: Sequence[str]) -> list[list[int]]:
        """Ids of each: ASCII texts that the tokenizer's own pattern does not cut."""
        return self._known.ids_of_words(words)

    def count_in_piece(self, piece: str, position: int, *, is_end: bool) -> int:
        """Tokens of a piece before a border at a character of it: the end of a span, or its start."""
        key = (piece, position, is_end)
        count = self._counts.get(key)
        if count is None:
            if len(self._counts) >= _MAX_SHORT:
                self._counts.clear()
            offsets = self._encode(piece)[1]
            if is_end:
                count = bisect_left(offsets, position, key=offset_start)
            else:
                count = bisect_right(offsets, position, key=offset_end)
            self._counts[key] = count
        return count


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

    def __init__(self, cuts: Cuts, encode: Encode, model: Callable[[], Any], dtype: np.dtype[Any]) -> None:
        super().__init__()
        self._cut = cuts.ascii.findall
        self._encode = encode
        self._get_model = model
        self._model: Any = None
        self._dtype = dtype

    def __missing__(self, piece: str) -> bytes:
        if _UNSURE.search(piece):
            raise _UnsureError
        if not piece.isascii():
            value = np.array(self._encode(piece)[0], dtype=self._dtype).tobytes()
        elif len(smaller := self._cut(piece)) > 1:
            value = b"".join(map(self.__getitem__, smaller))
        else:
            value = np.array(self.ids_of_words([piece])[0], dtype=self._dtype).tobytes()
        if len(piece) <= MAX_PIECE_CHARS:
            if len(self) >= MAX_PIECES:
                self.clear()
            self[piece] = value
        return value

    def ids_of_words(self, words: Sequence[str]) -> list[list[int]]:
        # Straight from the model, at a ninth of the time.
        if self._model is None:
            self._model = self._get_model()
        tokenize = self._model.tokenize
        return [[token.id for token in tokenize(word.translate(_AS_BYTES))] for word in words]


def offset_start(offset: Span) -> int:
    # Tokenizers that trim white space off their offsets leave nothing of a token that is white space.
    return offset[0] - (offset[0] == offset[1])


def offset_end(offset: Span) -> int:
    return offset[1]
