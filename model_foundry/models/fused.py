"""Norms, activations, softmaxes and layouts of tensors on a CPU in one pass each, by the loops of `cpu_loops`.

`fits` says where that is possible; elsewhere their callers do the same in torch's operations. It hands a tensor's rows
out to threads, and no row's bits depend on how many there are.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from model_foundry.models import cpu_loops

MIN_SHARE_ELEMENTS = 32_768
"""Fewer numbers are done before another thread has woken up."""
_KINDS: dict[torch.dtype, tuple[Any, Any]] = {
    torch.float32: (ctypes.c_float, np.float32),
    torch.bfloat16: (ctypes.c_uint16, np.uint16),
    torch.int64: (ctypes.c_int64, np.int64),
    torch.bool: (ctypes.c_bool, np.bool_),
}
_FLOATS = (torch.float32, torch.bfloat16)
_NO_INTS, _NO_BOOLS = np.empty(0, np.int64), np.empty(0, np.bool_)
Rope = Sequence[torch.Tensor]
_pools: dict[int, ThreadPoolExecutor] = {}
_making_pool = threading.Lock()
os.register_at_fork(after_in_child=_pools.clear)  # threads stay with the parent


def fits(*tensors: torch.Tensor) -> bool:
    """Whether all are of a CPU and of a type that the loops take, and no compiler of graphs is looking on."""
    for x in tensors:
        if not x.is_cpu or x.dtype not in _FLOATS:
            return False
    return not torch.compiler.is_compiling()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [.., D] / rms × weight [D], in x's shape and type."""
    rows, out = _as_rows(x), _like(x)
    loop, width = cpu_loops.rms_norm, rows.shape[1]
    _by_rows(loop, rows.shape[0], width, *_matrix(rows), _flat(weight), np.float32(eps), _flat(out), width)
    return out


def add_rms_norm_(x: torch.Tensor, more: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [N, D] += more, in place; the norm of that."""
    num_rows, width = x.shape
    out = _like(x)
    fixed = (*_matrix(x), *_matrix(_as_rows(more)), _flat(weight), np.float32(eps), _flat(out), width)
    _by_rows(cpu_loops.add_rms_norm, num_rows, width, *fixed)
    return out


def rms_norm_backward(
    x: torch.Tensor, weight: torch.Tensor, eps: float, grad: torch.Tensor, *, weight_too: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(gradient of x, that of the weight as float32 [D])."""
    rows, gradients, dx = _as_rows(x), _as_rows(grad), _like(x)
    num_rows, width = rows.shape
    spans = _spans(num_rows, width)
    # Each thread sums its own rows.
    sums = np.zeros((len(spans), width if weight_too else 0), np.float32)
    fixed = (*_matrix(rows), _flat(weight), np.float32(eps), *_matrix(gradients), _flat(dx))
    _run(cpu_loops.rms_norm_backward, [(*fixed, own, width, *span) for own, span in zip(sums, spans, strict=True)])
    return dx, torch.from_numpy(sums.sum(0)) if weight_too else None


def gated_silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) × up, both [.., I]."""
    rows, ups, out = _as_rows(gate), _as_rows(up), _like(gate)
    width = rows.shape[1]
    _by_rows(cpu_loops.gated_silu, rows.shape[0], width, *_matrix(rows), *_matrix(ups), _flat(out), width)
    return out


def gated_silu_backward(
    gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The gradients of gate and up."""
    rows, d_gate, d_up = _as_rows(gate), _like(gate), _like(up)
    width = rows.shape[1]
    given = (*_matrix(rows), *_matrix(_as_rows(up)), *_matrix(_as_rows(grad)))
    _by_rows(cpu_loops.gated_silu_backward, rows.shape[0], width, *given, _flat(d_gate), _flat(d_up), width)
    return d_gate, d_up


