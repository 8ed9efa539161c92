"""The books of the shared cache: what is found again, shared, forgotten first, and that nothing leaks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_foundry.engine.continuous_cache import (
    BLOCK_TOKENS,
    SEGMENT_TOKENS,
    Found,
    PromptHashes,
    SegmentStore,
    segments_for,
)


def prompt(num_tokens: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1000, size=num_tokens).astype(np.int32)


def remember(store: SegmentStore, tokens: np.ndarray, *, adapter: int = 0) -> list[int]:
    """As a sequence does that reads its prompt and finds nothing; it still holds its segments."""
    hashes = PromptHashes.of(tokens, adapter)
    segments = store.take(Found(), segments_for(len(tokens)))
    assert segments is not None
    for number, digest in enumerate(hashes.blocks):
        store.remember_block(digest, segments[number * BLOCK_TOKENS // SEGMENT_TOKENS])
    store.remember_whole(hashes.whole, segments[(len(tokens) - 1) // SEGMENT_TOKENS], torch.tensor([len(tokens)]))
    return segments


@pytest.mark.parametrize("length", [1, 63, 64, 65, 256, 300, 512, 700])
def test_a_whole_prompt_is_found_with_its_end(length: int) -> None:
    store = SegmentStore(8)
    segments = remember(store, prompt(length))
    found = store.find(PromptHashes.of(prompt(length), 0), length)
    assert (found.num_tokens, found.end is not None) == (length, True)
    assert found.shared == tuple(segments[: length // SEGMENT_TOKENS])
    assert found.num_copied == length % SEGMENT_TOKENS
    if found.num_copied:
        assert found.copied_from == segments[-1]


@pytest.mark.parametrize("common, found", [(0, 0), (63, 0), (64, 64), (200, 192), (256, 256), (400, 384), (600, 576)])
def test_a_prompt_that_begins_alike_finds_whole_blocks(common: int, found: int) -> None:
    store = SegmentStore(8)
    segments = remember(store, prompt(600))
    other = np.concatenate([prompt(600)[:common], prompt(100, seed=1)])
    got = store.find(PromptHashes.of(other, 0), len(other))
    assert (got.num_tokens, got.end) == (found, None)
    assert got.shared == tuple(segments[: found // SEGMENT_TOKENS])


def test_the_last_token_of_a_prompt_is_computed_where_its_end_is_not_known() -> None:
    """A beginning of a longer prompt is all in the cache, and still needs a hidden state to go on from."""
    store = SegmentStore(8)
    remember(store, prompt(600))
    assert store.find(PromptHashes.of(prompt(600)[:128], 0), 128).num_tokens == 64


def test_another_adapter_finds_nothing() -> None:
    """Keys depend on the weights: an adapter that found the base's would answer as a mixture of both."""
    store = SegmentStore(8)
    remember(store, prompt(600), adapter=1)
    for adapter in (0, 2):
        assert store.find(PromptHashes.of(prompt(600), adapter), 600) == Found()


def test_same_block_behind_another_beginning_is_another_block() -> None:
    store = SegmentStore(8)
    remember(store, prompt(128))
    swapped = np.concatenate([prompt(128)[64:], prompt(128)[:64]])
    assert store.find(PromptHashes.of(swapped, 0), 128) == Found()


def test_what_is_found_is_not_given_away_for_room() -> None:
    """The segment to copy from was the only one left, and was handed out as the fresh one."""
    store = SegmentStore(2)
    store.release(remember(store, prompt(100)))
    other = np.concatenate([prompt(100)[:64], prompt(300, seed=1)])
    found = store.find(PromptHashes.of(other, 0), len(other))
    assert found.num_copied == 64
    assert store.take(found, 2) is None
    segments = store.take(found, 1)
    assert segments is not None
    assert found.copied_from not in segments


def test_the_longest_unused_is_forgotten_first_and_a_prompt_from_its_end() -> None:
    store = SegmentStore(4)
    old, new = remember(store, prompt(512)), remember(store, prompt(500, seed=1))
    store.release(old)
    store.release(new)
    assert store.take(Found(), 1) == [old[1]]
    assert store.find(PromptHashes.of(prompt(512), 0), 512).num_tokens == 256
    assert store.find(PromptHashes.of(prompt(500, seed=1), 0), 500).num_tokens == 500


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_nothing_leaks_and_nothing_is_held_twice(data: st.DataObject) -> None:
    """Segments lost at each cancelled request fill the cache within a day; one given away while held mixes answers."""
    store = SegmentStore(data.draw(st.integers(2, 6)))
    held: list[list[int]] = []
    for _ in range(data.draw(st.integers(1, 25))):
        if held and data.draw(st.booleans()):
            store.release(held.pop(data.draw(st.integers(0, len(held) - 1))))
        else:
            length = data.draw(st.integers(1, 500))
            tokens = np.concatenate([prompt(min(length, 320)), prompt(200, seed=data.draw(st.integers(0, 2)))])[:length]
            hashes = PromptHashes.of(tokens, 0)
            found = store.find(hashes, length)
            segments = store.take(found, segments_for(length) - len(found.shared))
            if segments is not None:
                held.append(segments)
                for number, digest in enumerate(hashes.blocks):
                    store.remember_block(digest, segments[number * BLOCK_TOKENS // SEGMENT_TOKENS])
                store.remember_whole(hashes.whole, segments[(length - 1) // SEGMENT_TOKENS], torch.zeros(1))
        store.check(iter(held))
        fresh = [segment for segments in held for segment in segments]
        assert store.num_held == len(set(fresh))
    for segments in held:
        store.release(segments)
    assert store.num_held == 0
