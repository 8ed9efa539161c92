"""Duplicates beside the slow truth: all pairs, Python sets, one text after the other."""

from __future__ import annotations

import random

import numpy as np
import pytest

from model_foundry.data.dedup import Overlap, find_duplicates, find_overlaps
from model_foundry.data.near_pairs import CROWD, catch
from model_foundry.data.set_store import SetStore
from model_foundry.errors import DataError

pytestmark = pytest.mark.slow


def shingles(text: str) -> set[tuple[str, ...]]:
    """The texts made here are words between spaces, so tokens are what str.split finds."""
    words = text.split()
    return {tuple(words[start : start + 3]) for start in range(max(1, len(words) - 2))} if words else set()


def jaccard(first: set[tuple[str, ...]], second: set[tuple[str, ...]]) -> float:
    return len(first & second) / len(first | second) if first | second else 0.0


def slow_duplicates(texts: list[str], threshold: float) -> list[int]:
    sets, kept, first = [shingles(text) for text in texts], [], []
    for index, text in enumerate(texts):
        equal = next((earlier for earlier in range(index) if texts[earlier] == text), None)
        if equal is not None:
            first.append(first[equal])
            continue
        catcher = next((earlier for earlier in kept if jaccard(sets[earlier], sets[index]) >= threshold), None)
        first.append(index if catcher is None else catcher)
        if catcher is None:
            kept.append(index)
    return first


def make_texts(
    number: int, *, seed: int, length: tuple[int, int] = (1, 60), share: float = 0.6, shared_words: int = 0,
    vocabulary: int = 300,
) -> list[str]:  # fmt: skip
    """Texts of random words; a `share` of them are earlier ones with some words changed; all may begin alike."""
    chance = random.Random(seed)
    rows: list[list[str]] = []
    for _ in range(number):
        if rows and chance.random() < share:
            rate = chance.choice((0, 0.01, 0.03, 0.06, 0.1, 0.2))
            source = chance.choice(rows)
            rows.append([f"n{chance.randrange(vocabulary)}" if chance.random() < rate else word for word in source])
        else:
            rows.append([f"w{chance.randrange(vocabulary)}" for _ in range(chance.randint(*length))])
    opening = [f"shared{number}" for number in range(shared_words)]
    return [" ".join([*opening, *words]) for words in rows]


CORPORA = {
    "short": {},
    "long": {"length": (20, 150)},
    "a long opening, alike under the threshold": {"shared_words": 100, "length": (30, 60), "share": 0.2},
    "a long opening, alike around the threshold": {"shared_words": 150, "length": (1, 40)},
    "few words": {"vocabulary": 3, "length": (5, 30)},
}


@pytest.mark.parametrize("name", CORPORA)
@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_groups_are_those_of_comparing_all_pairs(name: str, threshold: float) -> None:
    """Crowds of texts that begin alike go other ways than the rest, and must come to the same answer."""
    texts = make_texts(90, seed=7, **CORPORA[name])
    found = find_duplicates(texts, threshold=threshold)
    expected = slow_duplicates(texts, threshold)
    assert np.mean(found.first == expected) >= 0.98
    assert found.kept.tolist() == [index for index, first in enumerate(found.first.tolist()) if index == first]
    for index in np.flatnonzero((found.similarity > 0) & ~found.exact):
        truth = jaccard(shingles(texts[index]), shingles(texts[found.first[index]]))
        assert found.similarity[index] == pytest.approx(truth, abs=1e-6)
        assert truth >= threshold


@pytest.mark.parametrize(
    "text, other",
    [
        ("One two  three", "one TWO\tthree\n"),
        ("Straße", "STRASSE"),
        ("cafe\u0301", "CAFÉ"),
        ("", " \n"),
        ("😀 a", "😀  A"),
    ],
)
def test_equal_after_normalisation_is_exact(text: str, other: str) -> None:
    found = find_duplicates([text, "something else", other])
    assert found.first.tolist() == [0, 1, 0]
    assert found.exact.tolist() == [False, False, True]
    assert found.similarity.tolist() == [0, 0, 1]
    assert (found.num_exact, found.num_near, found.share) == (1, 0, pytest.approx(1 / 3))


@pytest.mark.parametrize("text, other", [("a b c d", "a b d c"), ("ab", "a b"), ("x < y", "x > y"), ("", "a")])
def test_other_words_are_other_texts(text: str, other: str) -> None:
    assert len(find_duplicates([text, other]).kept) == 2


def test_a_copy_of_a_near_duplicate_goes_to_the_text_that_stays() -> None:
    first = " ".join(f"w{number}" for number in range(60))
    near = first + " more"
    found = find_duplicates([first, near, near.upper()])
    assert found.first.tolist() == [0, 0, 0]
    assert found.exact.tolist() == [False, False, True]
    assert (found.num_exact, found.num_near) == (1, 1)


def test_a_chain_of_small_steps_loses_nothing_that_is_unlike_what_stays() -> None:
    """Joining neighbours into one group would drop the end of the chain, which is unlike its beginning."""
    words = [f"w{number}" for number in range(60)]
    chain = [
        " ".join(f"n{place}" if place < 2 * step else word for place, word in enumerate(words)) for step in range(12)
    ]
    found = find_duplicates(chain)
    assert len(found.kept) > 2
    for index in range(len(chain)):
        assert found.first[index] == index or found.similarity[index] >= 0.8