def to_heads(
    x: torch.Tensor, num_rows: int, length: int, *, start: int, index: torch.Tensor | None, valid: torch.Tensor | None,
    rope: Rope | None,
) -> torch.Tensor:  # fmt: skip
    """Rows of packed tokens [N, heads, D] as [rows, heads, length, D], rotated by rope, (cos, sin) [N, 1, D / 2].

    Args:
        start: the first row's first token, where rows follow one another.
        index: int64 [rows, length], the token of each place, where they do not.
        valid: bool [rows, length], which places are to be zero if false.
    """
    _, num_heads, width = x.shape
    x = x if x.stride(2) == 1 and x.stride(1) == width else x.contiguous()
    out = torch.empty((num_rows, num_heads, length, width), dtype=x.dtype)
    fixed = (*_matrix(x.flatten(1)), *_places(index, start, valid), *_turn(rope, x.dtype), _flat(out))
    _by_rows(cpu_loops.to_heads, num_rows * num_heads, length * width, *fixed, num_heads, length, width)
    return out


def from_heads(
    part: torch.Tensor, out: torch.Tensor, *, start: int, index: torch.Tensor | None, valid: torch.Tensor | None,
    rope: Rope | None,
) -> None:  # fmt: skip
    """Write [rows, heads, length, D] back to its places in packed out [N, heads, D], turned back by rope."""
    num_rows, num_heads, length, width = part.shape
    fixed = (_flat(part), *_places(index, start, valid), *_turn(rope, part.dtype), _flat(out))
    _by_rows(cpu_loops.from_heads, num_rows * num_heads, length * width, *fixed, num_heads, length, width)


def turn_and_keep(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, rope: Rope, *, out: torch.Tensor,
    cache: torch.Tensor, places: torch.Tensor,
) -> None:  # fmt: skip
    """Rotate queries [N, H, W] into `out`, and keys [N, K, W] and values into rows of the cache [.., W].

    Args:
        rope: tables (cos, sin) [positions, 1, W] whose second half counts.
        places: int64 [M, 2 K]: where the keys, and then the values, of the first M rows go.
    """
    (num_rows, num_heads, width), num_kv = q.shape, k.shape[1]
    heads = [_matrix(part.flatten(1)) for part in (q, k, v)]
    fixed = (
        *heads[0], *heads[1], *heads[2], _flat(positions), *map(_flat, rope), _flat(out), _flat(cache), _flat(places),
        num_heads, num_kv, width, places.shape[0],
    )  # fmt: skip
    _by_rows(cpu_loops.turn_and_keep, num_rows, (num_heads + 2 * num_kv) * width, *fixed)


