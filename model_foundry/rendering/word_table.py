"""Words and their ids, for whole blocks of ASCII text at once: cut, looked up and put together by numpy.

What `pieces.py` does a piece at a time, for tokenizers that cut text as GPT-2 does (also with digits apart). A word of
up to 16 bytes is its own key, so no two can be taken for each other. Bytes that no text may hold stand for control
tokens and for the ends of texts. Knows nothing of templates; non-ASCII text is for `pieces.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

IdsOf = Callable[[Sequence[str]], Sequence[Sequence[int]]]
MARKS = (*range(1, 9), *range(14, 28))
"""Bytes that may stand for control tokens."""
END = 0
"""The byte after each text."""
MAX_WORDS = 200_000
MAX_IDS = 4_000_000
_SLOT_BITS = 19
_KEY_BYTES = 16
_MAX_CHARS = 64

_SINGLE, _LETTER, _DIGIT, _SPACE, _OTHER = range(5)
_KINDS = np.full(256, _OTHER, dtype=np.uint8)
_KINDS[[END, *MARKS]] = _SINGLE
_KINDS[[*range(65, 91), *range(97, 123)]] = _LETTER
_KINDS[48:58] = _DIGIT
_KINDS[[9, 10, 13, 32]] = _SPACE
_NOT_PLAIN = re.compile(r"[\0-\x08\x0b\x0c\x0e-\x1f]")
_IS_SHORT_ENDING = np.zeros(256, dtype=bool)  # 's 't 'm 'd
_IS_SHORT_ENDING[[ord(letter) for letter in "stmd"]] = True
_LONG_ENDINGS = [ord(pair[0]) << 8 | ord(pair[1]) for pair in ("re", "ve", "ll")]

_MASKS = np.array([(1 << 8 * count) - 1 for count in range(9)], dtype=np.uint64)
_FACTORS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], dtype=np.uint64)
_ONE, _LAST_SLOT = np.uint64(1), np.uint64((1 << _SLOT_BITS) - 1)


@dataclass(frozen=True, slots=True)
class Words:
    """An encoded block.

    Attributes:
        tokens: [N], ids of all texts.
        starts: int64 [W + 1], where each word begins, in bytes of the block; last its length.
        before: int64 [W + 1], tokens before each word; last N.
    """

    tokens: np.ndarray
    starts: np.ndarray
    before: np.ndarray


def is_plain(text: str) -> bool:
    """Whether a block may hold this text: ASCII without marks, and without what pattern engines differ on."""
    return text.isascii() and _NOT_PLAIN.search(text) is None


class WordTable:
    """Encodes blocks of texts, remembering each word.

    Args:
        digits: how the tokenizer cuts numbers: "" as GPT-2, "digit" each digit apart, "digits" numbers apart.
        ids_of: ids of each of some words.
        dtype: type of the ids that are handed out.
    """

    def __init__(
        self, *, digits: str, ids_of: Callable[[Sequence[str]], Sequence[Sequence[int]]], dtype: np.dtype[Any]
    ) -> None:
        self._digits = digits
        self._ids_of = ids_of
        self._dtype = dtype
        self._marks: dict[int, Sequence[int]] = {END: ()}
        # Kinds that take a space before them into their word.
        self._takes_space = np.zeros(5, dtype=bool)
        self._takes_space[[_LETTER, _OTHER, *([] if digits else [_DIGIT])]] = True
        self._forget()

    def set_mark(self, mark: int, ids: Sequence[int]) -> None:
        """What the byte `mark` stands for from now on."""
        self._marks[mark] = ids
        self._learn_marks([mark])

    def encode(self, block: str) -> Words:
        """Ids of a block: texts for which `is_plain` is true, with marks, each text with an END behind it."""
        if len(self._index) >= MAX_WORDS or len(self._ids) >= MAX_IDS:
            self._forget()
        data = np.frombuffer(block.encode("ascii") + bytes(_KEY_BYTES), dtype=np.uint8)
        starts = np.flatnonzero(self._begins(data, len(block)))
        words = self._find(block, data, starts, np.diff(starts, append=len(block)))
        counts = self._counts[words]
        before = np.zeros(len(starts) + 1, dtype=np.int64)
        np.cumsum(counts, out=before[1:])
        places = np.repeat(self._firsts[words] - before[:-1], counts) + np.arange(before[-1])
        return Words(self._ids[places], np.append(starts, len(block)), before)

    def _begins(self, data: np.ndarray, num_bytes: int) -> np.ndarray:
        """bool [num_bytes]: where a word begins, by GPT-2's pattern.

        's|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+
        """
        kinds = _KINDS[data[: num_bytes + 3]]
        begins = np.empty(num_bytes + 3, dtype=bool)
        begins[0] = True
        np.not_equal(kinds[1:], kinds[:-1], out=begins[1:])
        begins |= kinds == _SINGLE
        if self._digits == "digit":
            begins |= kinds == _DIGIT
        # The last white space before a word: apart from what is before it, and part of the word if it is a space.
        is_space = kinds[:num_bytes] == _SPACE
        last = np.flatnonzero(is_space & self._takes_space[kinds[1 : num_bytes + 1]])
        begins[last] = True
        begins[last[data[last] == 32] + 1] = False
        quote = np.flatnonzero(data[:num_bytes] == 39)
        quote = quote[begins[quote] & (kinds[quote + 1] == _LETTER)]
        short = quote[_IS_SHORT_ENDING[data[quote + 1]]]
        long = quote[np.isin(data[quote + 1].astype(np.int32) << 8 | data[quote + 2], _LONG_ENDINGS)]
        for ending, length in ((short, 2), (long, 3)):
            begins[ending + 1] = False
            begins[ending + length] = True
        return begins[:num_bytes]

    def _find(self, block: str, data: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """int32 [W]: the number of each word; new ones are learned."""
        # The eight bytes from every byte on, and those after them, cut to the word's length.
        eights = np.ndarray((len(data) - 7,), dtype="<u8", buffer=data.data, strides=(1,))
        first = eights[starts] & _MASKS[np.minimum(lengths, 8)]
        rest = eights[np.minimum(starts + 8, len(eights) - 1)] & _MASKS[np.clip(lengths - 8, 0, 8)]
        words = self._look_up(first, rest)
        words[lengths > _KEY_BYTES] = -1
        unknown = np.flatnonzero(words < 0)
        new: dict[str, int] = {}
        new_places = []
        for place, start, length in zip(
            unknown.tolist(), starts[unknown].tolist(), lengths[unknown].tolist(), strict=True
        ):
            word = block[start : start + length]
            number = self._index.get(word)
            if number is None and (number := new.get(word)) is None:
                number = new[word] = self._num_words + len(new)
                new_places.append(place)
            words[place] = number
        if new:
            self._learn(list(new), self._ids_of(list(new)), first[new_places], rest[new_places])
        return words

    def _look_up(self, first: np.ndarray, rest: np.ndarray) -> np.ndarray:
        slots = _slots_of(first, rest)
        words = self._slots[slots]
        is_other = (words >= 0) & ((self._firsts_of_key[slots] != first) | (self._rests_of_key[slots] != rest))
        waiting = np.flatnonzero(is_other)
        while len(waiting):
            slots[waiting] = (slots[waiting] + _ONE) & _LAST_SLOT
            at = slots[waiting]
            found = self._slots[at]
            words[waiting] = found
            is_other = (found >= 0) & (
                (self._firsts_of_key[at] != first[waiting]) | (self._rests_of_key[at] != rest[waiting])
            )
            waiting = waiting[is_other]
        return words

    def _learn(self, words: list[str], ids: Sequence[Sequence[int]], first: np.ndarray, rest: np.ndarray) -> None:
        """Remember the ids of new words, with the bytes that are their keys."""
        counts = np.fromiter(map(len, ids), dtype=np.int32, count=len(words))
        self._counts = np.append(self._counts, counts)
        self._firsts = np.append(self._firsts, len(self._ids) + np.cumsum(counts) - counts)
        self._ids = np.append(self._ids, np.fromiter(chain.from_iterable(ids), dtype=self._dtype))
        numbers = range(self._num_words, self._num_words + len(words))
        self._num_words += len(words)
        self._index |= {word: number for word, number in zip(words, numbers, strict=True) if len(word) <= _MAX_CHARS}
        is_key = np.fromiter(map(len, words), dtype=np.int64, count=len(words)) <= _KEY_BYTES
        # A block of nothing but new words must not fill the table; those left over are found by name.
        is_key[max(0, (3 << _SLOT_BITS) // 4 - numbers.start) :] = False
        self._put(first[is_key], rest[is_key], np.array(numbers, dtype=np.int32)[is_key])

    def _put(self, first: np.ndarray, rest: np.ndarray, numbers: np.ndarray) -> None:
        slots = _slots_of(first, rest)
        waiting = np.arange(len(numbers))
        while len(waiting):
            at = slots[waiting]
            free = waiting[self._slots[at] < 0]
            self._slots[slots[free]] = numbers[free]  # of two that want one slot, the last has it
            has_it = free[self._slots[slots[free]] == numbers[free]]
            self._firsts_of_key[slots[has_it]], self._rests_of_key[slots[has_it]] = first[has_it], rest[has_it]
            waiting = np.setdiff1d(waiting, has_it, assume_unique=True)
            slots[waiting] = (slots[waiting] + _ONE) & _LAST_SLOT

    def _forget(self) -> None:
        self._index: dict[str, int] = {}
        self._num_words = 0
        self._counts = np.zeros(0, dtype=np.int32)
        self._firsts = np.zeros(0, dtype=np.int64)
        self._ids = np.zeros(0, dtype=self._dtype)
        self._slots = np.full(1 << _SLOT_BITS, -1, dtype=np.int32)
        self._firsts_of_key = np.zeros(1 << _SLOT_BITS, dtype=np.uint64)
        self._rests_of_key = np.zeros(1 << _SLOT_BITS, dtype=np.uint64)
        self._learn_marks(list(self._marks))

    def _learn_marks(self, marks: list[int]) -> None:
        keys = np.array(marks, dtype=np.uint64)
        self._learn([chr(mark) for mark in marks], [self._marks[mark] for mark in marks], keys, np.zeros_like(keys))


def _slots_of(first: np.ndarray, rest: np.ndarray) -> np.ndarray:
    return ((first ^ rest * _FACTORS[1]) * _FACTORS[0]) >> np.uint64(64 - _SLOT_BITS)
