"""Attention over segments is attention over their keys in a row, whoever else is computed in the same call."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model_foundry.engine.continuous_attention import (
    MOST_TOGETHER,
    Span,
    Together,
    attend_answers,
    find_together,
    plan_answers,
)
from model_foundry.engine.continuous_cache import SEGMENT_TOKENS, segments_for

NUM_KV, GROUP, WIDTH = 2, 3, 16
LENGTHS = (1, 40, 64, 65, 200, 256, 257, 600, 41)


def crowd() -> tuple[torch.Tensor, torch.Tensor, list[Span]]:
    """Queries, a cache whose segments nobody has in order, and answers of all lengths."""
    drawn = torch.Generator().manual_seed(0)
    counts = [segments_for(length) for length in LENGTHS]
    free = torch.randperm(sum(counts), generator=drawn).tolist()
    cache = torch.randn(len(free), 2 * NUM_KV, SEGMENT_TOKENS, WIDTH, generator=drawn)
    q = torch.randn(16, NUM_KV, GROUP, WIDTH, generator=drawn)
    spans = [
        Span(row, 1, length - 1, [free.pop() for _ in range(count)])
        for row, (length, count) in enumerate(zip(LENGTHS, counts, strict=True))
    ]
    return q, cache, spans


def expected(q: torch.Tensor, cache: torch.Tensor, span: Span, window: int | None) -> torch.Tensor:
    """[K, G, W] by the definition."""
    end = span.position + 1
    kept = torch.cat([cache[segment] for segment in span.segments], dim=1)[:, max(0, end - (window or end)) : end]
    scores = q[span.first_row] @ kept[:NUM_KV].transpose(1, 2) / WIDTH**0.5
    return scores.softmax(-1) @ kept[NUM_KV:]


ALONE, TOGETHER = Together(1, 1), Together(MOST_TOGETHER, 10)


def attended(q: torch.Tensor, cache: torch.Tensor, spans: list[Span], window: int | None, most: Together) -> Any:
    shape = (q.shape[0], NUM_KV, GROUP, WIDTH)
    return attend_answers(q, cache, plan_answers(spans, window, shape=shape, like=q, most=most), WIDTH**-0.5)


@pytest.mark.parametrize("window", [None, 100, 300])
def test_answers_are_those_of_the_definition(window: int | None) -> None:
    q, cache, spans = crowd()
    found = attended(q, cache, spans, window, TOGETHER)
    for span in spans:
        torch.testing.assert_close(found[span.first_row], expected(q, cache, span, window), atol=2e-6, rtol=1e-5)
    assert not found[len(spans) :].any()
    torch.testing.assert_close(found, attended(q, cache, spans, window, ALONE), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("window", "num_shared"), [(None, 2), (400, 1), (200, 0)])
def test_answers_that_share_whole_segments_are_those_of_the_definition(window: int | None, num_shared: int) -> None:
    """Twelve samples of one prompt, which two calls of each segment take, and a stranger among them."""
    drawn = torch.Generator().manual_seed(0)
    cache = torch.randn(17, 2 * NUM_KV, SEGMENT_TOKENS, WIDTH, generator=drawn)
    q = torch.randn(16, NUM_KV, GROUP, WIDTH, generator=drawn)
    spans = [Span(row, 1, 512 + row, [0, 1, 2 + row]) for row in range(13)]
    spans[5] = Span(5, 1, 300, [15, 16])
    found = attended(q, cache, spans, window, TOGETHER)
    for span in spans:
        torch.testing.assert_close(found[span.first_row], expected(q, cache, span, window), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(found, attended(q, cache, spans, window, ALONE), atol=2e-6, rtol=1e-5)
    plan = plan_answers(spans, window, shape=(16, NUM_KV, GROUP, WIDTH), like=q, most=TOGETHER)
    shared = [call.segments for calls in plan.levels for call in calls if call.mask is None]
    assert shared == [0, 0, 1, 1][4 - 2 * num_shared :]


def test_answers_of_one_length_are_one_call_whatever_segments_they_have() -> None:
    q, _, spans = crowd()
    shape = (q.shape[0], NUM_KV, GROUP, WIDTH)
    levels = plan_answers(spans, None, shape=shape, like=q, most=TOGETHER).levels
    # Up to 64, 128 or 256 keys of a first segment, all of it by the long ones; then 64 by one and 256 by another; 128.
    assert [sorted(call.num_keys for call in calls) for calls in levels] == [[64, 128, 256], [64, 256], [128]]
    assert sum(len(calls) for calls in plan_answers(spans, None, shape=shape, like=q, most=ALONE).levels) == 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_company_of_a_row_is_tried(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    import model_foundry.engine.continuous_attention as room

    like, real = torch.empty(0, dtype=dtype), room.attend
    assert find_together(NUM_KV, GROUP, WIDTH, like=like).rows == MOST_TOGETHER

    def depends(q: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, sums = real(q, *rest)
        return out + 1e-2 * len(q), sums

    monkeypatch.setattr(room, "attend", depends)
    assert find_together(NUM_KV, GROUP, WIDTH, like=like) == ALONE

    def depends_on_queries(q: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, sums = real(q, *rest)
        return out + 1e-2 * (q.shape[2] == 9 * GROUP), sums

    monkeypatch.setattr(room, "attend", depends_on_queries)
    assert find_together(NUM_KV, GROUP, WIDTH, like=like) == Together(MOST_TOGETHER, 1)