def test_nothing_depends_on_how_texts_arrive_or_on_the_seed() -> None:
    texts = make_texts(400, seed=1)
    found = find_duplicates(texts, seed=5)
    assert find_duplicates(iter(texts), seed=5).first.tolist() == found.first.tolist()
    assert find_duplicates(texts, seed=6).first.tolist() == found.first.tolist()
    # A text so long that it is a chunk of its own cuts the others into two chunks.
    padded = find_duplicates([*texts[:200], "z " * 200_000, *texts[200:]], seed=5).first
    moved = np.array([first + (first >= 200) for first in found.first.tolist()])
    assert np.delete(padded, 200).tolist() == moved.tolist()


@pytest.mark.parametrize(
    "texts, kept",
    [([], []), (["alone"], [0]), (["same here"] * 3000, [0]), ([""] * 3000, [0]), (["a"] * 9 + ["b"] * 9, [0, 9])],
)
def test_degenerate_sets(texts: list[str], kept: list[int]) -> None:
    found = find_duplicates(texts)
    assert found.kept.tolist() == kept
    assert found.num_exact == len(texts) - len(kept)


def test_a_word_repeated_any_number_of_times_is_one_shingle() -> None:
    found = find_duplicates(["spam " * times for times in range(3, 400)])
    assert (found.num_near, found.kept.tolist()) == (396, [0])


@pytest.mark.parametrize("threshold", [0.0, 0.05, 1.01, -1.0, float("nan")])
def test_a_threshold_that_means_nothing_is_refused(threshold: float) -> None:
    with pytest.raises(DataError, match=r"0\.1"):
        find_duplicates(["a"], threshold=threshold)


def test_threshold_one_takes_only_the_same_set_of_shingles() -> None:
    texts = ["a b a b a", "b a b a b", "a b a b", "a b a c"]
    assert find_duplicates(texts, threshold=1.0).first.tolist() == [0, 0, 0, 3]


class CountingStore(SetStore):
    """Counts the pairs that are compared exactly."""

    num_compared = 0

    def jaccard(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        self.num_compared += len(first)
        return super().jaccard(first, second)


@pytest.mark.parametrize("own, is_near", [(3, True), (60, False), (200, False)])
def test_a_crowd_is_not_compared_pair_by_pair(own: int, is_near: bool) -> None:
    """Rows under one long opening agree in every band: 1,500 of them have a million pairs."""
    number, common = 1500, np.arange(300, dtype=np.uint32) * 13_000_000
    generator = np.random.default_rng(0)
    sets = [np.unique(np.append(common, generator.integers(0, 1 << 32, own, dtype=np.uint32))) for _ in range(number)]
    store = CountingStore()
    store.append(np.concatenate(sets), np.array([len(members) for members in sets]))
    store.close_writing()
    one_bucket = np.zeros((4, number), np.uint64)
    caught = catch(store, one_bucket, threshold=0.8)
    assert (caught.by >= 0).sum() == (number - 1 if is_near else 0)
    assert store.num_compared <= 3 * number
    reference = catch(store, one_bucket, threshold=0.8, num_base=CROWD)
    assert (reference.by[CROWD:] >= 0).all() == is_near


def test_sets_beyond_the_memory_limit_are_compared_from_the_disk() -> None:
    generator = np.random.default_rng(0)
    parts = [np.unique(generator.integers(0, 400, 50).astype(np.uint32)) for _ in range(40)]
    held, spilled = SetStore(), SetStore(memory_bytes=500)
    for store in (held, spilled):
        for part in parts:
            store.append(part, np.array([len(part)]))
        store.close_writing()
    first, second = np.divmod(np.arange(1600), 40)
    similarity = held.jaccard(first, second)
    assert similarity.tolist() == spilled.jaccard(first, second).tolist()
    pairs = [(parts[one], parts[other]) for one, other in zip(first, second, strict=True)]
    truth = [len(np.intersect1d(one, other)) / len(np.union1d(one, other)) for one, other in pairs]
    assert similarity == pytest.approx(truth)
    unlike = np.bitwise_count(spilled.parities(first) ^ spilled.parities(second)).sum(axis=1)
    assert (unlike <= [len(np.setxor1d(one, other)) for one, other in pairs]).all()


@pytest.mark.parametrize("name", CORPORA)
def test_overlaps_are_those_of_comparing_all_pairs(name: str) -> None:
    texts = make_texts(110, seed=3, **CORPORA[name])
    reference, texts = texts[:40], texts[40:]
    expected: list[tuple[int, int, bool]] = []
    for index, text in enumerate(texts):
        alike = [other for other, held in enumerate(reference) if jaccard(shingles(text), shingles(held)) >= 0.8]
        if text in reference:
            expected.append((index, reference.index(text), True))
        elif alike:
            expected.append((index, alike[0], False))
    found = [(overlap.index, overlap.other, overlap.exact) for overlap in find_overlaps(texts, reference)]
    assert found == expected


def test_an_overlap_says_which_text_and_how_alike() -> None:
    question = "When was the bell called Old Winifred cast , and who paid for the metal ?"
    texts = ["", "nothing of the kind", question.upper(), question + " Say"]
    found = find_overlaps(texts, ["", "another one", question])
    assert [(overlap.index, overlap.other, overlap.exact) for overlap in found] == [(2, 2, True), (3, 2, False)]
    assert found[0] == Overlap(2, 2, 1.0, True)
    assert found[1].similarity == pytest.approx(14 / 15)
    assert find_overlaps([], [question]) == find_overlaps(texts, []) == []
