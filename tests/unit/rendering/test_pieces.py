"""Text cut into pieces has the tokens of the whole, under every pattern that is claimed to be known."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from model_foundry.rendering.pieces import MAX_PIECES, PieceEncoder, cut_place, find_cuts, offset_end, offset_start
from tests.conftest import metaspace_tokenizer

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
EXAMPLES = int(os.environ.get("PIECES_EXAMPLES", "150"))
SPECIALS = ["<|end|>", "<|start|>"]
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
FRAGMENTS = [
    " ", "  ", "\n", "\n\n", "\r\n", "\t", " \n ", "a", "The", "fox", "Ünï", "数学", "é", "🎉", "e\u0301", "٣", "½",
    "1", "2024", "3.14", "'", "'s", "'LL", "'re", "’s", ".", "...", "!?", "(x)", "_", "--", "<", "|>", "<|end|>", "ſ",
    "<think>", "\xa0", "\u3000", "\u2028", "\u200b", "\ufeff", "\x0b", "\x0c", "\x1c", "\x85", "\u1680", "\0",
]  # fmt: skip
BORDERS = [" ", "\n", "\r", "\t", "\xa0", "a", "fox", "é", ".", "!?", "'", "s", "1", "24", "\u200b", "\u3000", "_"]
TEXTS = st.one_of(
    st.lists(st.sampled_from(BORDERS), max_size=8).map("".join),
    st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join),
    st.lists(st.sampled_from([f for f in FRAGMENTS if f.isascii() and f >= " "] + ["\n"]), max_size=14).map("".join),
    st.text(max_size=20),
)


@cache
def merging_description() -> str:
    """BPE whose merges go across everything, spaces and newlines too: a cut in the wrong place shows in the ids."""
    tokenizer = Backend(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    chance = random.Random(0)
    corpus = ["".join(chance.choices(BORDERS, k=3)) for _ in range(8000)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=3000, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer.to_str()


def merging_tokenizer() -> Backend:
    tokenizer = Backend.from_str(merging_description())
    tokenizer.pre_tokenizer = BYTES
    return tokenizer


def with_steps(*steps: pre_tokenizers.PreTokenizer) -> Callable[[], Backend]:
    def make() -> Backend:
        backend = merging_tokenizer()
        backend.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
        return backend

    return make


def split(pattern: str) -> Callable[[], Backend]:
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return with_steps(pre_tokenizers.Split(Regex(pattern), "isolated"), plain)


def normalised() -> Backend:
    backend = merging_tokenizer()
    backend.normalizer = normalizers.NFC()
    return backend


KNOWN: dict[str, Callable[[], Backend]] = {
    "gpt2": merging_tokenizer,
    "gpt2-nfc": normalised,
    "gpt2-digit": with_steps(pre_tokenizers.Digits(individual_digits=True), BYTES),
    "gpt2-digits": with_steps(pre_tokenizers.Digits(individual_digits=False), BYTES),
    "llama3": split(LLAMA3),
    "qwen2": split(QWEN2),
}


def encoder_of(backend: Backend) -> PieceEncoder:
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    cuts = find_cuts(backend)
    assert cuts is not None
    added = [token.content for token in backend.get_added_tokens_decoder().values()]

    def encode(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    return PieceEncoder(cuts, atoms=added, encode=encode, model=lambda: backend.model, dtype=np.dtype("<u2"))


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN)
def test_ids_and_spans_are_those_of_the_whole_text(name: str) -> None:
    """A cut that a token reaches across would train on other ids than the model is asked with."""
    backend = KNOWN[name]()
    encoder = encoder_of(backend)

    @given(text=TEXTS, marks=st.lists(st.integers(0, 60), max_size=4))
    @settings(max_examples=EXAMPLES, deadline=None)
    def check(text: str, marks: list[int]) -> None:
        places = sorted(min(mark, len(text)) for mark in marks)
        spans = list(zip(places[::2], places[1::2], strict=False))
        encoding = backend.encode(text, add_special_tokens=False)
        got = encoder.encode_spans(text, spans)
        if got is None:
            assert any(character in "\x0b\x0c\x1c\x1d\x1e\x1f\x85\u1680\u180e" for character in text)
            return
        ids, tokens = got
        assert np.frombuffer(ids, dtype="<u2").tolist() == encoding.ids
        assert encoder.encode(text) == ids
        offsets = encoding.offsets
        for (start, end), (first, last) in zip(spans, tokens, strict=True):
            inside = [offset_end(o) > start and offset_start(o) < end for o in offsets] if start < end else []
            wanted = [index for index, is_in in enumerate(inside) if is_in]
            assert list(range(first, last)) == wanted or start == end

    check()


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN)
def test_a_text_may_be_cut_where_it_is_said(name: str) -> None:
    """Documents longer than memory are encoded in sections; a token lost at a border is lost for good."""
    backend = KNOWN[name]()

    @given(text=TEXTS)
    @settings(max_examples=EXAMPLES, deadline=None)
    def check(text: str) -> None:
        place = cut_place(text)
        parts = [backend.encode(part, add_special_tokens=False).ids for part in (text[:place], text[place:])]
        assert [*parts[0], *parts[1]] == backend.encode(text, add_special_tokens=False).ids

    check()


def test_the_tokens_of_these_tests_go_across_cuts() -> None:
    """Otherwise no cut could be wrong, and the tests above would prove nothing."""
    backend = merging_tokenizer()
    pieces = [backend.decode([token]) for token in backend.get_vocab().values()]
    assert sum(" " in piece.strip(" ") for piece in pieces) > 50
    assert sum("\n" in piece.strip("\n") for piece in pieces) > 50


def test_a_place_to_cut_is_found_between_words_only() -> None:
    assert cut_place("one two three") == 7
    assert cut_place("one two  three") == 3
    assert cut_place("one\n two \x0bthree") == 0
    assert cut_place("word") == cut_place("") == cut_place(" word ") == 0


def test_pieces_are_forgotten_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is remembered must not grow with the corpus."""
    monkeypatch.setattr("model_foundry.rendering.pieces.MAX_PIECES", 10)
    backend = merging_tokenizer()
    encoder = encoder_of(backend)
    text = " ".join(f"word{number * 7919}" for number in range(200))
    for _ in range(2):
        ids = encoder.encode(text)
        assert ids is not None
        assert np.frombuffer(ids, dtype="<u2").tolist() == backend.encode(text, add_special_tokens=False).ids
    assert len(encoder._known) <= 10 < MAX_PIECES


