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
from model_foundry.models import fused
from model_foundry.models.attention_loops import SIDE
from model_foundry.models.tiled_attention import PromptReach

MOST_TOGETHER = 64
"""Answers in one call."""
QUERY_BLOCK = 32
"""Queries of one head that the CPU kernel takes at a time: answers that share a segment fill one such block at most."""


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


def plan_prompts(spans: Sequence[Span], window: int | None) -> PromptReach:
    """What blocks see, where a loop computes them."""
    segments = torch.zeros(len(spans), max(len(span.segments) for span in spans), dtype=torch.int64)
    for place, span in enumerate(spans):
        segments[place, : len(span.segments)] = torch.tensor(span.segments)
    places = torch.tensor([(span.first_row, span.num_rows, span.position) for span in spans])
    most = max(span.position + span.num_rows - max(0, span.position + 1 - (window or 2**62)) for span in spans)
    return PromptReach(places, segments, most + SIDE, window)


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

    Where there is no mask, `segments` is one whole segment that all of them see all of.
    """

    rows: torch.Tensor | slice
    segments: torch.Tensor | slice | int
    num_keys: int
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class AnswerReach:
    """What answers see: for the first, second, … segment of each, the calls; and where what they find is gathered.

    outs: [levels, N, K, G, W]; rows that have no segment there stay zero.
    sums: float32 [levels, N, K, G], their logarithms.
    """

    levels: Sequence[Sequence[_Call]]
    outs: torch.Tensor
    sums: torch.Tensor


@dataclass(frozen=True, slots=True)
class Together:
    """The most rows in one call: of any segments, and of one that they share."""

    rows: int
    sharing: int


def plan_answers(
    spans: Sequence[Span], window: int | None, *, shape: tuple[int, int, int, int], like: torch.Tensor, most: Together
) -> AnswerReach:
    """The calls that spans of one row each need. shape: (N, K, G, W), of the queries."""
    members: dict[tuple[int, int, int], list[tuple[int, int, int, int]]] = {}
    sharers: dict[tuple[int, int], list[int]] = {}
    for span in spans:
        for level, (number, first, end) in enumerate(span.reach(window)):
            segment = span.segments[number]
            if end - first == SEGMENT_TOKENS and most.sharing > 1:
                sharers.setdefault((level, segment), []).append(span.first_row)
                continue
            num_keys = -(-end // BLOCK_TOKENS) * BLOCK_TOKENS
            key = (level, num_keys, span.first_row // most.rows)
            members.setdefault(key, []).append((span.first_row, segment, first, end))
    num_levels = 1 + max(level for level, *_ in (*members, *sharers))
    levels: list[list[_Call]] = [[] for _ in range(num_levels)]
    for (level, segment), rows in sharers.items():
        if len(rows) == 1:
            key = (level, SEGMENT_TOKENS, rows[0] // most.rows)
            members.setdefault(key, []).append((rows[0], segment, 0, SEGMENT_TOKENS))
            continue
        for first in range(0, len(rows), most.sharing):
            some = _as_slice(np.array(rows[first : first + most.sharing]), like.device)
            levels[level].append(_Call(some, segment, SEGMENT_TOKENS, None))
    for (level, num_keys, _), found in members.items():
        rows, segments, first, end = np.array(found).T
        keys = np.arange(num_keys)
        hidden = (keys < first[:, None]) | (keys >= end[:, None])
        mask = like.new_zeros(hidden.shape).masked_fill_(torch.from_numpy(hidden).to(like.device), float("-inf"))
        where = [_as_slice(numbers, like.device) for numbers in (rows, segments)]
        levels[level].append(_Call(where[0], where[1], num_keys, mask[:, None, None]))
    outs = like.new_zeros(num_levels, *shape)
    sums = like.new_full((num_levels, *shape[:3]), float("-inf"), dtype=torch.float32)
    sums[0] = 0.0  # a row of no span sees nothing, and its share is not 0 / 0
    return AnswerReach(levels, outs, sums)


def _as_slice(numbers: np.ndarray, device: torch.device) -> torch.Tensor | slice:
    """What lies one after the other need not be gathered."""
    if np.array_equal(numbers, np.arange(numbers[0], numbers[0] + len(numbers))):
        return slice(int(numbers[0]), int(numbers[0]) + len(numbers))
    return torch.from_numpy(numbers).to(device)


def attend_answers(q: torch.Tensor, cache: torch.Tensor, reach: AnswerReach, scale: float) -> torch.Tensor:
    """q [N, K, G, W] over cache [segments, 2 K, SEGMENT_TOKENS, W] → [N, K, G, W]; rows of no span get zeros.

    The next call of the same reach writes over what this one gave.
    """
    outs, sums = reach.outs, reach.sums
    for level, calls in enumerate(reach.levels):
        for call in calls:
            found, logs = _answer(q[call.rows], cache, call, scale)
            outs[level, call.rows] = found
            if len(outs) > 1:
                sums[level, call.rows] = logs
    if len(outs) == 1:
        return outs[0]
    if fused.fits(outs):
        return fused.join_answers(outs, sums)
    # One after the other: how many segments the longest has must not show in the others.
    shares = torch.softmax(sums, dim=0)[..., None]
    out = outs[0].float() * shares[0]
    for level in range(1, len(outs)):
        out.addcmul_(outs[level].float(), shares[level])
    return out.to(q.dtype)


def _answer(q: torch.Tensor, cache: torch.Tensor, call: _Call, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, K, G, W] → [B, K, G, W], and the log of the softmax's sum [B, K, G]."""
    num_kv = q.shape[1]
    if call.mask is None:
        # Rows that share keys are further queries.
        kept = cache[call.segments, None]
        mine = q.transpose(0, 1).flatten(1, 2)[None]
        out, sums = attend(mine, kept[:, :num_kv], kept[:, num_kv:], None, scale)
        size = (q.shape[0], q.shape[2])
        return out[0].unflatten(1, size).transpose(0, 1), sums[0].unflatten(1, size).transpose(0, 1)
    kept = cache[call.segments, :, : call.num_keys]
    return attend(q, kept[:, :num_kv], kept[:, num_kv:], call.mask, scale)


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


