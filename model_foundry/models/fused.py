"""Norms, activations, softmaxes and layouts of tensors on a CPU in one pass each, by the loops of `cpu_loops`.

`fits` says where that is possible; elsewhere their callers do the same in torch's operations. It hands a tensor's rows
out to threads, and no row's bits depend on how many there are. Loops get addresses: every tensor has a name here for as
long as they run.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import pairwise
from typing import Any

import numba
import torch
from torch.nn import functional

from model_foundry.models import answer_products, choice_loops, cpu_loops, tiles
from model_foundry.models.compiled_loop import BFLOAT16, FLOAT32, CompiledLoop

MIN_SHARE_ELEMENTS = 32_768
"""Fewer numbers are done before another thread has woken up."""
MIN_INPUTS_TO_TRANSPOSE = 256
TYPES: dict[torch.dtype, Any] = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}
COMPILES = not getattr(numba.config, "DISABLE_JIT", 0)
Rope = Sequence[torch.Tensor]
Call = Callable[..., None]
_pools: dict[int, ThreadPoolExecutor] = {}
_making_pool, _all_threads = threading.Lock(), threading.Lock()
_NOBODY_IS_AWAITED = 2**62


def fits(*tensors: torch.Tensor) -> bool:
    """Whether all are of a CPU and of a type that the loops take, and no compiler of graphs is looking on."""
    for x in tensors:
        if not x.is_cpu or x.dtype not in TYPES:
            return False
    return COMPILES and not torch.compiler.is_compiling()


def check_within(indices: torch.Tensor, size: int) -> None:
    """The loops do not look where they read and write.

    Raises:
        IndexError: an index is negative, or not below size.
    """
    least, most = (int(end) for end in indices.aminmax())
    if least < 0 or most >= size:
        raise IndexError(f"index {least if least < 0 else most} is out of bounds for {size}")


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [.., D] / rms × weight [D], in x's shape and type."""
    rows, weight, out = _as_rows(x), weight.contiguous(), _like(x)
    num_rows, width = rows.shape
    call = cpu_loops.rms_norm.of(TYPES[x.dtype], TYPES[weight.dtype])
    _by_rows(
        call, num_rows, width, rows.data_ptr(), rows.stride(0), weight.data_ptr(), eps, out.data_ptr(), width
    )  # fmt: skip
    return out


