"""MinHash: signatures that agree as often as sets overlap, and bands that find what the S-curve says."""

from __future__ import annotations

import numpy as np
import pytest

from model_foundry.data.minhash import MIN_RECALL, NUM_SLOTS, Bands, band_keys, choose_bands, signatures

NUM_PAIRS = 400


def paired_sets(size: int, shared: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Keys of NUM_PAIRS sets of `size` members, and of as many that have `shared` of these in common."""
    generator = np.random.default_rng(seed)
    members = generator.integers(0, 1 << 32, (NUM_PAIRS, 2 * size - shared), dtype=np.uint64)
    numbers = np.arange(NUM_PAIRS, dtype=np.uint64)[:, None] << np.uint64(32)
    first, second = members[:, :size] | numbers, members[:, size - shared :] | numbers
    return np.unique(first), np.unique(second)


@pytest.mark.parametrize("size, shared", [(4, 3), (10, 9), (40, 30), (300, 240)])
def test_signatures_agree_as_often_as_the_sets_overlap_whatever_their_size(size: int, shared: int) -> None:
    """Slots that stay empty in a small set must borrow without a bias."""
    first, second = (signatures(keys, NUM_PAIRS, seed=1) for keys in paired_sets(size, shared))
    similarity = shared / (2 * size - shared)
    # Slots of one pair depend on each other, pairs do not: the spread of the mean is at most sqrt(s(1-s)/pairs).
    assert abs(float((first == second).mean()) - similarity) < 4 * np.sqrt(similarity * (1 - similarity) / NUM_PAIRS)


@pytest.mark.parametrize("size", [9, 45, 450])
def test_bands_find_what_the_s_curve_promises(size: int) -> None:
    bands = choose_bands(0.8)
    first, second = (signatures(keys, NUM_PAIRS, seed=2) for keys in paired_sets(size, size * 8 // 9))
    found = (band_keys(first, bands, seed=2) == band_keys(second, bands, seed=2)).any(axis=0)
    assert bands.recall(0.8) > 0.9997
    assert found.mean() >= 0.995
    unlike = (band_keys(first, bands, seed=2) == np.roll(band_keys(second, bands, seed=2), 1, axis=1)).any()
    assert not unlike


def test_recall_at_the_threshold_is_as_stated_and_bands_fit_the_signature() -> None:
    for threshold in np.arange(0.15, 1.001, 0.05):
        bands = choose_bands(float(threshold))
        assert bands.num_bands * bands.num_rows <= NUM_SLOTS
        assert bands.recall(float(threshold)) >= MIN_RECALL
    assert choose_bands(1.0) == Bands(1, NUM_SLOTS)
    assert choose_bands(0.1) == Bands(NUM_SLOTS, 1)


def test_empty_sets_have_a_row_and_borrow_from_nobody() -> None:
    keys = np.array([(1 << 32) | 7, (1 << 32) | 0xF0000000], np.uint64)
    signature = signatures(keys, 3, seed=0)
    assert signature.shape == (3, NUM_SLOTS)
    assert not signature[[0, 2]].any()
    assert set(signature[1].tolist()) == {7, 0xF0000000}
