"""Causal attention over packed rows: several rows in one batch of tokens, none of which sees another.

Queries are taken in blocks, and each block meets only the keys before its end, so the upper triangle is not computed.
Short rows of similar length are stacked (padded on the right, which causality hides) to make fewer, larger products.
Probabilities are kept for the backward pass while they are small, and computed again where they are not
(Dao et al. 2022 keep none). Accelerators use torch's fused kernels instead. A row may end in branches, which go on from
one beginning and do not see each other; they cost a mask. It knows nothing of layers, weights or caches.

Shapes: N packed tokens, H query heads, K key/value heads, G = H // K, D head width, S rows of a group, T their length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from model_foundry.errors import ModelError
from model_foundry.models import fused, tiled_attention
from model_foundry.models.packed_rows import QUERY_BLOCK_TOKENS, PackedRows, RowGroup
from model_foundry.models.randomness import AttentionDropout
from model_foundry.models.tiled_attention import TiledAttention

Attention = Literal["auto", "flash", "sdpa", "eager"]
"""Back ends. eager: the blocks below, in plain operations. sdpa: torch's fused kernels, row by row. flash: one call of
FlashAttention for all rows."""
KEEP_PROBABILITIES_TOKENS = 512
"""Rows up to this length keep their probabilities; beyond it the memory grows with the square, so they are redone."""


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, inverse: bool = False, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Rotary position embedding (Su et al. 2021), the half-split layout. x [.., D]; cos, sin fit [.., D / 2]."""
    half, sign = x.shape[-1] // 2, -1 if inverse else 1
    first, second = x[..., :half], x[..., half:]
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    torch.mul(first, cos, out=out[..., :half])
    out[..., :half].addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out[..., half:])
    out[..., half:].addcmul_(first, sin, value=sign)
    return out


class PackedAttention(torch.autograd.Function):
    """softmax(q kᵀ) v within each row, causal; rotation included. q [N, H, D], k and v [N, K, D] → [N, H, D].

    Rotation and the change to one stretch of memory a head are one operation, and what is kept is by head already.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rope: Any, rows: Any, window: Any, dropout: Any
    ) -> Any:
        out, num_kv = torch.empty_like(q, memory_format=torch.contiguous_format), k.shape[1]
        inputs: list[torch.Tensor] = []
        kept: list[torch.Tensor] = []
        for group in rows.groups:
            qg, kg = _by_head(q, group, num_kv, rope[:2]), _by_head(k, group, num_kv, rope[2:])
            vg = _by_head(v, group, num_kv)
            og = torch.empty_like(qg)
            for first, last, first_key in _blocks(group, window):
                p = _probabilities(qg, kg, first, last, first_key, group, rows, window)
                used = p if dropout is None else p * _kept(dropout, group, qg, first, last, first_key)
                og[:, :, first:last] = torch.bmm(used, vg[:, 0, first_key:last]).view(
                    og.shape[0], og.shape[1], -1, og.shape[3]
                )
                if group.num_tokens <= KEEP_PROBABILITIES_TOKENS:
                    kept.append(p)
            _put(out, og, group)
            inputs += [qg, kg, vg]
        ctx.save_for_backward(*inputs, *kept)
        ctx.rope, ctx.rows, ctx.window, ctx.dropout = rope, rows, window, dropout
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved, rope = list(ctx.saved_tensors), ctx.rope
        inputs, kept = saved[: 3 * len(ctx.rows.groups)], saved[3 * len(ctx.rows.groups) :]
        num_kv = inputs[1].shape[0] // ctx.rows.groups[0].num_rows
        dq = torch.empty_like(grad, memory_format=torch.contiguous_format)
        dk, dv = (grad.new_empty(grad.shape[0], num_kv, grad.shape[2]) for _ in range(2))
        for group in ctx.rows.groups:
            part, inputs = inputs[:3], inputs[3:]
            blocks = len(_blocks(group, ctx.window))
            mine = None
            if group.num_tokens <= KEEP_PROBABILITIES_TOKENS:
                mine, kept = kept[:blocks], kept[blocks:]
            # A padded place repeats a real token: its gradient must not count twice.
            gg = _by_head(grad, group, num_kv, only_valid=True)
            dqg, dkg, dvg = _backward_group(part, gg, mine, group, ctx.rows, ctx.window, ctx.dropout)
            _put(dq, dqg, group, rope[:2])
            _put(dk, dkg, group, rope[2:])
            _put(dv, dvg, group)
        return dq, dk, dv, None, None, None, None


def _backward_group(
    inputs: Sequence[torch.Tensor],
    gg: torch.Tensor,
    kept: list[torch.Tensor] | None,
    group: RowGroup,
    rows: PackedRows,
    window: int | None,
    dropout: AttentionDropout | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of the rotated queries and keys and of the values of a group, as `_by_head` lays them."""
    qg, kg, vg = inputs
    dqg = torch.empty_like(qg)
    dkg, dvg = torch.empty_like(kg), torch.empty_like(vg)
    begun = group.num_tokens  # keys from here on have a gradient: the last block writes most, and nothing is zeroed
    for number, (first, last, first_key) in reversed(list(enumerate(_blocks(group, window)))):
        p = kept[number] if kept is not None else _probabilities(qg, kg, first, last, first_key, group, rows, window)
        block = gg[:, :, first:last].reshape(gg.shape[0], -1, gg.shape[3])
        keys, values = kg[:, 0, first_key:last], vg[:, 0, first_key:last]
        scale = None if dropout is None else _kept(dropout, group, qg, first, last, first_key)
        _add_keys(dvg, torch.bmm((p if scale is None else p * scale).transpose(1, 2), block), first_key, begun)
        dp = torch.bmm(block, values.transpose(1, 2))
        ds = _softmax_backward(dp if scale is None else dp.mul_(scale), p)
        dqg[:, :, first:last] = torch.bmm(ds, keys).view(dqg.shape[0], dqg.shape[1], -1, dqg.shape[3])
        queries = qg[:, :, first:last].reshape(qg.shape[0], -1, qg.shape[3])
        _add_keys(dkg, torch.bmm(ds.transpose(1, 2), queries), first_key, begun)
        begun = min(begun, first_key)
    return dqg, dkg, dvg


