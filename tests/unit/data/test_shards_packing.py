"""Bins while rows keep coming: none over its room, none lost, and full whatever the windows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_foundry.data.shards.packing import Packed, RowWindow, Segments

DTYPE = np.dtype("<u2")


def segments(lengths: list[int], *, first: int = 0) -> Segments:
    """Segments whose tokens tell where they came from; the middle third of each is trained."""
    tokens = [np.arange(length) + 7 * (first + number) for number, length in enumerate(lengths)]
    spans = [(n, length // 3, 2 * length // 3) for n, length in enumerate(lengths) if length // 3 < 2 * length // 3]
    return Segments(
        np.concatenate([np.zeros(0), *tokens]).astype(DTYPE),
        np.array(lengths, dtype=np.int64),
        np.arange(first, first + len(lengths), dtype=np.uint64),
        np.array(spans, dtype=np.int64).reshape(-1, 3),
    )


def weights_of(each: Segments) -> list[list[int]]:
    bits = np.unpackbits(each.weights(), bitorder="little")[: len(each.tokens)]
    return [part.tolist() for part in np.split(bits, np.cumsum(each.lengths)[:-1])] if len(each.lengths) else []


def rows_by_number(packed: list[Packed]) -> dict[int, tuple[list[int], list[int]]]:
    rows = {}
    for part in packed:
        each = part.segments
        tokens = np.split(each.tokens, np.cumsum(each.lengths)[:-1])
        for row, ids, weights in zip(each.rows.tolist(), tokens, weights_of(each), strict=False):
            assert row not in rows
            rows[row] = (ids.tolist(), weights)
    return rows


def run(lengths: list[int], *, capacity: int, window: int, block: int) -> list[Packed]:
    rows = RowWindow(capacity=capacity, num_tokens=window, waiting=Segments.empty(DTYPE))
    packed = []
    for start in range(0, len(lengths), block):
        rows.add(segments(lengths[start : start + block], first=start))
        if rows.is_full:
            packed.append(rows.close(is_last=False))
            # As after a kill: what waits is read back and a new window begins with it.
            rows = RowWindow(capacity=capacity, num_tokens=window, waiting=rows.waiting)
    return [*packed, rows.close(is_last=True)]


@given(
    lengths=st.lists(st.integers(1, 40), max_size=120),
    capacity=st.integers(40, 90),
    window=st.integers(1, 1500),
    block=st.integers(1, 30),
)
@settings(max_examples=120, deadline=None)
def test_every_row_comes_out_once_and_whole(lengths: list[int], capacity: int, window: int, block: int) -> None:
    """A row lost between two windows, or torn over two bins, would train on something else than was written."""
    packed = run(lengths, capacity=capacity, window=window, block=block)
    expected = segments(lengths)
    rows = rows_by_number(packed)
    assert sorted(rows) == list(range(len(lengths)))
    tokens = np.split(expected.tokens, np.cumsum(expected.lengths)[:-1]) if lengths else []
    for row, (ids, weights) in enumerate(zip(tokens, weights_of(expected), strict=True)):
        assert rows[row] == (ids.tolist(), weights)
    for part in packed:
        ends = [*part.bins[1:].tolist(), len(part.segments.lengths)]
        used = [
            int(part.segments.lengths[first:end].sum()) for first, end in zip(part.bins.tolist(), ends, strict=False)
        ]
        assert all(0 < tokens <= capacity for tokens in used)
        assert sum(used) == len(part.segments.tokens)


@pytest.mark.parametrize("window", [1 << 17, 1 << 19])
@pytest.mark.parametrize("shape", ["log-normal", "uniform"])
def test_bins_are_99_percent_full_however_often_the_window_closes(shape: str, window: int) -> None:
    """Closing every bin of every window would leave gaps once a window: at long bins that is most of them."""
    chance = np.random.default_rng(3)
    drawn = chance.lognormal(5.0, 0.8, 20_000) if shape == "log-normal" else chance.uniform(4, 1024, 8_000)
    lengths = np.clip(drawn.astype(int), 4, 2048).tolist()
    packed = run(lengths, capacity=2048, window=window, block=512)
    assert len(packed) > 3
    num_bins = sum(len(part.bins) for part in packed)
    assert sum(lengths) / (num_bins * 2048) > 0.99


def test_rows_that_do_not_fit_together_do_not_pile_up() -> None:
    """Rows of 60 % of a bin never share one; waiting for better would hold the whole corpus in memory."""
    rows = RowWindow(capacity=100, num_tokens=6_000, waiting=Segments.empty(DTYPE))
    for start in range(0, 1000, 50):
        rows.add(segments([60] * 50, first=start))
        if rows.is_full:
            rows.close(is_last=False)
            assert len(rows.waiting.tokens) <= 3_000


def test_the_first_token_of_a_row_is_never_a_target() -> None:
    """Nothing comes before it, so counting it would promise more training than there is."""
    spans = np.array([[0, 0, 3], [1, 1, 2], [2, 0, 1]])
    each = Segments(np.zeros(9, DTYPE), np.array([4, 2, 3]), np.arange(3, dtype=np.uint64), spans)
    assert each.num_trained == 3
    assert weights_of(each) == [[1, 1, 1, 0], [0, 1], [1, 0, 0]]


def test_segments_that_touch_keep_their_weights_apart() -> None:
    each = Segments(
        np.arange(4).astype(DTYPE), np.array([2, 2]), np.arange(2, dtype=np.uint64), np.array([[0, 0, 2], [1, 0, 2]])
    )
    assert weights_of(each) == [[1, 1], [1, 1]]
    assert weights_of(each.take(np.array([1]))) == [[1, 1]]
