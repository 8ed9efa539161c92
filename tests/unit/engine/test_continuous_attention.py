"""Attention over segments is attention over their keys in a row, whoever else is computed in the same call."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model_foundry.engine.continuous_attention import (
    MOST_TOGETHER,
    Span,
    attend_answers,
    is_alike_together,
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


@pytest.mark.parametrize("window", [None, 100, 300])
def test_answers_are_those_of_the_definition(window: int | None) -> None:
    q, cache, spans = crowd()
    found = attend_answers(q, cache, plan_answers(spans, window, like=q, together=MOST_TOGETHER), WIDTH**-0.5)
    for span in spans:
        torch.testing.assert_close(found[span.first_row], expected(q, cache, span, window), atol=2e-6, rtol=1e-5)
    assert not found[len(spans) :].any()
    alone = attend_answers(q, cache, plan_answers(spans, window, like=q, together=1), WIDTH**-0.5)
    torch.testing.assert_close(found, alone, atol=2e-6, rtol=1e-5)


def test_answers_of_one_length_are_one_call_whatever_segments_they_have() -> None:
    q, _, spans = crowd()
    levels = plan_answers(spans, None, like=q, together=MOST_TOGETHER)
    # Up to 64, 128 or 256 keys of a first segment, all of it by the long ones; then 64 by one and 256 by another; 128.
    assert [sorted(call.num_keys for call in calls) for calls in levels] == [[64, 128, 256], [64, 256], [128]]
    assert len([call for calls in plan_answers(spans, None, like=q, together=1) for call in calls]) == 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_company_of_a_row_is_tried(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    import model_foundry.engine.continuous_attention as room

    like, real = torch.empty(0, dtype=dtype), room.attend
    assert is_alike_together(NUM_KV, GROUP, WIDTH, like=like)

    def depends(q: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, sums = real(q, *rest)
        return out + 1e-2 * len(q), sums

    monkeypatch.setattr(room, "attend", depends)
    assert not is_alike_together(NUM_KV, GROUP, WIDTH, like=like)