def _add_keys(total: torch.Tensor, part: torch.Tensor, first_key: int, begun: int) -> None:
    """part [S·K, keys, D] from `first_key` on: added to what is there from `begun` on, before that written."""
    last = first_key + part.shape[1]
    if begun < last:
        total[:, 0, begun:last] += part[:, begun - first_key :]
    total[:, 0, first_key : min(begun, last)] = part[:, : min(begun, last) - first_key]


def _blocks(group: RowGroup, window: int | None) -> list[tuple[int, int, int]]:
    """(first query, end, first key) of each block; keys run to the block's end."""
    blocks = []
    for first in range(0, group.num_tokens, QUERY_BLOCK_TOKENS):
        last = min(first + QUERY_BLOCK_TOKENS, group.num_tokens)
        # A branch stands further from the beginning than its positions say.
        first_key = 0 if window is None or group.branch is not None else max(0, first - window + 1)
        blocks.append((first, last, first_key))
    return blocks


def _by_head(
    x: torch.Tensor,
    group: RowGroup,
    num_kv: int,
    rope: tuple[torch.Tensor, ...] | None = None,
    *,
    only_valid: bool = False,
) -> torch.Tensor:
    """The group's part of x [N, heads, D] as [S·K, heads // K, T, D], contiguous.

    Args:
        rope: (cos, sin), by which it is rotated.
        only_valid: padded places are zero.
    """
    valid = group.valid if only_valid else None
    if fused.fits(x, *(rope or ())):
        heads = fused.to_heads(
            x, group.num_rows, group.num_tokens, start=group.start, index=group.index, valid=valid, rope=rope
        )
        return heads.view(group.num_rows * num_kv, -1, *heads.shape[2:])
    part = _as_heads(group.of(x), group, num_kv)
    if rope is None:
        by_head = part.contiguous().view(-1, *part.shape[2:])
    else:
        cos, sin = (_as_heads(group.of(each), group, 1) for each in rope)
        by_head = rotate(part, cos, sin).view(-1, *part.shape[2:])
    return by_head if valid is None else by_head * valid.repeat_interleave(num_kv, 0)[:, None, :, None]


def _as_heads(part: torch.Tensor, group: RowGroup, num_kv: int) -> torch.Tensor:
    """A view of [S·T, heads, D] as [S, K, heads // K, T, D]."""
    return part.view(group.num_rows, group.num_tokens, num_kv, -1, part.shape[-1]).permute(0, 2, 3, 1, 4)