def prefix_space() -> Backend:
    backend = merging_tokenizer()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return backend


def greedy_token(**rules: bool) -> Callable[[], Backend]:
    def make() -> Backend:
        backend = merging_tokenizer()
        backend.add_tokens([AddedToken("greedy", **rules)])
        return backend

    return make


def token_with_a_space() -> Backend:
    backend = merging_tokenizer()
    backend.add_tokens([AddedToken("two words")])
    return backend


UNKNOWN: dict[str, Callable[[], Backend]] = {
    "sentencepiece": metaspace_tokenizer,
    "prefix space": prefix_space,
    "takes spaces on its left": greedy_token(lstrip=True),
    "takes spaces on its right": greedy_token(rstrip=True),
    "single word": greedy_token(single_word=True),
    "token with a space": token_with_a_space,
    "another pattern": split(r"\w+|\W+"),
    "lower case": lambda: with_normalizer(normalizers.Lowercase()),
}


def with_normalizer(normalizer: normalizers.Normalizer) -> Backend:
    backend = merging_tokenizer()
    backend.normalizer = normalizer
    return backend


@pytest.mark.parametrize("name", UNKNOWN)
def test_no_cut_is_claimed_where_none_is_proved(name: str) -> None:
    assert find_cuts(UNKNOWN[name]()) is None
