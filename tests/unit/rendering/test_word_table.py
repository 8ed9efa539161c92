"""Blocks of text cut and looked up at once have the tokens that the tokenizer gives to each text."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import pre_tokenizers

from model_foundry.rendering import word_table
from model_foundry.rendering.pieces import find_cuts
from model_foundry.rendering.word_table import END, MARKS, WordTable, is_plain
from tests.unit.rendering.test_pieces import BYTES, merging_tokenizer

EXAMPLES = int(os.environ.get("PIECES_EXAMPLES", "150"))
PARTS = [" ", "  ", "\n", "\r\n", "\t", "a", "The", "fox", "s", "t", "re", "ll", "ve", "d", "m", "'", "''", "1", "2024"]
PARTS += [".", "!?", "(", "_", "--", "<", "\x7f", "word" * 6, " " * 20, "=" * 17, "S", "RE"]
TEXTS = st.one_of(
    st.lists(st.sampled_from(PARTS), max_size=14).map("".join),
    st.text(st.characters(min_codepoint=9, max_codepoint=126, blacklist_categories=["Cs"]), max_size=20),
).filter(is_plain)
STEPS: dict[str, list[pre_tokenizers.PreTokenizer]] = {
    "": [BYTES],
    "digit": [pre_tokenizers.Digits(individual_digits=True), BYTES],
    "digits": [pre_tokenizers.Digits(individual_digits=False), BYTES],
}


def backend_of(digits: str) -> Backend:
    backend = merging_tokenizer()
    backend.pre_tokenizer = pre_tokenizers.Sequence(STEPS[digits])
    return backend


def table_of(backend: Backend) -> WordTable:
    cuts = find_cuts(backend)
    assert cuts is not None
    assert cuts.digits is not None
    as_bytes = {byte: 0x100 + byte for byte in range(33)} | {127: 0x121}

    def ids_of(words: object) -> list[list[int]]:
        assert isinstance(words, list)
        return [[token.id for token in backend.model.tokenize(word.translate(as_bytes))] for word in words]

    return WordTable(digits=cuts.digits, ids_of=ids_of, dtype=np.dtype("<u2"))


def encoded(table: WordTable, texts: list[str]) -> list[list[int]]:
    words = table.encode("".join(text + chr(END) for text in texts))
    assert len(words.starts) == len(words.before)
    assert words.before[-1] == len(words.tokens)
    ends = np.cumsum([len(text) + 1 for text in texts])
    places = words.before[np.searchsorted(words.starts, np.append(0, ends))]
    return [part.tolist() for part in np.split(words.tokens, places[1:-1])]


@pytest.mark.slow
@pytest.mark.parametrize("digits", STEPS)
def test_ids_are_those_of_each_text(digits: str) -> None:
    """A word cut elsewhere than the tokenizer cuts has other ids, and nobody would see it."""
    backend = backend_of(digits)
    table = table_of(backend)

    @given(texts=st.lists(TEXTS, min_size=1, max_size=4))
    @settings(max_examples=EXAMPLES, deadline=None)
    def check(texts: list[str]) -> None:
        expected = [backend.encode(text, add_special_tokens=False).ids for text in texts]
        assert encoded(table, texts) == expected
        assert encoded(table, texts) == expected  # from memory

    check()


def test_marks_stand_for_tokens_and_cut_words(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = backend_of("")
    table = table_of(backend)
    for number, mark in enumerate(MARKS):
        table.set_mark(mark, [number] * (number % 3))
    monkeypatch.setattr(word_table, "MAX_WORDS", 30)  # marks survive forgetting
    chance = random.Random(0)
    for _ in range(60):
        texts = ["".join(chance.choices(PARTS, k=4)) for _ in range(5)]
        numbers = chance.sample(range(len(MARKS)), 4)
        block = texts[0] + "".join(chr(MARKS[n]) + text for n, text in zip(numbers, texts[1:], strict=True))
        expected = backend.encode(texts[0], add_special_tokens=False).ids
        for number, text in zip(numbers, texts[1:], strict=True):
            expected = [*expected, *[number] * (number % 3), *backend.encode(text, add_special_tokens=False).ids]
        assert encoded(table, [block]) == [expected]


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A corpus has more words than fit into memory, and some are megabytes long."""
    backend = backend_of("")
    table = table_of(backend)
    monkeypatch.setattr(word_table, "MAX_WORDS", 500)
    monkeypatch.setattr(word_table, "MAX_IDS", 20_000)
    for number in range(40):
        texts = [f" word{number * 1000 + n}x" for n in range(100)] + ["=" * 3000]
        assert encoded(table, texts) == [backend.encode(text, add_special_tokens=False).ids for text in texts]
        assert table._num_words < 1000
        assert len(table._ids) < 30_000


def test_words_that_want_one_slot_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of 16 slots: nearly every word finds another where it looks first."""
    monkeypatch.setattr(word_table, "_SLOT_BITS", 4)
    monkeypatch.setattr(word_table, "_LAST_SLOT", np.uint64(15))
    backend = backend_of("digit")
    table = table_of(backend)
    texts = ["a fox", "The fox", "a", " a", "fox a The"]
    texts += [f"w{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]  # more than there are slots
    for _ in range(3):
        assert encoded(table, texts) == [backend.encode(text, add_special_tokens=False).ids for text in texts]


@pytest.mark.parametrize("text", ["é", "\0", "\x01", "\x0b", "\x0c", "\x1c", "\x1f", "a\x08b"])
def test_text_that_is_not_for_a_block_is_told(text: str) -> None:
    assert not is_plain(text)
    assert is_plain("plain\ttext\r\n\x7f ~")