def join_answers(outs: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """Attention over several stretches of keys, from that over each [levels, .., W] and its sums' logarithms."""
    num_levels, width = outs.shape[0], outs.shape[-1]
    out = torch.empty(outs.shape[1:], dtype=outs.dtype)
    num_rows = out.numel() // width
    fixed = (_flat(outs), _flat(sums), _flat(out), num_levels, num_rows, width)
    _by_rows(cpu_loops.join_answers, num_rows, num_levels * width, *fixed)
    return out


def causal_softmax_(scores: torch.Tensor, *, num_queries: int, before: int, window: int | None) -> None:
    """Over the last axis of contiguous [.., rows, keys], in place.

    Args:
        num_queries: rows repeat every so many, one for each head.
        before: keys before the one that stands where the first query does.
        window: how many keys a query sees at most, its own among them.
    """
    num_keys = scores.shape[-1]
    flat = _flat(scores)
    _by_rows(
        cpu_loops.causal_softmax, flat.shape[0] // num_keys, num_keys, flat, num_keys, num_queries, before, window or 0
    )


def softmax_backward_(grad: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """From the gradient of probabilities p [.., keys] that of their scores, in place; both contiguous."""
    num_keys = p.shape[-1]
    flat = _flat(grad)
    _by_rows(cpu_loops.softmax_backward, flat.shape[0] // num_keys, num_keys, flat, _flat(p), num_keys)
    return grad


def log_normaliser(logits: torch.Tensor) -> torch.Tensor:
    """log Σ exp over the last axis of contiguous [M, V], float32 [M]."""
    num_rows, width = logits.shape
    out = torch.empty(num_rows, dtype=torch.float32)
    _by_rows(cpu_loops.log_normaliser, num_rows, width, _flat(logits), _flat(out), width)
    return out


def score_gradient_(
    logits: torch.Tensor, normaliser: torch.Tensor, targets: torch.Tensor, slopes: torch.Tensor
) -> torch.Tensor:
    """Over logits [M, V], in place: the gradient of Σ slope × log-probability of the targets, int64, float32 [M, K]."""
    num_rows, width = logits.shape
    fixed = (_flat(logits), _flat(normaliser), _flat(targets.contiguous()), _flat(slopes.contiguous()))
    _by_rows(cpu_loops.score_gradient, num_rows, width, *fixed, targets.shape[1], width)
    return logits


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """[.., D] as [N, D], the numbers of a row one after the other."""
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _like(x: torch.Tensor) -> torch.Tensor:
    """Empty, of its shape and type, without gaps."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _flat(x: torch.Tensor) -> Any:
    """The numbers of a contiguous tensor, bfloat16 as its bits; no copy."""
    return _memory(x, x.numel())


def _matrix(rows: torch.Tensor) -> tuple[Any, int]:
    """(numbers, from one row to the next) of [N, D] whose rows may lie apart."""
    num_rows, width = rows.shape
    step = rows.stride(0) if num_rows > 1 else width
    return _memory(rows, (num_rows - 1) * step + width if num_rows else 0), step


def _memory(x: torch.Tensor, num_elements: int) -> Any:
    """From x's first number on. Not by `Tensor.numpy`, whose tensors can never give their memory back (FSDP does)."""
    kind, dtype = _KINDS[x.dtype]
    if not num_elements:
        return np.empty(0, dtype)
    memory = (kind * num_elements).from_address(x.data_ptr())
    memory.tensor = x  # as long as the array lives
    return np.frombuffer(memory, dtype)


def _places(index: torch.Tensor | None, start: int, valid: torch.Tensor | None) -> tuple[Any, int, Any]:
    return _NO_INTS if index is None else _flat(index), start, _NO_BOOLS if valid is None else _flat(valid)


def _turn(rope: Rope | None, dtype: torch.dtype) -> tuple[Any, Any]:
    if rope is None:
        nothing = np.empty(0, _KINDS[dtype][1])
        return nothing, nothing
    return _flat(rope[0]), _flat(rope[1])


def _by_rows(loop: Callable[..., None], num_rows: int, row_elements: int, *fixed: Any) -> None:
    """loop(*fixed, first, last) over all rows."""
    _run(loop, [(*fixed, *span) for span in _spans(num_rows, row_elements)])


def _spans(num_rows: int, row_elements: int) -> list[tuple[int, int]]:
    """(first, last) rows of each thread."""
    number = min(torch.get_num_threads(), num_rows, num_rows * row_elements // MIN_SHARE_ELEMENTS)
    if number < 2:
        return [(0, num_rows)]
    ends = [num_rows * share // number for share in range(number + 1)]
    return list(pairwise(ends))


def _run(loop: Callable[..., None], calls: list[tuple[Any, ...]]) -> None:
    """The first call on this thread, the others on threads of their own."""
    if len(calls) > 1:
        futures = [_pool(len(calls) - 1).submit(loop, *call) for call in calls[1:]]
        loop(*calls[0])
        for future in futures:
            future.result()
    elif calls:
        loop(*calls[0])


def _pool(number: int) -> ThreadPoolExecutor:
    with _making_pool:
        if number not in _pools:
            _pools[number] = ThreadPoolExecutor(number, thread_name_prefix="rows")
        return _pools[number]
