"""Attention of a running batch over its cache: keys and values in segments that sequences share.

A block of a prompt is attended to by itself. Answers have one query each, and those that look at as many keys of a
segment are computed in one call: a call of its own for each was half of a step. What one of them gets depends on its
own length alone, rounded up to whole blocks: what lies beyond is masked. Segments are joined in their order (Dao et al.
2023, "Flash-Decoding"). It knows heads and segments. It does not know layers, weights or adapters.

Shapes: N rows of a pass, B rows of one call, K key/value heads, G queries a key/value head, W head width, T keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from model_foundry.engine.continuous_cache import BLOCK_TOKENS, SEGMENT_TOKENS

MOST_TOGETHER = 64
"""Answers in one call."""


@dataclass(frozen=True, slots=True)
class Span:
    """Rows of one sequence in a pass: `num_rows` from `first_row`, their tokens' positions from `position` on."""

    first_row: int
    num_rows: int
    position: int
    segments: Sequence[int]

    def reach(self, window: int | None) -> list[tuple[int, int, int]]:
        """The stretches of keys that its rows see, in their order: (number of the segment, first, end) within it."""
        end = self.position + self.num_rows
        first = 0 if window is None else max(0, self.position - window + 1)
        reach = []
        for number in range(first // SEGMENT_TOKENS, (end - 1) // SEGMENT_TOKENS + 1):
            start = number * SEGMENT_TOKENS
            reach.append((number, max(first - start, 0), min(end - start, SEGMENT_TOKENS)))
        return reach


@dataclass(frozen=True, slots=True)
class Mask:
    """Who must not look where: `added` [Q, T], 0 or -inf; bool [Q] of queries that see nothing, if there are any."""

    added: torch.Tensor
    blind: torch.Tensor | None


BlockReach = list[tuple[int, int, int, Mask | None]]
"""The keys that a block of a prompt sees: segment, first, end, and the mask."""


def plan_block(span: Span, window: int | None, *, group: int, like: torch.Tensor) -> BlockReach:
    """What a block sees; masks of `like`'s type and device, once for every one of `group` queries."""
    reach: BlockReach = []
    for number, first, end in span.reach(window):
        start = number * SEGMENT_TOKENS
        mask = _mask(span, (start + first, start + end), window, group=group, like=like)
        reach.append((span.segments[number], first, end, mask))
    return reach


def _mask(span: Span, keys: tuple[int, int], window: int | None, *, group: int, like: torch.Tensor) -> Mask | None:
    """None where all may look at all of these keys."""
    query = torch.arange(span.position, span.position + span.num_rows, device=like.device)[:, None]
    key = torch.arange(*keys, device=like.device)[None, :]
    hidden = key > query
    if window is not None:
        hidden |= key <= query - window
    if not bool(hidden.any()):
        return None
    hidden = hidden.repeat(group, 1)
    blind = hidden.all(1)
    added = like.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
    return Mask(added, blind if bool(blind.any()) else None)


def attend_block(q: torch.Tensor, cache: torch.Tensor, reach: BlockReach, scale: float) -> torch.Tensor:
    """q [T, K, G, W] over cache [segments, 2 K, SEGMENT_TOKENS, W] → [T, K, G, W]."""
    num_rows, num_kv, group, width = q.shape
    # The heads that share keys are further queries: [1, K, G · T, W].
    mine = q.permute(1, 2, 0, 3).reshape(1, num_kv, group * num_rows, width)
    answers = []
    for segment, first, end, mask in reach:
        kept = cache[segment, None, :, first:end]
        out, sums = attend(mine, kept[:, :num_kv], kept[:, num_kv:], None if mask is None else mask.added, scale)
        if mask is not None and mask.blind is not None:
            sums = sums.masked_fill(mask.blind, float("-inf"))
        answers.append((out, sums))
    joined = answers[0][0] if len(answers) == 1 else join(answers)
    return joined.reshape(num_kv, group, num_rows, width).permute(2, 0, 1, 3)


@dataclass(frozen=True, slots=True)
class _Call:
    """Rows that look at `num_keys` keys of one segment each. mask: [B, 1, 1, num_keys], 0 or -inf.

    Where all look at the same segment, `segments` is that one alone.
    """

    rows: torch.Tensor | slice
    segments: torch.Tensor | slice
    num_keys: int
    mask: torch.Tensor


AnswerReach = list[list[_Call]]
"""What answers see: for the first, second, … segment of each, the calls."""


def plan_answers(spans: Sequence[Span], window: int | None, *, like: torch.Tensor, together: int) -> AnswerReach:
    """The calls that spans of one row each need, with at most `together` rows in each."""
    members: dict[tuple[int, int, int], list[tuple[int, int, int, int]]] = {}
    for span in spans:
        for level, (number, first, end) in enumerate(span.reach(window)):
            num_keys = -(-end // BLOCK_TOKENS) * BLOCK_TOKENS
            key = (level, num_keys, span.first_row // together)
            members.setdefault(key, []).append((span.first_row, span.segments[number], first, end))
    levels: AnswerReach = [[] for _ in range(1 + max(key[0] for key in members))]
    for (level, num_keys, _), found in members.items():
        rows, segments, first, end = np.array(found).T
        keys = np.arange(num_keys)
        hidden = (keys < first[:, None]) | (keys >= end[:, None])
        mask = like.new_zeros(hidden.shape).masked_fill_(torch.from_numpy(hidden).to(like.device), float("-inf"))
        segments = segments[:1] if (segments == segments[0]).all() else segments  # samples of one prompt share it
        where = [_as_slice(numbers, like.device) for numbers in (rows, segments)]
        levels[level].append(_Call(where[0], where[1], num_keys, mask[:, None, None]))
    return levels


def _as_slice(numbers: np.ndarray, device: torch.device) -> torch.Tensor | slice:
    """What lies one after the other need not be gathered."""
    if np.array_equal(numbers, np.arange(numbers[0], numbers[0] + len(numbers))):
        return slice(int(numbers[0]), int(numbers[0]) + len(numbers))
    return torch.from_numpy(numbers).to(device)


def attend_answers(q: torch.Tensor, cache: torch.Tensor, levels: AnswerReach, scale: float) -> torch.Tensor:
    """q [N, K, G, W] over cache [segments, 2 K, SEGMENT_TOKENS, W] → [N, K, G, W]; rows of no span get zeros."""
    num_kv = q.shape[1]
    answers = []
    for level, calls in enumerate(levels):
        out = q.new_zeros(q.shape)
        # A row of no span sees nothing, and its sum is not 0 / 0.
        sums = q.new_full(q.shape[:3], float("-inf") if level else 0.0, dtype=torch.float32)
        for call in calls:
            kept = cache[:, :, : call.num_keys]
            kept = kept[call.segments] if isinstance(call.segments, slice) else kept.index_select(0, call.segments)
            kept = kept.expand(len(call.mask), -1, -1, -1)  # a shared segment is read where it is
            found, logs = attend(q[call.rows], kept[:, :num_kv], kept[:, num_kv:], call.mask, scale)
            out[call.rows] = found
            if len(levels) > 1:
                sums[call.rows] = logs.float()
        answers.append((out, sums))
    return answers[0][0] if len(answers) == 1 else join(answers)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, K, Q, W] over k and v [B, K, T, W]: the answer [B, K, Q, W], and the log of its softmax's sum [B, K, Q].

    A query that sees nothing gets an answer and a sum that mean nothing.
    """
    if q.device.type == "cpu":
        # The kernel behind torch's scaled_dot_product_attention, for which alone it gives the sums.
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
    scores = (q @ k.transpose(2, 3)).float() * scale
    if mask is not None:
        scores = scores + mask
    sums = torch.logsumexp(scores, dim=-1)
    return torch.exp(scores - sums[..., None]).to(v.dtype) @ v, sums


def join(answers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Attention over several segments from that over each, one after the other."""
    largest = answers[0][1]
    for _, sums in answers[1:]:
        largest = torch.maximum(largest, sums)
    total, out = torch.zeros_like(largest), torch.zeros_like(answers[0][0], dtype=torch.float32)
    for answer, sums in answers:
        share = torch.exp(sums - largest)
        total = total + share
        # A segment in which a query sees nothing has no share; what it answers is nothing then, not 0 × NaN.
        out = out + torch.where(share[..., None] > 0, answer.float() * share[..., None], 0.0)
    return (out / total[..., None]).to(answers[0][0].dtype)


def is_alike_together(num_kv: int, group: int, width: int, *, like: torch.Tensor) -> bool:
    """Whether a row of a call gets the same bits whatever other rows are in it, on this machine and for this shape."""
    drawn, num_rows = torch.Generator().manual_seed(0), MOST_TOGETHER

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=drawn).to(like)

    scale = width**-0.5
    for num_keys in range(BLOCK_TOKENS, SEGMENT_TOKENS + 1, BLOCK_TOKENS):
        q, kv = draw(num_rows, num_kv, group, width), draw(num_rows, 2 * num_kv, num_keys, width)
        hidden = torch.arange(num_keys) > torch.arange(num_rows)[:, None] + num_keys - num_rows
        mask = like.new_zeros(hidden.shape).masked_fill_(hidden.to(like.device), float("-inf"))[:, None, None]
        want = attend(q, kv[:, :num_kv], kv[:, num_kv:], mask, scale)
        for size in (1, 2, 3, 16, 33):
            for first in (0, num_rows - size):
                rows = slice(first, first + size)
                found = attend(q[rows], kv[rows, :num_kv], kv[rows, num_kv:], mask[rows], scale)
                if not all(torch.equal(a, b[rows]) for a, b in zip(found, want, strict=True)):
                    return False
    return True
