"""Exact and near duplicates among texts, and texts that stand in another set.

Exact: equal after normalisation (Unicode NFC, case folded, white space collapsed), told by 128 bits of SHA-256.
Near: a Jaccard similarity of the sets of word triples (`shingles`) of at least the threshold. Candidates come from
MinHash bands (`minhash`: 0.998 of the pairs just at the threshold are found, more above it) and every one of them is
compared exactly (`near_pairs`), so what is called a duplicate is one, and the answer depends on the texts, the
threshold and the seed alone: not on chunks, machines or memory. (Shingles are 32-bit hashes: of two texts of 1,000
shingles one pair in 4,000 has a collision, which moves its similarity by 0.001.)

Memory: about 400 bytes a text, and 4 bytes for each of its distinct shingles, which go to a temporary file when they
are more than 256 MB; while it is read, a single long text takes ten times its size. Texts are read once, in order, and
not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from model_foundry.data.minhash import band_keys, choose_bands, signatures
from model_foundry.data.near_pairs import Caught, catch
from model_foundry.data.set_store import SetStore
from model_foundry.data.shingles import hash_tokens, shingle_sets, text_chunks
from model_foundry.errors import DataError

MIN_THRESHOLD = 0.1
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True, eq=False)
class Duplicates:
    """Which of some texts repeat an earlier one.

    Attributes:
        num_texts: how many texts there were.
        first: int64 [num_texts], the first text of each one's group; itself where it is the first, and so is kept.
        exact: bool [num_texts], equal to an earlier text after normalisation.
        similarity: float32 [num_texts], 1 where exact, else the Jaccard similarity to `first`, 0 for a text that is
            kept.
    """

    num_texts: int
    first: np.ndarray
    exact: np.ndarray
    similarity: np.ndarray

    @property
    def kept(self) -> np.ndarray:
        """int64: the indices of the texts that are the first of their group."""
        return np.flatnonzero(self.first == np.arange(self.num_texts))

    @property
    def num_exact(self) -> int:
        return int(self.exact.sum())

    @property
    def num_near(self) -> int:
        return self.num_texts - len(self.kept) - self.num_exact

    @property
    def share(self) -> float:
        """The share of texts that are duplicates of either kind."""
        return 1.0 - len(self.kept) / self.num_texts if self.num_texts else 0.0


@dataclass(frozen=True, slots=True)
class Overlap:
    """Text `index` of one set is like text `other` of another one."""

    index: int
    other: int
    similarity: float
    exact: bool


def find_duplicates(
    texts: Iterable[str], *, threshold: float = 0.8, seed: int = 0, on_progress: Progress | None = None
) -> Duplicates:
    """Group texts with those they repeat: each with the first kept text that is equal, or similar enough.

    No two kept texts are duplicates of each other (but for the pairs that MinHash misses), and every other text is a
    duplicate of a kept one. Empty texts are equal to each other and to nothing else.

    Args:
        texts: read once.
        threshold: the Jaccard similarity from which texts are near duplicates, 0.1 to 1.
        on_progress: called now and then with how many texts have been read.

    Raises:
        DataError: the threshold is out of range.
    """
    sketches = _Sketches(threshold, seed)
    sketches.read(texts, on_progress)
    caught = sketches.compare()
    original, equal_to = np.array(sketches.originals, np.int64), np.array(sketches.numbers, np.int64)
    catcher = np.where(caught.by < 0, np.arange(len(original)), caught.by)
    first = original[catcher][equal_to]
    exact = np.ones(len(equal_to), bool)
    exact[original] = False
    similarity = caught.similarity[equal_to]
    similarity[exact] = 1.0
    return Duplicates(len(equal_to), first, exact, similarity)


def find_overlaps(
    texts: Iterable[str],
    reference: Iterable[str],
    *,
    threshold: float = 0.8,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> list[Overlap]:
    """The texts that stand in `reference`, exactly or nearly: rows for training that are in the evaluation set.

    Each is named once, with the text of `reference` that it equals, else with the first one that is similar enough.
    Empty texts are passed over. For a question inside a longer row see `contained.find_contained`.

    Raises:
        DataError: the threshold is out of range.
    """
    sketches = _Sketches(threshold, seed)
    sketches.read(reference, None)
    num_reference, num_base = len(sketches.numbers), len(sketches.originals)
    sketches.read(texts, on_progress)
    caught = sketches.compare(num_base)
    overlaps = []
    for index, number in enumerate(sketches.numbers[num_reference:]):
        if number < num_base:
            if not sketches.is_empty(number):
                overlaps.append(Overlap(index, sketches.originals[number], 1.0, True))
        elif caught.by[number] >= 0:
            other = sketches.originals[caught.by[number]]
            overlaps.append(Overlap(index, other, float(caught.similarity[number]), False))
    return overlaps


class _Sketches:
    """What is kept of the texts read so far. A text equal to an earlier one gets its number and nothing else."""

    def __init__(self, threshold: float, seed: int) -> None:
        if not MIN_THRESHOLD <= threshold <= 1.0:
            raise DataError(
                f"the threshold {threshold} is not a similarity that can be searched for",
                hint=f"Give one from {MIN_THRESHOLD} (hardly alike) to 1 (the same words); 0.8 is usual",
            )
        self._threshold, self._seed = threshold, seed
        self._bands = choose_bands(threshold)
        self._known: dict[bytes, int] = {}
        self._store = SetStore()
        self._band_keys = [np.empty((self._bands.num_bands, 0), np.uint64)]
        self.numbers: list[int] = []
        """For each text, the number of its content."""
        self.originals: list[int] = []
        """For each content, the index of the first text that has it."""

    def read(self, texts: Iterable[str], on_progress: Progress | None) -> None:
        for chunk in text_chunks(texts, on_progress=on_progress):
            tokens = hash_tokens(chunk)
            is_new = []
            for digest in tokens.digests:
                number = self._known.setdefault(digest, len(self.originals))
                is_new.append(number == len(self.originals))
                if is_new[-1]:
                    self.originals.append(len(self.numbers))
                self.numbers.append(number)
            sets = shingle_sets(tokens, seed=self._seed, wanted=np.array(is_new))
            signature = signatures(sets.keys, len(sets.sizes), seed=self._seed)
            self._band_keys.append(band_keys(signature, self._bands, seed=self._seed))
            self._store.append(sets.values, sets.sizes)

    def is_empty(self, number: int) -> bool:
        return self._store.sizes[number] == 0

    def compare(self, num_base: int | None = None) -> Caught:
        """Ends the reading."""
        self._store.close_writing()
        self._known = {}
        # One band at a time: a copy of all of them would be half of the memory.
        keys = (np.concatenate([part[band] for part in self._band_keys]) for band in range(self._bands.num_bands))
        return catch(self._store, keys, threshold=self._threshold, num_base=num_base)