def find_together(num_kv: int, group: int, width: int, *, like: torch.Tensor) -> Together:
    """As many as get the same bits whatever other rows are in their call, on this machine and for this shape."""
    q, cache = _cancelling(num_kv, group, width, like=like)
    num_rows, scale = q.shape[0], width**-0.5

    def answer(rows: slice, call: _Call) -> tuple[torch.Tensor, torch.Tensor]:
        return _answer(q[rows], cache, call, scale)

    def alike(found: Sequence[torch.Tensor], want: Sequence[torch.Tensor], rows: slice) -> bool:
        return all(torch.equal(a, b[rows]) for a, b in zip(found, want, strict=True))

    everyone, numbers = slice(0, num_rows), torch.arange(num_rows, device=like.device)
    for num_keys in range(BLOCK_TOKENS, SEGMENT_TOKENS + 1, BLOCK_TOKENS):
        hidden = torch.arange(num_keys) > torch.arange(num_rows)[:, None] + num_keys - num_rows
        mask = like.new_zeros(hidden.shape).masked_fill_(hidden.to(like.device), float("-inf"))[:, None, None]
        want = answer(everyone, _Call(everyone, everyone, num_keys, mask))
        for size in (1, 2, 3, 16, 33):
            for rows in (slice(0, size), slice(num_rows - size, num_rows)):
                for segments in (rows, numbers[rows]):
                    if not alike(answer(rows, _Call(rows, segments, num_keys, mask[rows])), want, rows):
                        return Together(1, 1)
    sharing = max(1, QUERY_BLOCK // group)
    for segment in (0, num_rows - 1):
        rows, sees_all = slice(0, sharing), like.new_zeros(1, 1, 1, SEGMENT_TOKENS)
        want = answer(rows, _Call(rows, torch.full_like(numbers[rows], segment), SEGMENT_TOKENS, sees_all))
        for size in range(1, sharing + 1):
            rows = slice(0, size)
            if not alike(answer(rows, _Call(rows, segment, SEGMENT_TOKENS, None)), want, rows):
                return Together(num_rows, 1)
    return Together(num_rows, sharing)


def _cancelling(num_kv: int, group: int, width: int, *, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries [MOST_TOGETHER, K, G, W] and as many segments whose values cancel: sums of which rounding alone is left,
    and another order of summation leaves something else. Every other query sees all keys alike."""
    drawn, num_rows = torch.Generator().manual_seed(0), MOST_TOGETHER
    q = torch.randn(num_rows, num_kv, group, width, generator=drawn)
    q[::2] = 0
    cache = torch.randn(num_rows, 2, num_kv, SEGMENT_TOKENS, width, generator=drawn)
    one, other = torch.randperm(SEGMENT_TOKENS, generator=drawn).chunk(2)
    values = cache[:, 1]
    values[:, :, one] *= torch.exp2(torch.randint(-12, 13, (len(one), 1), generator=drawn))
    values[:, :, other] = -values[:, :, one]
    return q.to(like), cache.flatten(1, 2).to(like)
