"""Texts as sets: the quick way over bytes must see what the slow way over characters sees."""

from __future__ import annotations

import hashlib
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_foundry.data.shingles import hash_tokens, normalise, shingle_sets, text_chunks

TOKEN = re.compile(r"[\u0800-\U0010ffff][a-z0-9_\x80-\u07ff]*|[a-z0-9_\x80-\u07ff]+|[^\s]")
CHARACTERS = st.sampled_from(list("abZ_9 .,(\t\n\r\x00\x1c\x85\xa0éÉßﬁ́Σς中あ\u2003\u3000😀\ud800İ"))
TEXTS = st.lists(st.one_of(st.text(CHARACTERS, max_size=40), st.text(max_size=20)), max_size=8)
ODD_TEXTS = [
    "", " \n\t ", " a", "a ", "a b", "A\tb", "a+b", "x" * 7, "x" * 8, "x" * 9, "x" * 128, "x" * 129, "x" * 200,
    "x" * 199 + "y", "the cat", "the cat sat", "日本語 abc 中文", "😀😀 a", "a\0b", "\ud800 lone",
    "caf\u00e9", "cafe\u0301",
]  # fmt: skip


def slow_tokens(text: str) -> list[str]:
    return TOKEN.findall(normalise(text))


def slow_shingles(text: str) -> set[tuple[str, ...]]:
    tokens = slow_tokens(text)
    return {tuple(tokens[start : start + 3]) for start in range(max(1, len(tokens) - 2))} if tokens else set()


def assert_same_as_slow(texts: list[str]) -> None:
    tokens = hash_tokens(texts)
    assert tokens.counts.tolist() == [len(slow_tokens(text)) for text in texts]
    words = [word for text in texts for word in slow_tokens(text)]
    pairs = set(zip(words, tokens.hashes.tolist(), strict=True))
    assert len(pairs) == len(set(words)) == len({value for _, value in pairs})
    encoded = [normalise(text).encode("utf-8", "surrogatepass") for text in texts]
    assert tokens.digests == [hashlib.sha256(data).digest()[:16] for data in encoded]
    sets = shingle_sets(tokens, seed=0)
    assert sets.sizes.tolist() == [len(slow_shingles(text)) for text in texts]
    by_text = np.split(sets.values, np.cumsum(sets.sizes)[:-1]) if texts else []
    for first, left in zip(texts, by_text, strict=True):
        for second, right in zip(texts, by_text, strict=True):
            assert len(np.intersect1d(left, right)) == len(slow_shingles(first) & slow_shingles(second))


def test_odd_texts_have_the_tokens_shingles_and_digests_of_the_slow_way() -> None:
    assert_same_as_slow(ODD_TEXTS)


@settings(max_examples=80, deadline=None)
@given(TEXTS)
def test_any_texts_have_the_tokens_shingles_and_digests_of_the_slow_way(texts: list[str]) -> None:
    """A neighbour in the same buffer must not change a text: borders, white space and bytes beyond ASCII."""
    assert_same_as_slow(texts)


@pytest.mark.parametrize("text", ["Straße  IS\u00a0here", "İstanbul", "ﬁne", "a\u0301\u0327 b"])
def test_normalising_twice_changes_nothing_more(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


def test_leaving_texts_out_is_the_same_as_not_having_read_them() -> None:
    texts = ["one two three four", "left out entirely here", "", "five six", "seven"]
    wanted = np.array([True, False, True, True, True])
    some = shingle_sets(hash_tokens(texts), seed=3, wanted=wanted)
    alone = shingle_sets(hash_tokens([text for text, want in zip(texts, wanted, strict=True) if want]), seed=3)
    assert some.keys.tolist() == alone.keys.tolist()
    assert some.sizes.tolist() == alone.sizes.tolist() == [2, 0, 1, 1]


def test_chunks_hold_every_text_once_and_tell_how_many_are_done() -> None:
    texts = ["x" * size for size in (5, 1, 0, 900, 3, 3, 400)]
    told: list[int] = []
    chunks = list(text_chunks(iter(texts), num_bytes=8, on_progress=told.append))
    assert [text for chunk in chunks for text in chunk] == texts
    assert told == np.cumsum([len(chunk) for chunk in chunks])[: len(told)].tolist()
    assert told[-1] == len(texts)
