"""Texts that hold a piece of another set: an evaluation question quoted inside a longer row for training.

The field's method is the overlap of word n-grams (Brown et al. 2020, appendix C, with n = 13): a text that has 13 words
in a row in common with a text to be asked later is contaminated. Exact up to collisions of 64-bit hashes; the texts
are streamed, only the reference is held (8 bytes a token). Tokens are those of `shingles`, so case and white space do
not count and punctuation does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from model_foundry.data.dedup import Overlap, Progress
from model_foundry.data.set_store import run_starts
from model_foundry.data.shingles import hash_tokens, text_chunks
from model_foundry.errors import DataError

MIN_TOKENS = 8
MAX_REFERENCES = 10
_BASE = np.uint64(0xD6E8FEB86659FD93)
_FILTER_BITS = 22
_FILTER_SHIFT = np.uint64(64 - _FILTER_BITS)


@dataclass(frozen=True, slots=True)
class _Index:
    """The n-grams of one length in the reference.

    Attributes:
        hashes: uint64, ascending and distinct.
        starts: int64, for each hash and one more, where its references begin in `references`.
        references: int64, the texts that hold each hash.
        may_hold: bool [2^22], by the upper bits of a hash, whether to look it up at all.
    """

    hashes: np.ndarray
    starts: np.ndarray
    references: np.ndarray
    may_hold: np.ndarray


def find_contained(
    texts: Iterable[str], reference: Iterable[str], *, ngram: int = 13, on_progress: Progress | None = None
) -> list[Overlap]:
    """The texts that have `ngram` tokens in a row in common with a text of `reference`.

    A reference of fewer tokens must stand there whole; one of fewer than 8 is passed over, because it says too little
    to be told from chance. N-grams that more than 10 references share are passed over too: a prompt that all
    questions begin with is not a leak.

    Returns:
        One Overlap for each pair, by index and then by `other`: `similarity` is the share of the reference's n-grams
        that stand in the text, `exact` when all do.

    Raises:
        DataError: `ngram` is smaller than 8.
    """
    if ngram < MIN_TOKENS:
        raise DataError(f"{ngram} tokens in a row are met by chance", hint=f"Give ngram={MIN_TOKENS} or more")
    indices, num_ngrams = _index(reference, ngram)
    if not indices:
        return []
    overlaps: list[Overlap] = []
    num_before = 0
    for chunk in text_chunks(texts, on_progress=on_progress):
        tokens = hash_tokens(chunk)
        grams = _ngrams(tokens.hashes, tokens.counts, list(indices))
        pairs = [_hits(indices[length], hashes, text) for length, hashes, text in grams]
        overlaps += _as_overlaps(np.concatenate([np.empty((2, 0), np.int64), *pairs], axis=1), num_ngrams, num_before)
        num_before += len(chunk)
    return overlaps


def _as_overlaps(pairs: np.ndarray, num_ngrams: np.ndarray, num_before: int) -> list[Overlap]:
    """From a column (text, reference) for each n-gram in common to an overlap for each pair."""
    codes, num_shared = np.unique(pairs[0] * (len(num_ngrams) + 1) + pairs[1], return_counts=True)
    overlaps = []
    for code, shared in zip(codes.tolist(), num_shared.tolist(), strict=True):
        text, other = divmod(code, len(num_ngrams) + 1)
        total = int(num_ngrams[other])
        overlaps.append(Overlap(num_before + text, other, shared / total, shared == total))
    return overlaps


def _index(reference: Iterable[str], ngram: int) -> tuple[dict[int, _Index], np.ndarray]:
    """An index for each length of n-gram, ascending, and how many distinct n-grams of each reference are looked for."""
    found: dict[int, list[np.ndarray]] = {}
    num_references = 0
    for chunk in text_chunks(reference):
        tokens = hash_tokens(chunk)
        for length in range(MIN_TOKENS, ngram + 1):
            wanted = tokens.counts == length if length < ngram else tokens.counts >= ngram
            if wanted.any():
                hashes = tokens.hashes[np.repeat(wanted, tokens.counts)]
                ((_, grams, text),) = _ngrams(hashes, tokens.counts[wanted], [length])
                numbers = num_references + np.flatnonzero(wanted)[text]
                found.setdefault(length, []).append(np.stack([grams, numbers.astype(np.uint64)]))
        num_references += len(chunk)
    indices = {length: _build(np.concatenate(found[length], axis=1)) for length in sorted(found)}
    everyone = np.concatenate([np.empty(0, np.int64), *(index.references for index in indices.values())])
    return indices, np.bincount(everyone, minlength=num_references)


def _build(entries: np.ndarray) -> _Index:
    order = np.lexsort((entries[1], entries[0]))
    grams, numbers = entries[0][order], entries[1][order].astype(np.int64)
    distinct = run_starts(grams) | run_starts(numbers)
    grams, numbers = grams[distinct], numbers[distinct]
    starts = np.flatnonzero(run_starts(grams))
    counts = np.diff(starts, append=len(grams))
    rare = np.repeat(counts <= MAX_REFERENCES, counts)
    grams, numbers = grams[rare], numbers[rare]
    starts = np.flatnonzero(run_starts(grams))
    may_hold = np.zeros(1 << _FILTER_BITS, bool)
    may_hold[grams >> _FILTER_SHIFT] = True
    return _Index(grams[starts], np.append(starts, len(grams)), numbers, may_hold)


def _hits(index: _Index, grams: np.ndarray, text: np.ndarray) -> np.ndarray:
    """int64 [2, hits]: text and reference, once for each distinct n-gram that they share."""
    likely = np.flatnonzero(index.may_hold[grams >> _FILTER_SHIFT])
    grams, text = grams[likely], text[likely]
    places = np.searchsorted(index.hashes, grams)
    known = places < len(index.hashes)
    known[known] = index.hashes[places[known]] == grams[known]
    codes = text[known] * len(index.hashes) + places[known]
    codes.sort()
    codes = codes[run_starts(codes)]
    text, places = np.divmod(codes, max(1, len(index.hashes)))
    counts = index.starts[places + 1] - index.starts[places]
    within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.stack([np.repeat(text, counts), index.references[np.repeat(index.starts[places], counts) + within]])


def _ngrams(
    hashes: np.ndarray, counts: np.ndarray, lengths: Sequence[int]
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """For each length, ascending: a hash for each run of so many tokens within a text, and the number of its text."""
    text = np.repeat(np.arange(len(counts)), counts)
    mixed = np.zeros(len(hashes), np.uint64)
    done = 0
    for length in lengths:
        for offset in range(done, length):
            mixed = mixed[: max(0, len(hashes) - offset)]
            mixed *= _BASE
            mixed += hashes[offset:]
        done = length
        inside = text[: len(mixed)] == text[length - 1 :]
        grams = mixed[inside]
        grams ^= grams >> np.uint64(31)
        grams *= _BASE
        yield length, grams, text[: len(mixed)][inside]
