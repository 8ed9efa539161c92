"""Causal attention in bfloat16 by loops, where a processor multiplies that: of packed rows, and of blocks of prompts.

Elsewhere, and for rows that end in branches, `attention` does the same in torch's operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from model_foundry.models import fused, prompt_loop
from model_foundry.models.attention_loops import attend, attend_backward, room_backward, room_forward
from model_foundry.models.compiled_loop import BFLOAT16
from model_foundry.models.packed_rows import PackedRows
from model_foundry.models.small_products import SIDE, have_products
from model_foundry.models.tiles import tile_shapes

Rope = tuple[torch.Tensor, ...]
_FLOAT_BYTES = 4


def is_for(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the loops compute such numbers here."""
    return fused.COMPILES and device.type == "cpu" and dtype == torch.bfloat16 and have_products()


def fits(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rope: Rope, rows: PackedRows) -> bool:
    """Whether the loops compute these rows. They do not look where they read and write: other shapes are not theirs."""
    (_, num_heads, width), num_kv = q.shape, k.shape[1]
    together = k.shape == v.shape and k.shape[2] == width and num_heads % num_kv == 0
    turned = all(each.shape[-1] * 2 == width and each.dtype == rope[0].dtype for each in rope)
    if not (together and turned) or any(rows.branches):
        return False
    return all(is_for(x.device, x.dtype) for x in (q, k, v)) and fused.fits(q, *rope)


@dataclass(frozen=True, slots=True)
class PromptReach:
    """Blocks of prompts, and where the keys are that they see.

    Attributes:
        spans: int64 [S, 3], of each its first row, how many it has, and the position of the first.
        segments: int64 [S, M], those of its sequence in their order.
        most: of the keys that one block sees.
    """

    spans: torch.Tensor
    segments: torch.Tensor
    most: int
    window: int | None


def attend_prompts(q: torch.Tensor, cache: torch.Tensor, reach: PromptReach, scale: float) -> torch.Tensor:
    """q [N, H, W] over cache [segments, 2 K, length, W], both without gaps → [N, H, W]; rows of no block get zeros."""
    (_, num_heads, width), (_, twice, length, _) = q.shape, cache.shape
    num_units, most = len(reach.spans) * twice // 2, -(-reach.most // SIDE) * SIDE
    out, shapes = torch.zeros_like(q), torch.from_numpy(tile_shapes())
    fused.with_room(
        prompt_loop.attend_prompts.of(BFLOAT16), num_units, q.numel() // num_units * most // SIDE,
        room_forward(most, width) // _FLOAT_BYTES,
        (*_addresses(q, cache, reach.spans, reach.segments, out), scale),
        (
            shapes.data_ptr(), most, reach.segments.shape[1], length, num_heads, twice // 2, width, reach.window or 0
        ),
    )  # fmt: skip
    return out


class TiledAttention(torch.autograd.Function):
    """softmax(q kᵀ) v within each row, causal; rotation included. q [N, H, W], k and v [N, K, W] → [N, H, W].

    A row's bits depend on the row alone. Of the probabilities only the logarithms of their sums are kept.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rope: Rope, rows: PackedRows, window: int | None
    ) -> torch.Tensor:
        q, k, v = (_by_token(x) for x in (q, k, v))
        rope = tuple(each.contiguous() for each in rope)
        out, sums = torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape[:2], dtype=torch.float32)
        work = _Work(q, k, rows, window)
        fused.with_room(
            attend.of(BFLOAT16, fused.TYPES[rope[0].dtype]), work.num_units, work.unit_elements,
            room_forward(work.most, work.width) // _FLOAT_BYTES,
            (*_strided(q, k, v), work.places.data_ptr(), *_addresses(*rope), *_addresses(out, sums)), work.sizes,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, sums, *rope)
        ctx.rows, ctx.window = rows, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, sums, *rope = ctx.saved_tensors
        grad, work = grad.to(q.dtype).contiguous(), _Work(q, k, ctx.rows, ctx.window)
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
        fused.with_room(
            attend_backward.of(BFLOAT16, fused.TYPES[rope[0].dtype]), work.num_units, work.unit_elements,
            room_backward(work.most, work.width) // _FLOAT_BYTES,
            (*_strided(q, k, v), *_addresses(out, grad, sums, work.places, *rope, dq, dk, dv)), work.sizes,
        )  # fmt: skip
        return dq, dk, dv, None, None, None


class _Work:
    """What both loops are told of the rows: places, int64 [R, 2] (first token, tokens), and sizes."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, rows: PackedRows, window: int | None) -> None:
        (num_tokens, num_heads, self.width), num_kv = q.shape, k.shape[1]
        lengths = torch.tensor(rows.lengths, dtype=torch.int64)
        self.places = torch.stack([lengths.cumsum(0) - lengths, lengths], dim=1)
        self.most = -(-max(rows.lengths) // SIDE) * SIDE
        self.num_units = len(rows.lengths) * num_kv
        pairs = num_tokens * max(rows.lengths) // SIDE  # what each number of a query meets
        self.unit_elements = pairs * num_heads * self.width // self.num_units
        self._shapes = torch.from_numpy(tile_shapes())  # has a name for as long as the loop reads it
        self.sizes = (self._shapes.data_ptr(), self.most, num_heads, num_kv, self.width, window or 0)


def _by_token(x: torch.Tensor) -> torch.Tensor:
    """[N, heads, W], the heads of a token without gaps."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _strided(*tensors: torch.Tensor) -> tuple[int, ...]:
    return tuple(number for x in tensors for number in (x.data_ptr(), x.stride(0)))


def _addresses(*tensors: torch.Tensor) -> tuple[int, ...]:
    return tuple(x.data_ptr() for x in tensors)
