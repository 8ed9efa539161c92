"""Causal attention of packed rows by tiles of bfloat16: a head of a row is computed as a whole, in caches.

One loop forward, one backward; a unit of work is a row and a key/value head with all its query heads. Probabilities are
never kept: backward makes them again from the logarithm of their sum (Dao et al. 2022). Backward, scores stand
transposed, [key, query]: then what a tile product gives is what the next one takes.

Shapes: T tokens of a row, padded to a multiple of SIDE as P; W head width, padded likewise as D. What a product takes
from the left ("rows") is bfloat16 row by row, or in tiles of [16, 32] that lie one after the other. What it takes from
the right lies in panels of sixteen columns: [columns / 16, depth / 2, 16, 2], in pairs along the depth.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from model_foundry.models.compiled_loop import loop, part
from model_foundry.models.cpu_loops import copy, turn
from model_foundry.models.lanes import largest_in_lanes, powers, slopes_of_scores
from model_foundry.models.primitives import LINE_BYTES, fetch, floats, halves, pairs, read, shorts, write
from model_foundry.models.tiles import add_four, leave_tiles, load_four, shape_tiles, store_four, zero_four

U = np.uint64
SIDE, TILE, BLOCK_KEYS = 32, 512, 128
"""Rows and columns of a product; numbers of a tile; keys whose gradients of scores are kept at a time."""
AHEAD = 12
"""Tokens that are fetched before they are read."""
F, H = 4, 2
"""Bytes of a float32 and of a bfloat16."""


@part()
def padded(size: Any) -> Any:
    return (size + SIDE - 1) // SIDE * SIDE


@part()
def zeros(x: Any, at: Any, count: Any) -> None:
    for j in range(U(count)):
        write(x, U(at) + j, np.float32(0.0))


@part()
def product(
    rows: Any, at: Any, row_step: Any, next_rows: Any, next_depth: Any, panels: Any, begin: Any, next_panel: Any,
    steps: Any, out: Any, to: Any, out_step: Any, add: Any,
) -> None:  # fmt: skip
    """out [SIDE, SIDE] float32 = (or +=) rows × panels, over `steps` × 32 of depth. Steps count numbers."""
    if add:
        load_four(out, to, F * out_step, 16 * out_step)
    else:
        zero_four()
    for step in range(steps):
        add_four(rows, at + step * next_depth, H * row_step, next_rows, panels, begin + step * TILE, next_panel)
    store_four(out, to, F * out_step, 16 * out_step)


@part()
def take_heads(
    x: Any, start: Any, tokens: Any, x_step: Any, place: Any, cos: Any, sin: Any, turned: Any, width: Any, depth: Any,
    out: Any,
) -> None:  # fmt: skip
    """One head of a row's tokens as out [P, D] bfloat16, rotated if so asked; zeros where there is none."""
    half = U(width // 2)
    for t in range(tokens):
        token = start + t
        at, to = U(token * x_step + place), U(t * depth)
        for line in range(0, width, LINE_BYTES // H):
            fetch(x, (token + AHEAD) * x_step + place + line)
        if turned:
            turn(x, at, cos, sin, U(token) * half, np.float32(1.0), out, to, half)
        else:
            copy(x, at, out, to, U(width))
        if width < depth:
            zeros(out, t * depth + width, depth - width)
    zeros(out, tokens * depth, (padded(tokens) - tokens) * depth)


@part()
def panels_across(x: Any, size: Any, depth: Any, out: Any) -> None:
    """x [size, depth] as panels whose columns are its rows."""
    words, found, half = pairs(x), pairs(out), depth // 2
    for panel in range(size // 16):
        for j in range(half):
            for c in range(16):
                write(found, U((panel * half + j) * 16 + c), read(words, U((panel * 16 + c) * half + j)))


@part()
def panels_along(x: Any, size: Any, depth: Any, out: Any) -> None:
    """x [size, depth] as panels whose columns are its columns, and whose depth its rows."""
    numbers, found = shorts(x), shorts(out)
    for panel in range(depth // 16):
        for i in range(size // 2):
            at, to = U(2 * i * depth + panel * 16), U((panel * (size // 2) + i) * 32)
            for c in range(U(16)):
                write(found, to + U(2) * c, read(numbers, at + c))
                write(found, to + U(2) * c + U(1), read(numbers, at + U(depth) + c))


@part()
def tiles_across(x: Any, size: Any, depth: Any, out: Any) -> None:
    """x [size, depth] transposed, in tiles: [depth / 16, size / 32, 16, 32]."""
    numbers, found = shorts(x), shorts(out)
    for t in range(size // SIDE):
        for d in range(depth):
            at, to = U(t * SIDE * depth + d), U((d // 16 * (size // SIDE) + t) * TILE + d % 16 * 32)
            for c in range(U(SIDE)):
                write(found, to + c, read(numbers, at + c * U(depth)))


@part()
def first_key(query: Any, window: Any) -> Any:
    return max(0, query - window + 1) if window else 0


@part()
def hide(x: Any, at: Any, begin: Any, end: Any, count: Any) -> None:
    """Scores that are not in [begin, end)."""
    least = np.float32(-np.inf)
    for j in range(U(max(0, min(begin, count)))):
        write(x, U(at) + j, least)
    for j in range(U(max(0, end)), U(count)):
        write(x, U(at) + j, least)


@part()
def weigh(
    scores: Any, count: Any, base: Any, query: Any, tokens: Any, window: Any, sums: Any, of: Any, out: Any, to: Any
) -> Any:  # fmt: skip
    """One query's e^(score - largest) over keys from `base` on, into its row of tiles; their sum."""
    if query >= tokens:
        for tile in range(count // SIDE):
            zeros(out, to + tile * TILE, SIDE)
        return np.float32(1.0)
    hide(scores, 0, first_key(query, window) - base, query + 1 - base, count)
    largest = largest_in_lanes(scores, 0, count)
    total = powers(scores, 0, count, largest, out, to, TILE)
    write(sums, of, largest + np.log(total))
    return total


@loop(
    "x*", "int", "x*", "int", "x*", "int", "int64*", "w*", "w*", "w*", "w*", "x*", "float32*", "int", "int", "int",
    "int", "int", "int", "int",
)  # fmt: skip
def attend(
    q: Any, q_step: int, k: Any, k_step: int, v: Any, v_step: int, rows: Any, cos: Any, sin: Any, key_cos: Any,
    key_sin: Any, out: Any, sums: Any, room: int, shapes: int, most: int, num_heads: int, num_kv: int, width: int,
    window: int, first: int, last: int,
) -> None:  # fmt: skip
    """out [N, H, W] and the logarithms of the sums [N, H]. rows [R, 2]: first token, tokens; at most `most`, padded.

    room: for as many bytes as `room_forward` says.
    """
    depth, group = padded(width), num_heads // num_kv
    whole = most * depth * H
    natural, keys, values = room, room + whole, room + 2 * whole
    scores, weights = room + 3 * whole, room + 3 * whole + SIDE * most * F
    found = weights + SIDE * most * H
    shape_tiles(shapes)
    for unit in range(first, last):
        row, kv = unit // num_kv, unit % num_kv
        start, tokens = read(rows, 2 * row), read(rows, 2 * row + 1)
        size = padded(tokens)
        take_heads(k, start, tokens, k_step, kv * width, key_cos, key_sin, True, width, depth, halves(natural))
        panels_across(natural, size, depth, keys)
        take_heads(v, start, tokens, v_step, kv * width, key_cos, key_sin, False, width, depth, halves(natural))
        panels_along(natural, size, depth, values)
        for head in range(kv * group, (kv + 1) * group):
            take_heads(q, start, tokens, q_step, head * width, cos, sin, True, width, depth, halves(natural))
            for query in range(0, size, SIDE):
                base = first_key(query, window) // SIDE * SIDE
                end = query + SIDE
                count = end - base
                for key in range(base, end, SIDE):
                    product(
                        halves(natural), query * depth, depth, 16 * depth, 32, halves(keys), key * depth, 16 * depth,
                        depth // 32, floats(scores), key - base, count, False,
                    )  # fmt: skip
                for r in range(SIDE):
                    own = scores + r * count * F
                    of = (start + query + r) * num_heads + head
                    to = r // 16 * (count // 32) * TILE + r % 16 * 32
                    total = weigh(
                        floats(own), count, base, query + r, tokens, window, sums, of, halves(weights), to
                    )  # fmt: skip
                    write(floats(found), SIDE * depth + r, total)
                for d in range(0, depth, SIDE):
                    product(
                        halves(weights), 0, 32, count // 32 * TILE, TILE, halves(values), d * size + base * 16,
                        size * 16, count // 32, floats(found), d, depth, False,
                    )  # fmt: skip
                for r in range(min(SIDE, tokens - query)):
                    scale = np.float32(1.0) / read(floats(found), SIDE * depth + r)
                    at, to = U(r * depth), U(((start + query + r) * num_heads + head) * width)
                    for j in range(U(width)):
                        write(out, to + j, read(floats(found), at + j) * scale)
    leave_tiles()


@part()
def score_slopes(
    scores: Any, slopes: Any, key: Any, query: Any, tokens: Any, window: Any, sums: Any, along: Any, p: Any, ds: Any,
    to: Any, next_rows: Any, panels: Any, place: Any, next_panel: Any,
) -> None:  # fmt: skip
    """Of [SIDE keys, SIDE queries]: from scores and the gradients of probabilities the latter and those of scores."""
    if query < key + SIDE or query + SIDE > tokens or (window and query + SIDE > key + window):
        for r in range(SIDE):
            end = (min(tokens, key + r + window) if window else tokens) - query
            hide(scores, r * SIDE, key + r - query, end, SIDE)
    for r in range(0, SIDE, 2):
        slopes_of_scores(
            scores, slopes, r * SIDE, sums, along, query, p, ds, to + r // 16 * next_rows + r % 16 * 32,
            panels, place + r * 16, next_panel,
        )  # fmt: skip


@part()
def put_turned(
    x: Any, at: Any, cos: Any, sin: Any, token: Any, width: Any, out: Any, to: Any
) -> None:  # fmt: skip
    """A float32 row, turned back."""
    half = U(width // 2)
    turn(x, U(at), cos, sin, U(token) * half, np.float32(-1.0), out, U(to), half)


@loop(
    "x*", "int", "x*", "int", "x*", "int", "x*", "x*", "float32*", "int64*", "w*", "w*", "w*", "w*", "x*", "x*", "x*",
    "int", "int", "int", "int", "int", "int", "int",
)  # fmt: skip
def attend_backward(
    q: Any, q_step: int, k: Any, k_step: int, v: Any, v_step: int, out: Any, grad: Any, sums: Any, rows: Any, cos: Any,
    sin: Any, key_cos: Any, key_sin: Any, dq: Any, dk: Any, dv: Any, room: int, shapes: int, most: int, num_heads: int,
    num_kv: int, width: int, window: int, first: int, last: int,
) -> None:  # fmt: skip
    """The gradients dq, dk, dv [N, heads, W] from that of `out`; the rest as `attend`, whose out and sums are given."""
    depth, group = padded(width), num_heads // num_kv
    whole = most * depth * H
    keys, values, keys_across = room, room + whole, room + 2 * whole
    queries, queries_across, queries_along = room + 3 * whole, room + 4 * whole, room + 5 * whole
    grads_across, grads_along = room + 6 * whole, room + 7 * whole
    d_keys, d_values, d_queries = room + 8 * whole, room + 10 * whole, room + 12 * whole
    strips = BLOCK_KEYS * most * H
    p, ds, ds_panels = room + 14 * whole, room + 14 * whole + strips, room + 14 * whole + 2 * strips
    scores = ds_panels + strips
    slopes, own_sums = scores + SIDE * SIDE * F, scores + 2 * SIDE * SIDE * F
    along = own_sums + most * F
    shape_tiles(shapes)
    for unit in range(first, last):
        row, kv = unit // num_kv, unit % num_kv
        start, tokens = read(rows, 2 * row), read(rows, 2 * row + 1)
        size = padded(tokens)
        take_heads(k, start, tokens, k_step, kv * width, key_cos, key_sin, True, width, depth, halves(keys))
        take_heads(v, start, tokens, v_step, kv * width, key_cos, key_sin, False, width, depth, halves(values))
        tiles_across(keys, size, depth, keys_across)
        zeros(floats(d_keys), 0, size * depth)
        zeros(floats(d_values), 0, size * depth)
        for head in range(kv * group, (kv + 1) * group):
            take_heads(q, start, tokens, q_step, head * width, cos, sin, True, width, depth, halves(queries))
            panels_across(queries, size, depth, queries_across)
            panels_along(queries, size, depth, queries_along)
            take_heads(
                grad, start, tokens, num_heads * width, head * width, cos, sin, False, width, depth, halves(queries)
            )
            panels_across(queries, size, depth, grads_across)
            panels_along(queries, size, depth, grads_along)
            zeros(floats(d_queries), 0, size * depth)
            for t in range(size):
                dot, logarithm = np.float32(0.0), np.float32(0.0)
                if t < tokens:
                    of = (start + t) * num_heads + head
                    for line in range(0, width, LINE_BYTES // H):
                        fetch(out, (of + AHEAD * num_heads) * width + line)
                    logarithm = read(sums, of)
                    for j in range(U(width)):
                        dot += read(out, U(of * width) + j) * read(grad, U(of * width) + j)
                write(floats(own_sums), t, logarithm)
                write(floats(along), t, dot)
            for block in range(0, size, BLOCK_KEYS):
                block_end = min(size, block + BLOCK_KEYS)
                for key in range(block, block_end, SIDE):
                    end = min(size, padded(key + SIDE - 1 + window)) if window else size
                    strip = (key - block) // 16 * (size // 32) * TILE
                    for query in range(key, end, SIDE):
                        product(
                            halves(keys), key * depth, depth, 16 * depth, 32, halves(queries_across), query * depth,
                            16 * depth, depth // 32, floats(scores), 0, SIDE, False,
                        )  # fmt: skip
                        product(
                            halves(values), key * depth, depth, 16 * depth, 32, halves(grads_across), query * depth,
                            16 * depth, depth // 32, floats(slopes), 0, SIDE, False,
                        )  # fmt: skip
                        score_slopes(
                            floats(scores), floats(slopes), key, query, tokens, window, floats(own_sums),
                            floats(along), halves(p), halves(ds), strip + query // 32 * TILE, size // 32 * TILE,
                            halves(ds_panels), query * BLOCK_KEYS + (key - block) * 16, BLOCK_KEYS * 16,
                        )  # fmt: skip
                    steps, at = (end - key) // 32, strip + key // 32 * TILE
                    for d in range(0, depth, SIDE):
                        product(
                            halves(p), at, 32, size // 32 * TILE, TILE, halves(grads_along), d * size + key * 16,
                            size * 16, steps, floats(d_values), key * depth + d, depth, True,
                        )  # fmt: skip
                        product(
                            halves(ds), at, 32, size // 32 * TILE, TILE, halves(queries_along), d * size + key * 16,
                            size * 16, steps, floats(d_keys), key * depth + d, depth, True,
                        )  # fmt: skip
                reach = min(size, padded(block_end - 1 + window)) if window else size
                for query in range(block, reach, SIDE):
                    begin = max(block, first_key(query, window) // SIDE * SIDE)
                    steps = (min(block_end, query + SIDE) - begin) // SIDE
                    for d in range(0, depth, SIDE):
                        product(
                            halves(keys_across), (d // 16 * (size // 32) + begin // 32) * TILE, 32,
                            size // 32 * TILE, TILE, halves(ds_panels), query * BLOCK_KEYS + (begin - block) * 16,
                            BLOCK_KEYS * 16, steps, floats(d_queries), query * depth + d * 32, 32, True,
                        )  # fmt: skip
            for t in range(tokens):
                at = t // SIDE * SIDE * depth + t % SIDE
                for j in range(width):
                    write(floats(scores), j, read(floats(d_queries), at + j * SIDE))
                put_turned(
                    floats(scores), 0, cos, sin, start + t, width, dq, ((start + t) * num_heads + head) * width
                )
        for t in range(tokens):
            to = ((start + t) * num_kv + kv) * width
            put_turned(floats(d_keys), t * depth, key_cos, key_sin, start + t, width, dk, to)
            copy(floats(d_values), U(t * depth), dv, U(to), U(width))
    leave_tiles()


def room_forward(tokens: int, width: int) -> int:
    """Bytes that a thread of `attend` needs for rows of up to so many tokens."""
    size, depth = -(-tokens // SIDE) * SIDE, -(-width // SIDE) * SIDE
    return 3 * size * depth * H + SIDE * size * (F + H) + SIDE * (depth + 1) * F


def room_backward(tokens: int, width: int) -> int:
    """As `room_forward`, of `attend_backward`."""
    size, depth = -(-tokens // SIDE) * SIDE, -(-width // SIDE) * SIDE
    return 14 * size * depth * H + 3 * BLOCK_KEYS * size * H + 2 * (SIDE * SIDE + size) * F