def _put(out: torch.Tensor, part: torch.Tensor, group: RowGroup, rope: tuple[torch.Tensor, ...] | None = None) -> None:
    """Write [S·K, heads // K, T, D] back to its packed places in out [N, heads, D]; padding is left behind.

    With rope, (cos, sin), turned back first.
    """
    num_kv = part.shape[0] // group.num_rows
    if fused.fits(out, part, *(rope or ())) and out.dtype == part.dtype:
        heads = part.view(group.num_rows, -1, *part.shape[2:])
        fused.from_heads(heads, out, start=group.start, index=group.index, valid=group.valid, rope=rope)
        return
    by_head = part.view(group.num_rows, num_kv, *part.shape[1:])
    apart = group.index is not None
    place = out.new_empty(group.num_rows * group.num_tokens, *out.shape[1:]) if apart else group.of(out)
    target = _as_heads(place, group, num_kv)
    if rope is None:
        target.copy_(by_head)
    else:
        cos, sin = (_as_heads(group.of(each), group, 1) for each in rope)
        rotate(by_head, cos, sin, inverse=True, out=target)
    if group.index is None:
        return
    index = group.index.view(-1)
    if group.valid is None:
        out[index] = place
    else:
        valid = group.valid.view(-1)
        out[index[valid]] = place[valid]


def _probabilities(
    qg: torch.Tensor,
    kg: torch.Tensor,
    first: int,
    last: int,
    first_key: int,
    group: RowGroup,
    rows: PackedRows,
    window: int | None,
) -> torch.Tensor:
    """Attention of the queries first..last: [S·K, G·(last - first), last - first_key]."""
    queries = qg[:, :, first:last].reshape(qg.shape[0], -1, qg.shape[3])
    scores = torch.bmm(queries, kg[:, 0, first_key:last].transpose(1, 2))
    if group.branch is not None:
        # What all branches go on from is hidden from nobody after it.
        masked = min(first, group.num_shared) if window is None else 0
        hidden = rows.fork_mask(group, first, last, masked, window)
        by_row = scores.view(group.num_rows, -1, last - first, scores.shape[2])
        by_row[..., masked:].masked_fill_(hidden[:, None], float("-inf"))
        return torch.softmax(scores, dim=-1)
    if fused.fits(scores):
        fused.causal_softmax_(scores, num_queries=last - first, before=first - first_key, window=window)
        return scores
    # Without a window only keys from the block's first query on can be hidden.
    masked = first if window is None else first_key
    mask = rows.mask(first, last - first, masked, window)
    if mask is not None:
        by_query = scores.view(scores.shape[0], qg.shape[1], last - first, -1)
        by_query[..., masked - first_key :].masked_fill_(mask, float("-inf"))
    return torch.softmax(scores, dim=-1)