def add_rms_norm(
    x: torch.Tensor, more: torch.Tensor, weight: torch.Tensor, eps: float, *, in_place: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + more, both [N, D], and the norm of that. In place the sum is written over x, whose rows are without gaps."""
    rows, added, weight, out = _as_rows(x), _as_rows(more.to(x.dtype)), weight.contiguous(), _like(x)
    total = rows if in_place else _like(rows)
    num_rows, width = x.shape
    call = cpu_loops.add_rms_norm.of(TYPES[x.dtype], TYPES[weight.dtype])
    _by_rows(
        call, num_rows, width, rows.data_ptr(), rows.stride(0), added.data_ptr(), added.stride(0), total.data_ptr(),
        total.stride(0), weight.data_ptr(), eps, out.data_ptr(), width,
    )  # fmt: skip
    return total, out


def rms_norm_backward(
    x: torch.Tensor, weight: torch.Tensor, eps: float, grad: torch.Tensor, *, weight_too: bool,
    more: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """(gradient of x, with `more` of it added; that of the weight as float32 [D])."""
    rows, gradients, weight, dx = _as_rows(x), _as_rows(grad.to(x.dtype)), weight.contiguous(), _like(x)
    others = gradients if more is None else _as_rows(more.to(x.dtype))
    num_rows, width = rows.shape
    spans = _spans(num_rows, width)
    sums = torch.zeros((len(spans), width if weight_too else 0), dtype=torch.float32)  # each thread sums its own rows
    fixed = (
        rows.data_ptr(), rows.stride(0), weight.data_ptr(), eps, gradients.data_ptr(), gradients.stride(0),
        others.data_ptr(), others.stride(0), more is not None, dx.data_ptr(),
    )  # fmt: skip
    _run(
        cpu_loops.rms_norm_backward.of(TYPES[x.dtype], TYPES[weight.dtype]),
        [(*fixed, own.data_ptr(), weight_too, width, *span) for own, span in zip(sums, spans, strict=True)],
    )
    return dx, sums.sum(0) if weight_too else None


def gated_silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) × up, both [.., I]."""
    rows, ups, out = _as_rows(gate), _as_rows(up.to(gate.dtype)), _like(gate)
    num_rows, width = rows.shape
    _by_rows(
        cpu_loops.gated_silu.of(TYPES[gate.dtype]), num_rows, width, rows.data_ptr(), rows.stride(0), ups.data_ptr(),
        ups.stride(0), out.data_ptr(), width,
    )  # fmt: skip
    return out


def gated_silu_backward(
    gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The gradients of gate and up."""
    rows, ups, gradients = _as_rows(gate), _as_rows(up.to(gate.dtype)), _as_rows(grad.to(gate.dtype))
    d_gate, d_up = _like(gate), _like(gate)
    num_rows, width = rows.shape
    _by_rows(
        cpu_loops.gated_silu_backward.of(TYPES[gate.dtype]), num_rows, width, rows.data_ptr(), rows.stride(0),
        ups.data_ptr(), ups.stride(0), gradients.data_ptr(), gradients.stride(0), d_gate.data_ptr(), d_up.data_ptr(),
        width,
    )  # fmt: skip
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
    turn, places = _contiguous(rope), _contiguous((index, valid))
    call = cpu_loops.to_heads.of(TYPES[x.dtype], TYPES[turn[0].dtype] if turn else None)
    _by_rows(
        call, num_rows * num_heads, length * width, x.data_ptr(), x.stride(0), *_layout(start, places, turn),
        out.data_ptr(), num_heads, length, width,
    )  # fmt: skip
    return out


def from_heads(
    x: torch.Tensor, out: torch.Tensor, *, start: int, index: torch.Tensor | None, valid: torch.Tensor | None,
    rope: Rope | None,
) -> None:  # fmt: skip
    """Write [rows, heads, length, D] back to its places in packed out [N, heads, D], turned back by rope."""
    num_rows, num_heads, length, width = x.shape
    x, turn, places = x.contiguous(), _contiguous(rope), _contiguous((index, valid))
    call = cpu_loops.from_heads.of(TYPES[x.dtype], TYPES[turn[0].dtype] if turn else None)
    _by_rows(
        call, num_rows * num_heads, length * width, x.data_ptr(), *_layout(start, places, turn), out.data_ptr(),
        num_heads, length, width,
    )  # fmt: skip


def turn_and_keep(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, rope: Rope, *, out: torch.Tensor,
    cache: torch.Tensor, places: torch.Tensor,
) -> None:  # fmt: skip
    """Rotate queries [N, H, W] into `out`, and keys [N, K, W] and values into rows of the cache [.., W].

    Once for all layers, the caller holds positions and places against the tables and the cache (`check_within`). All
    are of one type, and without gaps from head to head.

    Args:
        rope: tables (cos, sin) [positions, 1, W] whose second half counts.
        places: int64 [M, 2 K]: where the keys, and then the values, of the first M rows go.
    """
    (num_rows, num_heads, width), num_kv = q.shape, k.shape[1]
    _by_rows(
        cpu_loops.turn_and_keep.of(TYPES[q.dtype]), num_rows, (num_heads + 2 * num_kv) * width,
        q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0), positions.data_ptr(),
        rope[0].data_ptr(), rope[1].data_ptr(), out.data_ptr(), cache.data_ptr(), places.data_ptr(),
        num_heads, num_kv, width, places.shape[0],
    )  # fmt: skip


def join_answers(outs: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """Attention over several stretches of keys, from that over each [levels, .., W], and the sums' logarithms."""
    num_levels, width = outs.shape[0], outs.shape[-1]
    out = torch.empty(outs.shape[1:], dtype=outs.dtype)
    num_rows = out.numel() // width
    with_room(
        cpu_loops.join_answers.of(TYPES[outs.dtype]), num_rows, num_levels * width, width,
        (outs.data_ptr(), sums.data_ptr()), (out.data_ptr(), num_levels, num_rows, width),
    )  # fmt: skip
    return out


def causal_softmax_(scores: torch.Tensor, *, num_queries: int, before: int, window: int | None) -> None:
    """Over the last axis of contiguous [.., rows, keys], in place.

    Args:
        num_queries: rows repeat every so many, one for each head.
        before: keys before the one that stands where the first query does.
        window: how many keys a query sees at most, its own among them.
    """
    num_keys = scores.shape[-1]
    with_room(
        cpu_loops.causal_softmax.of(TYPES[scores.dtype]), scores.numel() // num_keys, num_keys, num_keys,
        (scores.data_ptr(),), (num_keys, num_queries, before, window or 0),
    )  # fmt: skip


def softmax_backward_(grad: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """From the gradient of probabilities p [.., keys] that of their scores, in place; both contiguous, of one type."""
    num_keys = p.shape[-1]
    call = cpu_loops.softmax_backward.of(TYPES[grad.dtype])
    _by_rows(call, grad.numel() // num_keys, num_keys, grad.data_ptr(), p.data_ptr(), num_keys)
    return grad


def log_normaliser(logits: torch.Tensor) -> torch.Tensor:
    """log Σ exp of the rows of contiguous [M, V], as float32 [M, 2]: the largest, and what is to be added to it.

    Apart, for their sum would be rounded, and logits can be large.
    """
    num_rows, width = logits.shape
    out = torch.empty((num_rows, 2), dtype=torch.float32)
    call = cpu_loops.log_normaliser.of(TYPES[logits.dtype])
    _by_rows(call, num_rows, width, logits.data_ptr(), out.data_ptr(), width)
    return out


def score_gradient_(
    logits: torch.Tensor, normaliser: torch.Tensor, targets: torch.Tensor, slopes: torch.Tensor
) -> torch.Tensor:
    """Over logits [M, V], in place: the gradient of Σ slope × log-probability of the targets, int64, float32 [M, K].

    Raises:
        IndexError: a target is not in the vocabulary.
    """
    (num_rows, width), num_targets = logits.shape, targets.shape[1]
    targets, slopes = targets.to(torch.int64).contiguous(), slopes.contiguous()
    if num_rows:
        check_within(targets, width)
    with_room(
        cpu_loops.score_gradient.of(TYPES[logits.dtype]), num_rows, width, num_targets,
        (logits.data_ptr(), normaliser.data_ptr(), targets.data_ptr(), slopes.data_ptr()), (num_targets, width),
    )  # fmt: skip
    return logits


def choose_tokens(
    logits: torch.Tensor, temperatures: Sequence[float], draws: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The next token of each row of contiguous [R, V], int64 [R], and its log-probability, float32 [R].

    Args:
        temperatures: of each row; 0 takes the likeliest. Log-probabilities are those of temperature 1.
        draws: in [0, 1), by which the others are chosen.
    """
    num_rows, width = logits.shape
    sharpness = torch.tensor([max(1 / each, 1e-37) if each else 0.0 for each in temperatures], dtype=torch.float32)
    luck, tokens = torch.tensor(draws, dtype=torch.float32), torch.empty(num_rows, dtype=torch.int64)
    logprobs = torch.empty(num_rows, dtype=torch.float32)
    with_room(
        choice_loops.choose.of(TYPES[logits.dtype]), num_rows, width, width + width // choice_loops.BLOCK + 1,
        (logits.data_ptr(), sharpness.data_ptr(), luck.data_ptr()),
        (tokens.data_ptr(), logprobs.data_ptr(), width),
    )  # fmt: skip
    return tokens, logprobs


def product_of_few(x: torch.Tensor, weight: int, shape: tuple[int, int], outputs: int) -> torch.Tensor:
    """x [R, in] × weightᵀ [R, out] in bfloat16, R ≤ `tiles.ROWS`, by small products.

    Args:
        weight: the address of `tiles.in_tiles`, whose blocks have so many `outputs`.
        shape: of the weight, (out, in); out is a multiple of `answer_products.AT_ONCE_BY_TILES`.
    """
    (num_rows, size), num_out, at_once = x.shape, shape[0], answer_products.AT_ONCE_BY_TILES
    rows = functional.pad(x, (0, 0, 0, tiles.ROWS - num_rows)).contiguous()
    out, shapes = torch.empty(num_rows, num_out, dtype=x.dtype), torch.from_numpy(tiles.tile_shapes())
    with_room(
        answer_products.product_of_few.of(TYPES[x.dtype]), num_out // at_once, size * at_once, tiles.ROWS * at_once,
        (shapes.data_ptr(), rows.data_ptr(), weight, outputs), (out.data_ptr(), num_rows, size, num_out),
    )  # fmt: skip
    return out


def weight_gradient(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """gradᵀ x [out, in] of grad [N, out] and x [N, in].

    Products of tiles are twice as fast where the left side lies row by row, which pays for its transposition.
    """
    pays = x.dtype == grad.dtype == torch.bfloat16 and x.shape[1] >= MIN_INPUTS_TO_TRANSPOSE and tiles.have_tiles()
    return (transposed(grad) if pays and fits(x, grad) else grad.t()) @ x


def write_scaled(outs: Sequence[torch.Tensor], xs: Sequence[torch.Tensor], scales: Sequence[float]) -> None:
    """Each out = scale × x, of its shape and float32; outs are of one type, and all without gaps."""
    numbers = torch.tensor([(x.data_ptr(), out.data_ptr(), x.numel()) for x, out in zip(xs, outs, strict=True)])
    factors, total = torch.tensor(scales, dtype=torch.float32), sum(x.numel() for x in xs)
    call = cpu_loops.write_scaled.of(TYPES[outs[0].dtype])
    _by_rows(
        call, len(outs), total // len(outs), numbers.data_ptr(), factors.data_ptr(), outs[0].data_ptr()
    )  # fmt: skip


def transposed(x: torch.Tensor) -> torch.Tensor:
    """x [N, D] in bfloat16 as [D, N] without gaps."""
    (num_rows, width), rows = x.shape, _as_rows(x)
    out = torch.empty((width, num_rows), dtype=x.dtype)
    num_blocks = -(-width // cpu_loops.SIDE)
    _by_rows(
        cpu_loops.transpose.of(BFLOAT16), num_blocks, num_rows * cpu_loops.SIDE, rows.data_ptr(), rows.stride(0),
        out.data_ptr(), num_rows, width,
    )  # fmt: skip
    return out


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """[.., D] as [N, D], the numbers of a row one after the other."""
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _like(x: torch.Tensor) -> torch.Tensor:
    """Empty, of its shape and type, without gaps."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _contiguous(tensors: Sequence[torch.Tensor | None] | None) -> tuple[Any, ...]:
    return () if tensors is None else tuple(None if each is None else each.contiguous() for each in tensors)


def _layout(start: int, places: tuple[Any, ...], turn: tuple[Any, ...]) -> tuple[Any, ...]:
    index, valid = (None if each is None else each.data_ptr() for each in places)
    cos, sin = (each.data_ptr() for each in turn) if turn else (None, None)
    return index, index is not None, start, valid, valid is not None, cos, sin, bool(turn)


def _by_rows(call: Call, num_rows: int, row_elements: int, *fixed: Any) -> None:
    """call(*fixed, first, last) over all rows."""
    _run(call, [(*fixed, *span) for span in _spans(num_rows, row_elements)])


def with_room(
    call: Call, num_rows: int, row_elements: int, room: int, before: tuple[Any, ...], after: tuple[Any, ...]
) -> None:
    """As `_by_rows`, with room for so many float32 between the arguments, for each thread its own."""
    spans = _spans(num_rows, row_elements)
    rooms = torch.empty((len(spans), room), dtype=torch.float32)
    _run(call, [(*before, own.data_ptr(), *after, *span) for own, span in zip(rooms, spans, strict=True)])


def _spans(num_rows: int, row_elements: int) -> list[tuple[int, int]]:
    """(first, last) rows of each thread."""
    number = min(torch.get_num_threads(), num_rows, num_rows * row_elements // MIN_SHARE_ELEMENTS)
    if number < 2:
        return [(0, num_rows)]
    ends = [num_rows * share // number for share in range(number + 1)]
    return list(pairwise(ends))


def run_together(
    loop: CompiledLoop, x: torch.Tensor, fixed: tuple[Any, ...], *, counter: torch.Tensor, num_threads: int
) -> None:
    """A loop for x's type on so many threads, (*fixed, its number, how many there are).

    They wait for each other by a counter, int64. One such call at a time: threads of two could wait for those that the
    other keeps from starting.
    """
    call = loop.of(TYPES[x.dtype])
    with _all_threads:
        counter.zero_()
        futures: list[Future[None]] = []
        try:
            for thread in range(1, num_threads):
                futures.append(_pool(num_threads - 1).submit(call, *fixed, thread, num_threads))
            call(*fixed, 0, num_threads)
        except BaseException:
            counter.fill_(_NOBODY_IS_AWAITED)
            raise
        finally:
            _wait_for_all(futures)
        for future in futures:
            future.result()


def _run(call: Call, calls: list[tuple[Any, ...]]) -> None:
    """The first on this thread, the others on threads of their own."""
    if len(calls) == 1:
        call(*calls[0])
        return
    futures: list[Future[None]] = []
    try:
        for arguments in calls[1:]:
            futures.append(_pool(torch.get_num_threads() - 1).submit(call, *arguments))
        call(*calls[0])
    finally:
        _wait_for_all(futures)
    for future in futures:
        future.result()


def _wait_for_all(futures: list[Future[None]]) -> None:
    """Whoever interrupts waits too: they write what the caller may give away."""
    interrupt = None
    while not all(future.done() for future in futures):
        try:
            wait(futures)
        except BaseException as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def _pool(number: int) -> ThreadPoolExecutor:
    """So many threads, which have all been started: a loop that waits for one that cannot start would wait for ever."""
    with _making_pool:
        if number not in _pools:
            pool, started = ThreadPoolExecutor(number, thread_name_prefix="rows"), threading.Barrier(number)
            try:
                for future in [pool.submit(started.wait) for _ in range(number)]:
                    future.result()
            except BaseException:
                started.abort()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            _pools[number] = pool
        return _pools[number]


def _after_fork() -> None:
    """Threads, and whoever held the lock, stay with the parent."""
    global _making_pool, _all_threads
    _pools.clear()
    _making_pool, _all_threads = threading.Lock(), threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
