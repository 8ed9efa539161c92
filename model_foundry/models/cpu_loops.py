"""What lies between a decoder's products, as compiled loops over plain memory: one pass where torch makes several.

Numba compiles each for the types it meets (bfloat16 as its bits, float32) and keeps the machine code beside the source.
Arithmetic is float32 and rounded once. A row's bits depend on that row alone, not on the rows beside it nor on their
number. Loops are of one thread and let others run; `fused` hands out the rows. They know no tensors.

Arrays are flat; a matrix is (its numbers, from one row to the next), and rows go from `first` to `last`. Places are
unsigned: an index that might be negative is looked at each time, and nothing is done in lanes then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

REORDERED = {"reassoc", "contract", "nsz"}
"""What sums may be: taken apart into lanes. Not that numbers are finite: what is no number has to come out as such."""
U = np.uint64
_FLOAT, _BITS, _HALF = ir.FloatType(), ir.IntType(32), ir.IntType(16)


def _loop(fastmath: set[str]) -> Callable[[Callable[..., Any]], Any]:
    def compiled(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(fastmath=fastmath, nogil=True, cache=True, error_model="numpy")(function)
        except RuntimeError:  # no folder to write to: it is compiled in each process
            return numba.njit(fastmath=fastmath, nogil=True, error_model="numpy")(function)

    return compiled


def _inlined(function: Callable[..., Any]) -> Any:
    return intrinsic(function)


def _bits(number: int) -> ir.Constant:
    return ir.Constant(_BITS, number)


@_inlined
def widen(typing: Any, value: Any) -> Any:
    """float32 of a number as it lies in memory."""
    if value == types.float32:
        return types.float32(value), lambda context, builder, signature, args: args[0]

    def of_bfloat16(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.shl(builder.zext(args[0], _BITS), _bits(16)), _FLOAT)

    return types.float32(types.uint16), of_bfloat16


@_inlined
def narrow(typing: Any, value: Any, array: Any) -> Any:
    """A float32 as numbers of this array lie in memory; to bfloat16 by rounding to nearest, ties to even."""
    if array.dtype == types.float32:
        return types.float32(types.float32, array), lambda context, builder, signature, args: args[0]

    def to_bfloat16(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], _BITS)
        odd = builder.and_(builder.lshr(bits, _bits(16)), _bits(1))
        rounded = builder.lshr(builder.add(bits, builder.add(odd, _bits(0x7FFF))), _bits(16))
        # Rounding would carry what is no number over into one.
        nan = builder.fcmp_unordered("uno", args[0], args[0])
        return builder.trunc(builder.select(nan, _bits(0x7FC0), rounded), _HALF)

    return types.uint16(types.float32, array), to_bfloat16


@_inlined
def _as_int(typing: Any, value: Any) -> Any:
    return types.int32(types.float32), lambda context, builder, signature, args: builder.bitcast(args[0], _BITS)


@_inlined
def _as_float(typing: Any, value: Any) -> Any:
    return types.float32(types.int32), lambda context, builder, signature, args: builder.bitcast(args[0], _FLOAT)


@_loop({"contract"})
def exp(x: Any) -> Any:
    """e^x of a float32 that is not above 0, within 2 in the last place; 0 from -87 down.

    By x = n ln 2 + r and the polynomial of Cephes' expf (Moshier 1989) for e^r.
    """
    y = np.float32(-87.0) if x < np.float32(-87.0) else x
    shifted = y * np.float32(1.44269504088896341) + np.float32(12582912.0)  # n stands in its lowest bits
    n = shifted - np.float32(12582912.0)
    r = y - n * np.float32(0.693359375)
    r = r - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    e = p * r * r + r + np.float32(1.0)
    power = _as_float(np.int32(np.int32(_as_int(shifted) << np.int32(23)) + np.int32(127 << 23)))
    return np.float32(0.0) if x < np.float32(-87.0) else e * power


@_loop({"contract"})
def sigmoid(x: Any) -> Any:
    e = exp(-abs(x))
    return (e if x < np.float32(0.0) else np.float32(1.0)) / (np.float32(1.0) + e)


@_loop(REORDERED)
def _largest(x: Any, begin: Any, count: Any) -> Any:
    """As integers in the order of the floats, which can be compared in lanes; what is no number is the largest."""
    most = np.int32(-2147483648)
    for j in range(count):
        bits = _as_int(widen(x[begin + j]))
        most = max(most, np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))))
    return _as_float(np.int32(most ^ ((most >> np.int32(31)) & np.int32(0x7FFFFFFF))))


@_loop(REORDERED)
def rms_norm(x: Any, x_step: int, weight: Any, eps: Any, out: Any, width: int, first: int, last: int) -> None:
    for row in range(first, last):
        at, to = U(row * x_step), U(row * width)
        squares = np.float32(0.0)
        for j in range(U(width)):
            value = widen(x[at + j])
            squares += value * value
        inverse = np.float32(1.0) / np.sqrt(squares / np.float32(width) + eps)
        for j in range(U(width)):
            out[to + j] = narrow(widen(x[at + j]) * inverse * widen(weight[j]), out)


@_loop(REORDERED)
def add_rms_norm(
    x: Any, x_step: int, more: Any, more_step: int, weight: Any, eps: Any, out: Any, width: int, first: int, last: int
) -> None:
    """x += more, then as `rms_norm`."""
    for row in range(first, last):
        at, of = U(row * x_step), U(row * more_step)
        for j in range(U(width)):
            x[at + j] = narrow(widen(x[at + j]) + widen(more[of + j]), x)
    rms_norm(x, x_step, weight, eps, out, width, first, last)


@_loop(REORDERED)
def rms_norm_backward(
    x: Any, x_step: int, weight: Any, eps: Any, grad: Any, grad_step: int, dx: Any, d_weight: Any, width: int,
    first: int, last: int,
) -> None:  # fmt: skip
    """d_weight [width] float32 is added to; empty where nobody wants it."""
    wanted = d_weight.shape[0] > 0
    for row in range(first, last):
        at, of, to = U(row * x_step), U(row * grad_step), U(row * width)
        squares, along = np.float32(0.0), np.float32(0.0)
        for j in range(U(width)):
            value = widen(x[at + j])
            squares += value * value
            along += value * widen(grad[of + j]) * widen(weight[j])
        inverse = np.float32(1.0) / np.sqrt(squares / np.float32(width) + eps)
        shared = along * inverse * inverse * inverse / np.float32(width)
        for j in range(U(width)):
            dx[to + j] = narrow(widen(grad[of + j]) * widen(weight[j]) * inverse - widen(x[at + j]) * shared, dx)
        if wanted:
            for j in range(U(width)):
                d_weight[j] += widen(grad[of + j]) * widen(x[at + j]) * inverse


@_loop(REORDERED)
def gated_silu(
    gate: Any, gate_step: int, up: Any, up_step: int, out: Any, width: int, first: int, last: int
) -> None:  # fmt: skip
    for row in range(first, last):
        g, u, to = U(row * gate_step), U(row * up_step), U(row * width)
        for j in range(U(width)):
            value = widen(gate[g + j])
            out[to + j] = narrow(value * sigmoid(value) * widen(up[u + j]), out)


@_loop(REORDERED)
def gated_silu_backward(
    gate: Any, gate_step: int, up: Any, up_step: int, grad: Any, grad_step: int, d_gate: Any, d_up: Any, width: int,
    first: int, last: int,
) -> None:  # fmt: skip
    for row in range(first, last):
        g, u, of, to = U(row * gate_step), U(row * up_step), U(row * grad_step), U(row * width)
        for j in range(U(width)):
            value, change = widen(gate[g + j]), widen(grad[of + j])
            s = sigmoid(value)
            slope = s * (np.float32(1.0) + value * (np.float32(1.0) - s))
            d_gate[to + j] = narrow(change * widen(up[u + j]) * slope, d_gate)
            d_up[to + j] = narrow(change * value * s, d_up)


@_loop(REORDERED)
def _turn(x: Any, at: Any, cos: Any, sin: Any, angle: Any, sign: Any, out: Any, to: Any, half: Any) -> None:
    """One head rotated (Su et al. 2021, the half-split layout), by `sign` this way or back."""
    for j in range(half):
        a, b = widen(x[at + j]), widen(x[at + half + j])
        c, s = widen(cos[angle + j]), widen(sin[angle + j]) * sign
        out[to + j] = narrow(a * c - b * s, out)
        out[to + half + j] = narrow(b * c + a * s, out)


@_loop(REORDERED)
def to_heads(
    x: Any, x_step: int, index: Any, start: int, valid: Any, cos: Any, sin: Any, out: Any, num_heads: int, length: int,
    width: int, first: int, last: int,
) -> None:  # fmt: skip
    """Tokens [N, heads, width] laid out as [rows, heads, length, width]; `first` and `last` count (row, head).

    Place t of row s is token `index[s × length + t]`, without an index `start + s × length + t`; where `valid` is false
    it is zero. Rotated by cos and sin [N, width / 2] where they are not empty.
    """
    half, size = U(width // 2), U(width)
    for part in range(first, last):
        row, head = part // num_heads, part % num_heads
        for t in range(length):
            place = row * length + t
            token = index[place] if index.shape[0] else start + place
            at, to = U(token * x_step + head * width), U((part * length + t) * width)
            if valid.shape[0] and not valid[place]:
                for j in range(size):
                    out[to + j] = narrow(np.float32(0.0), out)
            elif cos.shape[0]:
                _turn(x, at, cos, sin, U(token) * half, np.float32(1.0), out, to, half)
            else:
                for j in range(size):
                    out[to + j] = x[at + j]


@_loop(REORDERED)
def from_heads(
    x: Any, index: Any, start: int, valid: Any, cos: Any, sin: Any, out: Any, num_heads: int, length: int,
    width: int, first: int, last: int,
) -> None:  # fmt: skip
    """Back from `to_heads`, rotated the other way; places that are not valid are left behind."""
    half, size = U(width // 2), U(width)
    for part in range(first, last):
        row, head = part // num_heads, part % num_heads
        for t in range(length):
            place = row * length + t
            if valid.shape[0] and not valid[place]:
                continue
            token = index[place] if index.shape[0] else start + place
            at, to = U((part * length + t) * width), U((token * num_heads + head) * width)
            if cos.shape[0]:
                _turn(x, at, cos, sin, U(token) * half, np.float32(-1.0), out, to, half)
            else:
                for j in range(size):
                    out[to + j] = x[at + j]


@_loop(REORDERED)
def turn_and_keep(
    q: Any, q_step: int, k: Any, k_step: int, v: Any, v_step: int, positions: Any, cos: Any, sin: Any, out: Any,
    cache: Any, places: Any, num_heads: int, num_kv: int, width: int, num_kept: int, first: int, last: int,
) -> None:  # fmt: skip
    """Queries rotated into `out` [N, heads, width]; rotated keys and values into the cache, of the first `num_kept` rows.

    cos and sin are tables [positions, width] of which the second half counts; key or value h of row n goes to row
    `places[n, h]` of the cache, values after keys.
    """
    half, size = U(width // 2), U(width)
    for row in range(first, last):
        angle = U(positions[row] * width + width // 2)
        for head in range(num_heads):
            at, to = U(row * q_step + head * width), U((row * num_heads + head) * width)
            _turn(q, at, cos, sin, angle, np.float32(1.0), out, to, half)
        if row >= num_kept:
            continue
        for head in range(num_kv):
            to = U(places[row * 2 * num_kv + head] * width)
            _turn(k, U(row * k_step + head * width), cos, sin, angle, np.float32(1.0), cache, to, half)
            at, to = U(row * v_step + head * width), U(places[(row * 2 + 1) * num_kv + head] * width)
            for j in range(size):
                cache[to + j] = v[at + j]


@_loop(REORDERED)
def join_answers(
    outs: Any, sums: Any, out: Any, num_levels: int, num_rows: int, width: int, first: int, last: int
) -> None:
    """Attention over several stretches of keys from that over each, [levels, rows, width], and its sums' logarithms.

    One after the other: how many the longest row has must not show in the others.
    """
    total = np.empty(width, np.float32)
    for row in range(first, last):
        largest = sums[row]
        for level in range(1, num_levels):
            largest = max(largest, sums[level * num_rows + row])
        total[:] = np.float32(0.0)
        whole = np.float32(0.0)
        for level in range(num_levels):
            share = exp(sums[level * num_rows + row] - largest)
            whole += share
            at = U((level * num_rows + row) * width)
            if share > np.float32(0.0):
                for j in range(U(width)):
                    total[j] += share * widen(outs[at + j])
        to = U(row * width)
        for j in range(U(width)):
            out[to + j] = narrow(total[j] / whole, out)


@_loop(REORDERED)
def causal_softmax(
    scores: Any, num_keys: int, num_queries: int, before: int, window: int, first: int, last: int
) -> None:
    """In place. Query q of each `num_queries` sees the keys up to `before` + q, the last `window` of them (0: all)."""
    powers = np.empty(num_keys, np.float32)
    for row in range(first, last):
        end = before + row % num_queries + 1
        begin = max(0, end - window) if window else 0
        at, seen = U(row * num_keys + begin), U(end - begin)
        largest = _largest(scores, at, seen)
        total = np.float32(0.0)
        for j in range(seen):
            power = exp(widen(scores[at + j]) - largest)
            powers[j] = power
            total += power
        scale = np.float32(1.0) / total
        for j in range(U(begin)):
            scores[U(row * num_keys) + j] = narrow(np.float32(0.0), scores)
        for j in range(seen):
            scores[at + j] = narrow(powers[j] * scale, scores)
        for j in range(seen, U(num_keys - begin)):
            scores[at + j] = narrow(np.float32(0.0), scores)


@_loop(REORDERED)
def softmax_backward(grad: Any, p: Any, num_keys: int, first: int, last: int) -> None:
    """The gradient of the scores over the gradient of the probabilities p."""
    for row in range(first, last):
        at = U(row * num_keys)
        along = np.float32(0.0)
        for j in range(U(num_keys)):
            along += widen(grad[at + j]) * widen(p[at + j])
        for j in range(U(num_keys)):
            grad[at + j] = narrow(widen(p[at + j]) * (widen(grad[at + j]) - along), grad)


@_loop(REORDERED)
def log_normaliser(logits: Any, out: Any, width: int, first: int, last: int) -> None:
    """log Σ exp of each row."""
    for row in range(first, last):
        at = U(row * width)
        largest = _largest(logits, at, U(width))
        total = np.float32(0.0)
        for j in range(U(width)):
            total += exp(widen(logits[at + j]) - largest)
        out[row] = largest + np.log(total)


@_loop(REORDERED)
def score_gradient(
    logits: Any, normaliser: Any, targets: Any, slopes: Any, num_targets: int, width: int, first: int, last: int
) -> None:
    """Over the logits: Σ_k slope_k (1 where j is target k - probability of j). Targets and slopes: [rows, targets]."""
    chosen = np.empty(num_targets, np.float32)
    for row in range(first, last):
        at, own, level = U(row * width), row * num_targets, normaliser[row]
        total = np.float32(0.0)
        for k in range(num_targets):
            total += slopes[own + k]
            chosen[k] = exp(widen(logits[at + U(targets[own + k])]) - level)
        for j in range(U(width)):
            logits[at + j] = narrow(-total * exp(widen(logits[at + j]) - level), logits)
        for k in range(num_targets):
            value = -total * chosen[k]
            for other in range(num_targets):
                if targets[own + other] == targets[own + k]:
                    value += slopes[own + other]
            logits[at + U(targets[own + k])] = narrow(value, logits)
