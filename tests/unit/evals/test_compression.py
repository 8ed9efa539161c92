"""Bits per byte against what can be worked out by hand, and against the real tools."""

from __future__ import annotations

import gzip
import lzma
import math

import numpy as np
import pytest

from model_foundry.evals.compression import (
    bits_check,
    bits_per_byte,
    gzip_bits_per_byte,
    unigram_bits_per_byte,
    unigram_check,
    xz_bits_per_byte,
)


def test_a_loss_of_ln_2_a_byte_is_one_bit() -> None:
    assert bits_per_byte(math.log(2), num_tokens=10, num_bytes=10) == pytest.approx(1.0)
    assert bits_per_byte(2 * math.log(2), num_tokens=5, num_bytes=20) == pytest.approx(0.5)


def test_equal_frequencies_cost_the_logarithm_of_their_number() -> None:
    counts = np.full(8, 999, dtype=np.int64)
    assert unigram_bits_per_byte(counts, np.arange(8), num_bytes=8) == pytest.approx(3.0)


def test_a_token_never_seen_has_a_price_and_no_infinity() -> None:
    bits = unigram_bits_per_byte(np.array([9, 0]), np.array([1]), num_bytes=1)
    assert bits == pytest.approx(math.log2(11))


def test_gzip_and_xz_are_the_real_ones() -> None:
    text = b"the quick brown fox " * 50
    assert gzip_bits_per_byte(text) * len(text) / 8 == len(gzip.compress(text, 9))
    assert xz_bits_per_byte(text) * len(text) / 8 == len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))


def test_the_checks_hold_the_bound_and_not_their_own_value() -> None:
    assert bits_check(1.9, bound=2.0).passed
    assert not bits_check(2.1, bound=2.0).passed
    assert unigram_check(1.0, 2.0, bound=0.4).passed
    assert not unigram_check(1.9, 2.0, bound=0.4).passed
    assert not unigram_check(2.5, 2.0, bound=0.0).passed