def _softmax_backward(dp: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """The gradient of the scores; dp may be written over."""
    return fused.softmax_backward_(dp, p) if fused.fits(dp, p) else torch._softmax_backward_data(dp, p, -1, p.dtype)


def _kept(
    dropout: AttentionDropout, group: RowGroup, qg: torch.Tensor, first: int, last: int, first_key: int
) -> torch.Tensor:
    """The dropout mask of a block of a group, as `_probabilities` lies; drawn again in the backward pass."""
    num_kv, num_queries = qg.shape[0] // group.num_rows, qg.shape[1]
    mask = torch.ones(group.num_rows, num_kv, num_queries, last - first, last - first_key)
    for place, row in enumerate(group.rows):
        drawn = dropout.mask(row, (num_kv, num_queries), (first, last), (first_key, last))
        mask[place, :, :, : drawn.shape[2], : drawn.shape[3]] = drawn
    return mask.view(group.num_rows * num_kv, -1, last - first_key).to(qg.device, qg.dtype)


@dataclass(frozen=True, slots=True)
class AttentionChoice:
    """The back end, and why, in words."""

    chosen: Attention
    why: str


def choose_attention(
    asked: Attention, device: torch.device, dtype: torch.dtype, *, attention_dropout: float = 0.0
) -> AttentionChoice:
    """What computes attention on this device; what was asked for, where that runs.

    `flash` was written after torch's documentation; no machine of ours has run it yet, so `auto` does not take it.
    """
    if attention_dropout:
        why = "attention dropout is drawn by counters, which only the plain blocks do"
        return AttentionChoice("eager", why if asked in ("auto", "eager") else f"{why}, not {asked}")
    if asked == "flash" and (obstacle := _flash_obstacle(device, dtype)) is not None:
        chosen = "eager" if device.type == "cpu" else "sdpa"
        return AttentionChoice(chosen, f"flash cannot be used: {obstacle}")
    if asked != "auto":
        return AttentionChoice(asked, "as asked for")
    if device.type == "cpu":
        return AttentionChoice("eager", "on a CPU the plain blocks skip the masked triangle and stack short rows")
    return AttentionChoice("sdpa", f"torch's fused kernels on {device.type}")


def _flash_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"it needs CUDA, and this is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bfloat16 or float16, and this is {str(dtype).removeprefix('torch.')}"
    if find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    return None


def attend_packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rope: tuple[torch.Tensor, ...],
    rows: PackedRows,
    window: int | None,
    *,
    backend: Attention = "auto",
    dropout: AttentionDropout | None = None,
) -> torch.Tensor:
    """Attention of one layer over packed rows; rope = (cos, sin) for queries, scale included, and for keys."""
    if backend == "auto":
        backend = choose_attention("auto", q.device, q.dtype).chosen
    if backend == "eager" or dropout is not None:
        num_tokens = sum(rows.lengths)
        if any(part.shape[0] != num_tokens for part in (q, k, v, *rope)):
            given = [part.shape[0] for part in (q, k, v, *rope)]
            raise ModelError(f"rows of {num_tokens} tokens, and {given} are given")
        if dropout is None and tiled_attention.fits(q, k, v, rope, rows):
            return TiledAttention.apply(q, k, v, rope, rows, window)  # pyright: ignore[reportReturnType]
        return PackedAttention.apply(q, k, v, rope, rows, window, dropout)  # pyright: ignore[reportReturnType]
    if backend == "flash":
        return attend_flash(q, k, v, rope, rows, window)
    return attend_row_by_row(q, k, v, rope, rows, window)


def attend_flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rope: tuple[torch.Tensor, ...],
    rows: PackedRows,
    window: int | None,
) -> torch.Tensor:
    """The same through FlashAttention over rows of any lengths (Dao 2023), one call for all of them."""
    from torch.nn.attention.varlen import varlen_attn

    cos_q, sin_q, cos_k, sin_k = rope
    q, k = _rotate_autograd(q, cos_q, sin_q), _rotate_autograd(k, cos_k, sin_k)
    ends = torch.tensor((0, *rows.lengths), dtype=torch.int32, device=q.device).cumsum(0, dtype=torch.int32)
    longest = max(rows.lengths)
    # The library counts the tokens before the query, we count the query itself as well.
    reach = (-1 if window is None else window - 1, 0)
    return varlen_attn(
        q, k, v, ends, ends, longest, longest, scale=1.0, window_size=reach, enable_gqa=q.shape[1] != k.shape[1]
    )  # pyright: ignore[reportReturnType]


def attend_row_by_row(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rope: tuple[torch.Tensor, ...],
    rows: PackedRows,
    window: int | None,
) -> torch.Tensor:
    """The same through torch's fused kernels: for accelerators, where a row fills the machine."""
    cos_q, sin_q, cos_k, sin_k = rope
    q, k = _rotate_autograd(q, cos_q, sin_q), _rotate_autograd(k, cos_k, sin_k)
    forks = rows.branches or ((),) * len(rows.lengths)
    parts = zip(*(x.split(list(rows.lengths)) for x in (q, k, v)), forks, strict=True)
    return torch.cat([_sdpa(row_q, row_k, row_v, window, branches) for row_q, row_k, row_v, branches in parts])


def _rotate_autograd(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, branches: tuple[int, ...] = ()
) -> torch.Tensor:
    """One row on an accelerator through torch's fused kernels; the scale is in the rotation already."""
    mask = None
    if branches:
        forked = PackedRows.of([q.shape[0]], q.device, [branches])
        mask = ~forked.fork_mask(forked.groups[0], 0, q.shape[0], 0, window)[0]
    elif window is not None and q.shape[0] > window:
        place = torch.arange(q.shape[0], device=q.device)
        mask = (place[None, :] <= place[:, None]) & (place[None, :] > place[:, None] - window)
    out = functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None],
        attn_mask=mask, is_causal=mask is None, scale=1.0, enable_gqa=True,
    )  # fmt: skip
    return out[0].transpose(0, 1)
