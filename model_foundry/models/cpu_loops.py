"""What lies between a decoder's products, as compiled loops: one pass over memory where torch makes several.

Arithmetic is float32 and rounded once. A row's bits depend on that row alone, not on the rows beside it nor on their
number. Loops are of one thread and let others run; `fused` hands out the rows. They look where they are told.

A matrix is (its first number, from one row to the next). Places are unsigned, as LLVM wants them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from model_foundry.models.compiled_loop import IN_ORDER, loop, part
from model_foundry.models.lanes import turn_block
from model_foundry.models.primitives import as_float, as_int, fetch, floats, pointer_like, read, shorts, write

U = np.uint64


@part(flags=IN_ORDER)
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
    power = as_float(np.int32(np.int32(as_int(shifted) << np.int32(23)) + np.int32(127 << 23)))
    return np.float32(0.0) if x < np.float32(-87.0) else e * power


@part(flags=IN_ORDER)
def sigmoid(x: Any) -> Any:
    e = exp(-abs(x))
    return (e if x < np.float32(0.0) else np.float32(1.0)) / (np.float32(1.0) + e)


@part()
def largest_of(x: Any, begin: Any, count: Any) -> Any:
    """As integers in the order of the floats, which can be compared in lanes; what is no number is
    the largest, or the least where its sign is set."""
    most = np.int32(-2147483648)
    for j in range(count):
        bits = as_int(read(x, begin + j))
        most = max(most, np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))))
    return as_float(np.int32(most ^ ((most >> np.int32(31)) & np.int32(0x7FFFFFFF))))


@part()
def sum_of(x: Any, begin: Any, count: Any) -> Any:
    """Made apart from what writes: where arrays lie close together, a loop that does both goes another way, with
    another order of its sum."""
    total = np.float32(0.0)
    for j in range(count):
        total += read(x, begin + j)
    return total


@part()
def norm(x: Any, at: Any, weight: Any, eps: Any, out: Any, to: Any, width: Any) -> None:
    squares = np.float32(0.0)
    for j in range(U(width)):
        value = read(x, at + j)
        squares += value * value
    inverse = np.float32(1.0) / np.sqrt(squares / np.float32(width) + eps)
    for j in range(U(width)):
        write(out, to + j, read(x, at + j) * inverse * read(weight, j))


@loop("x*", "int", "w*", "float", "x*", "int")
def rms_norm(x: Any, x_step: int, weight: Any, eps: Any, out: Any, width: int, first: int, last: int) -> None:
    for row in range(first, last):
        norm(x, U(row * x_step), weight, eps, out, U(row * width), width)


@loop("x*", "int", "x*", "int", "x*", "int", "w*", "float", "x*", "int")
def add_rms_norm(
    x: Any, x_step: int, more: Any, more_step: int, total: Any, total_step: int, weight: Any, eps: Any, out: Any,
    width: int, first: int, last: int,
) -> None:  # fmt: skip
    """total = x + more, which may be x itself; then of that as `rms_norm`."""
    for row in range(first, last):
        at, of, to = U(row * x_step), U(row * more_step), U(row * total_step)
        for j in range(U(width)):
            write(total, to + j, read(x, at + j) + read(more, of + j))
        norm(total, to, weight, eps, out, U(row * width), width)


@loop("x*", "int", "w*", "float", "x*", "int", "x*", "int", "int", "x*", "float32*", "int", "int")
def rms_norm_backward(
    x: Any, x_step: int, weight: Any, eps: Any, grad: Any, grad_step: int, more: Any, more_step: int, with_more: int,
    dx: Any, d_weight: Any, weight_too: int, width: int, first: int, last: int,
) -> None:  # fmt: skip
    """The gradient of x, with `more` added if there is any. d_weight [width] is added to, where it is wanted."""
    for row in range(first, last):
        at, of, to = U(row * x_step), U(row * grad_step), U(row * width)
        squares, along = np.float32(0.0), np.float32(0.0)
        for j in range(U(width)):
            value = read(x, at + j)
            squares += value * value
            along += value * read(grad, of + j) * read(weight, j)
        inverse = np.float32(1.0) / np.sqrt(squares / np.float32(width) + eps)
        shared = along * inverse * inverse * inverse / np.float32(width)
        if with_more:
            also = U(row * more_step)
            for j in range(U(width)):
                change = read(grad, of + j) * read(weight, j) * inverse - read(x, at + j) * shared
                write(dx, to + j, change + read(more, also + j))
        else:
            for j in range(U(width)):
                write(dx, to + j, read(grad, of + j) * read(weight, j) * inverse - read(x, at + j) * shared)
        if weight_too:
            for j in range(U(width)):
                write(d_weight, j, read(d_weight, j) + read(grad, of + j) * read(x, at + j) * inverse)


@loop("x*", "int", "x*", "int", "x*", "int")
def gated_silu(
    gate: Any, gate_step: int, up: Any, up_step: int, out: Any, width: int, first: int, last: int
) -> None:  # fmt: skip
    for row in range(first, last):
        g, u, to = U(row * gate_step), U(row * up_step), U(row * width)
        for j in range(U(width)):
            value = read(gate, g + j)
            write(out, to + j, value * sigmoid(value) * read(up, u + j))


@loop("x*", "int", "x*", "int", "x*", "int", "x*", "x*", "int")
def gated_silu_backward(
    gate: Any, gate_step: int, up: Any, up_step: int, grad: Any, grad_step: int, d_gate: Any, d_up: Any, width: int,
    first: int, last: int,
) -> None:  # fmt: skip
    for row in range(first, last):
        g, u, of, to = U(row * gate_step), U(row * up_step), U(row * grad_step), U(row * width)
        for j in range(U(width)):
            value, change = read(gate, g + j), read(grad, of + j)
            s = sigmoid(value)
            slope = s * (np.float32(1.0) + value * (np.float32(1.0) - s))
            write(d_gate, to + j, change * read(up, u + j) * slope)
            write(d_up, to + j, change * value * s)


@part()
def turn(x: Any, at: Any, cos: Any, sin: Any, angle: Any, sign: Any, out: Any, to: Any, half: Any) -> None:
    """One head rotated (Su et al. 2021, the half-split layout), by `sign` this way or back."""
    for j in range(half):
        a, b = read(x, at + j), read(x, at + half + j)
        c, s = read(cos, angle + j), read(sin, angle + j) * sign
        write(out, to + j, a * c - b * s)
        write(out, to + half + j, b * c + a * s)


@part()
def copy(x: Any, at: Any, out: Any, to: Any, size: Any) -> None:
    for j in range(size):
        write(out, to + j, read(x, at + j))


_LAYOUT = ("int64*", "int", "int", "bool*", "int", "w*", "w*", "int", "x*", "int", "int", "int")


@loop("x*", "int", *_LAYOUT)
def to_heads(
    x: Any, x_step: int, index: Any, indexed: int, start: int, valid: Any, padded: int, cos: Any, sin: Any, turned: int,
    out: Any, num_heads: int, length: int, width: int, first: int, last: int,
) -> None:  # fmt: skip
    """Tokens [N, heads, width] laid out as [rows, heads, length, width]; `first` and `last` count (row, head).

    Place t of row s is token `index[s × length + t]`, not indexed `start + s × length + t`; padded, it is zero where it
    is not valid. Turned, it is rotated by cos and sin [N, width / 2].
    """
    half, size = U(width // 2), U(width)
    for block in range(first, last):
        row, head = block // num_heads, block % num_heads
        for t in range(length):
            place = row * length + t
            token = read(index, place) if indexed else start + place
            at, to = U(token * x_step + head * width), U((block * length + t) * width)
            if padded and not read(valid, place):
                for j in range(size):
                    write(out, to + j, np.float32(0.0))
            elif turned:
                turn(x, at, cos, sin, U(token) * half, np.float32(1.0), out, to, half)
            else:
                copy(x, at, out, to, size)


@loop("x*", *_LAYOUT)
def from_heads(
    x: Any, index: Any, indexed: int, start: int, valid: Any, padded: int, cos: Any, sin: Any, turned: int,
    out: Any, num_heads: int, length: int, width: int, first: int, last: int,
) -> None:  # fmt: skip
    """Back from `to_heads`, rotated the other way; places that are not valid are left behind."""
    half, size = U(width // 2), U(width)
    for block in range(first, last):
        row, head = block // num_heads, block % num_heads
        for t in range(length):
            place = row * length + t
            if padded and not read(valid, place):
                continue
            token = read(index, place) if indexed else start + place
            at, to = U((block * length + t) * width), U((token * num_heads + head) * width)
            if turned:
                turn(x, at, cos, sin, U(token) * half, np.float32(-1.0), out, to, half)
            else:
                copy(x, at, out, to, size)


@loop("x*", "int", "x*", "int", "x*", "int", "int64*", "x*", "x*", "x*", "x*", "int64*", "int", "int", "int", "int")
def turn_and_keep(
    q: Any, q_step: int, k: Any, k_step: int, v: Any, v_step: int, positions: Any, cos: Any, sin: Any, out: Any,
    cache: Any, places: Any, num_heads: int, num_kv: int, width: int, num_kept: int, first: int, last: int,
) -> None:  # fmt: skip
    """Queries rotated into `out` [N, heads, width]; of the first `num_kept` rows keys, rotated, and values are kept.

    cos and sin are tables [positions, width] of which the second half counts; key or value h of row n goes to row
    `places[n, h]` of the cache, values after keys.
    """
    half, size, one = U(width // 2), U(width), np.float32(1.0)
    for row in range(first, last):
        angle = U(read(positions, row) * width + width // 2)
        for head in range(num_heads):
            at, to = U(row * q_step + head * width), U((row * num_heads + head) * width)
            turn(q, at, cos, sin, angle, one, out, to, half)
        if row >= num_kept:
            continue
        for head in range(num_kv):
            to = U(read(places, row * 2 * num_kv + head) * width)
            turn(k, U(row * k_step + head * width), cos, sin, angle, one, cache, to, half)
            to = U(read(places, (row * 2 + 1) * num_kv + head) * width)
            copy(v, U(row * v_step + head * width), cache, to, size)


@loop("x*", "float32*", "float32*", "x*", "int", "int", "int")
def join_answers(
    outs: Any, sums: Any, total: Any, out: Any, num_levels: int, num_rows: int, width: int, first: int, last: int
) -> None:
    """Attention over several stretches of keys from that over each, [levels, rows, width], and its sums' logarithms.

    One after the other: how many the longest row has must not show in the others. total: room for [width].
    """
    for row in range(first, last):
        largest = read(sums, row)
        for level in range(1, num_levels):
            largest = max(largest, read(sums, level * num_rows + row))
        whole = np.float32(0.0)
        for j in range(U(width)):
            write(total, j, np.float32(0.0))
        for level in range(num_levels):
            share = exp(read(sums, level * num_rows + row) - largest)
            whole += share
            at = U((level * num_rows + row) * width)
            if share > np.float32(0.0):
                for j in range(U(width)):
                    write(total, j, read(total, j) + share * read(outs, at + j))
        for j in range(U(width)):
            write(out, U(row * width) + j, read(total, j) / whole)


@loop("x*", "float32*", "int", "int", "int", "int")
def causal_softmax(
    scores: Any, powers: Any, num_keys: int, num_queries: int, before: int, window: int, first: int, last: int
) -> None:
    """In place. Query q of each `num_queries` sees the keys up to `before` + q, the last `window` of them (0: all).

    powers: room for [num_keys].
    """
    for row in range(first, last):
        end = before + row % num_queries + 1
        begin = max(0, end - window) if window else 0
        at, seen = U(row * num_keys + begin), U(end - begin)
        largest = largest_of(scores, at, seen)
        for j in range(seen):
            write(powers, j, exp(read(scores, at + j) - largest))
        scale = np.float32(1.0) / sum_of(powers, U(0), seen)
        for j in range(U(begin)):
            write(scores, U(row * num_keys) + j, np.float32(0.0))
        for j in range(seen):
            write(scores, at + j, read(powers, j) * scale)
        for j in range(seen, U(num_keys - begin)):
            write(scores, at + j, np.float32(0.0))


@loop("x*", "x*", "int")
def softmax_backward(grad: Any, p: Any, num_keys: int, first: int, last: int) -> None:
    """The gradient of the scores over the gradient of the probabilities p."""
    for row in range(first, last):
        at = U(row * num_keys)
        along = np.float32(0.0)
        for j in range(U(num_keys)):
            along += read(grad, at + j) * read(p, at + j)
        for j in range(U(num_keys)):
            write(grad, at + j, read(p, at + j) * (read(grad, at + j) - along))


@loop("x*", "float32*", "int")
def log_normaliser(logits: Any, out: Any, width: int, first: int, last: int) -> None:
    """log Σ exp of each row: the largest, and the rest of it."""
    for row in range(first, last):
        at = U(row * width)
        largest = largest_of(logits, at, U(width))
        total = np.float32(0.0)
        for j in range(U(width)):
            total += exp(read(logits, at + j) - largest)
        write(out, 2 * row, largest)
        write(out, 2 * row + 1, np.log(total))


@loop("x*", "float32*", "int64*", "float32*", "float32*", "int", "int", flags=IN_ORDER)
def score_gradient(
    logits: Any, normaliser: Any, targets: Any, slopes: Any, chosen: Any, num_targets: int, width: int, first: int,
    last: int,
) -> None:  # fmt: skip
    """Over the logits: Σ_k slope_k (1 where j is target k - probability of j). Targets and slopes: [rows, targets].

    chosen: room for [targets].
    """
    for row in range(first, last):
        at, own = U(row * width), row * num_targets
        largest, rest = read(normaliser, 2 * row), read(normaliser, 2 * row + 1)
        total = np.float32(0.0)
        for k in range(num_targets):
            total += read(slopes, own + k)
            write(chosen, k, exp(read(logits, at + U(read(targets, own + k))) - largest - rest))
        for j in range(U(width)):
            write(logits, at + j, -total * exp(read(logits, at + j) - largest - rest))
        for k in range(num_targets):
            value = -total * read(chosen, k)
            for other in range(num_targets):
                if read(targets, own + other) == read(targets, own + k):
                    value += read(slopes, own + other)
            write(logits, at + U(read(targets, own + k)), value)


@loop("int64*", "float32*", "x*")
def write_scaled(places: Any, scales: Any, like: Any, first: int, last: int) -> None:
    """out = scale × x of each of many arrays. places: [arrays, 3], the addresses of x, float32, and of out, as `like`
    points to, and how many numbers there are."""
    for array in range(first, last):
        x, out = floats(read(places, 3 * array)), pointer_like(read(places, 3 * array + 1), like)
        scale = read(scales, array)
        for j in range(U(read(places, 3 * array + 2))):
            write(out, j, read(x, j) * scale)


SIDE = 32
"""Rows and columns of what is transposed at once."""


@loop("int", "int", "int", "int", "int")
def transpose(x: int, x_step: int, out: int, num_rows: int, num_columns: int, first: int, last: int) -> None:
    """out [columns, rows] from numbers of 16 bits [rows, columns]; `first` and `last` count blocks of SIDE columns."""
    numbers, found = shorts(x), shorts(out)
    for block in range(first, last):
        column = block * SIDE
        for row in range(0, num_rows, SIDE):
            if row + SIDE <= num_rows and column + SIDE <= num_columns:
                for ahead in range(SIDE):
                    fetch(numbers, (row + SIDE + ahead) * x_step + column)
                turn_block(numbers, row * x_step + column, x_step, found, column * num_rows + row, num_rows)
                continue
            for c in range(column, min(column + SIDE, num_columns)):
                for r in range(row, min(row + SIDE, num_rows)):
                    write(found, U(c * num_rows + r), read(numbers, U(r * x_step + c)))
