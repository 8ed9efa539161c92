"""Many texts encoded as one block, with the tokens among them that span borders fall on.

Joins texts for a `WordTable`, a byte standing for each control token that the template writes, and finds the tokens at
the borders of spans by the renderer's rule. Knows skeletons; knows no messages.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from model_foundry.rendering.pieces import PieceEncoder, Span
from model_foundry.rendering.skeleton import Skeleton
from model_foundry.rendering.word_table import END, MARKS, Words, WordTable, is_plain
from model_foundry.tokenizer import Tokenizer

_END = chr(END)


class _NoMarkLeftError(Exception):
    pass


class TextBlocks:
    """Made by `made` where the tokenizer cuts text as GPT-2 does."""

    def __init__(self, tokenizer: Tokenizer, pieces: PieceEncoder, table: WordTable) -> None:
        self._tokenizer = tokenizer
        self._pieces = pieces
        self._table = table
        ordered = sorted(pieces.atoms, key=lambda token: (-len(token), token))
        self._atoms = re.compile("|".join(map(re.escape, ordered)) or "(?!)")
        # The special ones are kept out of people's texts by whoever asks; the others are read wherever they stand.
        self._starts = tuple({token[0] for token in pieces.atoms if not tokenizer.is_special(token)})
        self._mark_of: dict[str, str] = {}

    @staticmethod
    def made(tokenizer: Tokenizer, pieces: PieceEncoder | None, dtype: np.dtype[Any]) -> TextBlocks | None:
        if pieces is None or pieces.digits is None:
            return None
        return TextBlocks(tokenizer, pieces, WordTable(digits=pieces.digits, ids_of=pieces.ids_of_words, dtype=dtype))

    def takes(self, text: str) -> bool:
        """Whether a block may hold this text of people's: plain, and without a token that would be read as such.

        Of several texts together it may be asked at once, at the risk of a needless no.
        """
        for start in self._starts:
            if start in text and self._atoms.search(text):
                return False
        return is_plain(text)

    def with_marks(self, skeleton: Skeleton) -> Skeleton | None:
        """A skeleton that writes marks for tokens; None where a border lies within a token, or there are too many."""
        borders = []
        try:
            parts = tuple([self._marked(part) for part in skeleton.parts])
            for place, chars in skeleton.borders:
                part = skeleton.parts[place]
                before = self._marked(part[:chars])
                if before + self._marked(part[chars:]) != parts[place]:
                    return None
                borders.append((place, len(before)))
        except _NoMarkLeftError:
            return None
        return Skeleton(parts, skeleton.slots, tuple(borders))

    def encode(self, texts: Sequence[tuple[str, Sequence[Span]]]) -> list[tuple[bytes, int, list[Span]]]:
        """Of each text its ids, how many, and the tokens [first, end) that overlap each of its spans."""
        block = _END.join([text for text, _ in texts]) + _END
        words = self._table.encode(block)
        ends = np.cumsum([len(text) + 1 for text, _ in texts])
        starts = np.append(0, ends[:-1])
        places = [start + place for start, (_, spans) in zip(starts.tolist(), texts, strict=True)
                  for span in spans for place in span]  # fmt: skip
        counts = self._tokens_before(block, words, np.array(places, dtype=np.int64))
        firsts = words.before[np.searchsorted(words.starts, starts)].tolist()
        lasts = words.before[np.searchsorted(words.starts, ends)].tolist()
        data, size = words.tokens.tobytes(), words.tokens.itemsize
        found: list[tuple[bytes, int, list[Span]]] = []
        done = 0  # borders
        for first, last, (text, spans) in zip(firsts, lasts, texts, strict=True):
            upto = done + 2 * len(spans)
            tokens = [(begin - first, max(begin, end) - first)
                      for begin, end in zip(counts[done:upto:2], counts[done + 1 : upto : 2], strict=True)]  # fmt: skip
            done = upto
            if list(spans) == [(0, len(text))]:  # the renderer's own rule for all of it
                tokens = [(0, last - first)]
            found.append((data[first * size : last * size], last - first, tokens))
        return found

    def _marked(self, text: str) -> str:
        return self._atoms.sub(lambda match: self._mark(match.group()), text)

    def _mark(self, token: str) -> str:
        if token not in self._mark_of:
            if len(self._mark_of) == len(MARKS):
                raise _NoMarkLeftError
            byte = MARKS[len(self._mark_of)]
            self._table.set_mark(byte, self._tokenizer.scan(token)[0])
            self._mark_of[token] = chr(byte)
        return self._mark_of[token]

    def _tokens_before(self, block: str, words: Words, borders: np.ndarray) -> list[int]:
        """Tokens before each border: the start of a span and its end, in turn."""
        places = np.searchsorted(words.starts, borders)
        counts = words.before[places]
        for index in np.flatnonzero(words.starts[places] != borders).tolist():
            word = int(places[index]) - 1  # the word that the border cuts
            start, end = int(words.starts[word]), int(words.starts[word + 1])
            inside = self._pieces.count_in_piece(block[start:end], int(borders[index]) - start, is_end=bool(index % 2))
            counts[index] = words.before[word] + inside
        return counts.tolist()
