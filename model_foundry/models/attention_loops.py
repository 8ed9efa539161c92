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
from model_foundry.models.lanes import largest_in_lanes, pair_rows, powers, slopes_of_scores, turn_block
from model_foundry.models.primitives import LINE_BYTES, fetch, floats, halves, pairs, read, shorts, write
from model_foundry.models.small_products import SIDE, TILE, end_products, square, start_products

U = np.uint64
BLOCK_KEYS = 128
"""Keys whose gradients of scores are kept at a time."""
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
    half = depth // 2
    for panel in range(size // 16):
        for j in range(0, half, 16):
            turn_block(pairs(x), panel * 16 * half + j, half, pairs(out), (panel * half + j) * 16, 16)


@part()
def panels_along(x: Any, size: Any, depth: Any, out: Any) -> None:
    """x [size, depth] as panels whose columns are its columns, and whose depth its rows."""
    for panel in range(depth // 16):
        for i in range(size // 2):
            pair_rows(shorts(x), 2 * i * depth + panel * 16, depth, shorts(out), (panel * (size // 2) + i) * 32)


@part()
def tiles_across(x: Any, size: Any, depth: Any, out: Any) -> None:
    """x [size, depth] transposed, in tiles two by two: [depth / 32, size / 32, 32, 32]."""
    for d in range(0, depth, SIDE):
        for t in range(0, size, SIDE):
            to = (d // SIDE * (size // SIDE) + t // SIDE) * 2 * TILE
            turn_block(shorts(x), t * depth + d, depth, shorts(out), to, SIDE)


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
    scores: Any, count: Any, base: Any, query: Any, tokens: Any, window: Any, scale: Any, out: Any, to: Any
) -> Any:  # fmt: skip
    """One query's e^(scale (score - largest)) over keys from `base` on, into its row of tiles: their sum, its logarithm
    with the largest in it."""
    if query >= tokens:
        for tile in range(count // SIDE):
            zeros(out, to + tile * TILE, SIDE)
        return np.float32(1.0), np.float32(0.0)
    hide(scores, 0, first_key(query, window) - base, query + 1 - base, count)
    largest = largest_in_lanes(scores, 0, count)
    total = powers(scores, 0, count, largest, scale, out, to, TILE)
    return total, largest * scale + np.log(total)


@part()
def answer(
    queries: Any, at: Any, keys: Any, values: Any, size: Any, first: Any, depth: Any, base: Any, query: Any,
    tokens: Any, window: Any, scale: Any, scores: Any, weights: Any, found: Any,
) -> None:  # fmt: skip
    """What SIDE queries from `query` on find, [SIDE, D] float32; then what to divide it by; then that one's logarithms.

    keys, values: panels of `size` keys, the first of which is `first`; those from `base` on are looked at.
    """
    count = min(padded(query + SIDE), first + size) - base
    for key in range(0, count, SIDE):
        square(
            halves(queries), at, depth, 16 * depth, 32, halves(keys), (base - first + key) * depth, 16 * depth,
            depth // 32, floats(scores), key, count, False,
        )  # fmt: skip
    for r in range(SIDE):
        to = r // 16 * (count // 32) * TILE + r % 16 * 32
        own = floats(scores + r * count * F)
        total, logarithm = weigh(own, count, base, query + r, tokens, window, scale, halves(weights), to)
        write(floats(found), SIDE * depth + r, total)
        write(floats(found), SIDE * depth + SIDE + r, logarithm)
    for d in range(0, depth, SIDE):
        square(
            halves(weights), 0, 32, count // 32 * TILE, TILE, halves(values), d * size + (base - first) * 16,
            size * 16, count // 32, floats(found), d, depth, False,
        )  # fmt: skip


@part()
def places_forward(room: Any, most: Any, depth: Any) -> Any:
    """Places in the room of a forward pass: heads row by row, keys and values in panels; scores of SIDE queries, their
    powers in tiles, and what `answer` finds."""
    whole = most * depth * H
    scores = room + 3 * whole
    weights = scores + SIDE * most * F
    return room, room + whole, room + 2 * whole, scores, weights, weights + SIDE * most * H


@part()
def put_answers(found: Any, num_rows: Any, depth: Any, width: Any, out: Any, to: Any, step: Any) -> None:
    for r in range(min(SIDE, num_rows)):
        share = np.float32(1.0) / read(found, SIDE * depth + r)
        for j in range(U(width)):
            write(out, U(to + r * step) + j, read(found, U(r * depth) + j) * share)


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
    natural, keys, values, scores, weights, found = places_forward(room, most, depth)
    start_products(shapes)
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
                answer(
                    natural, query * depth, keys, values, size, 0, depth, base, query, tokens, window,
                    np.float32(1.0), scores, weights, found,
                )  # fmt: skip
                to = (start + query) * num_heads + head
                put_answers(floats(found), tokens - query, depth, width, out, to * width, num_heads * width)
                for r in range(min(SIDE, tokens - query)):
                    write(sums, to + r * num_heads, read(floats(found), SIDE * depth + SIDE + r))
    end_products()


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


(
    KEYS, VALUES, KEYS_ACROSS, QUERIES, QUERIES_ACROSS, QUERIES_ALONG, GRADS_ACROSS, GRADS_ALONG, D_KEYS, D_VALUES,
    D_QUERIES, P, DS, DS_PANELS, SCORES, SLOPES, SUMS, ALONG,
) = range(18)  # fmt: skip
"""Places in the room of a backward pass, of a row: bfloat16 [P, D] eight times, float32 [P, D] three times, strips of
BLOCK_KEYS keys three times, two squares, and two numbers a token."""


@part()
def places_backward(room: Any, most: Any, depth: Any) -> Any:
    whole, strip, square = most * depth * H, BLOCK_KEYS * most * H, SIDE * SIDE * F
    sums, strips = room + 8 * whole, room + 14 * whole
    squares = strips + 3 * strip
    return (
        room, room + whole, room + 2 * whole, room + 3 * whole, room + 4 * whole, room + 5 * whole, room + 6 * whole,
        room + 7 * whole, sums, sums + 2 * whole, sums + 4 * whole, strips, strips + strip, strips + 2 * strip,
        squares, squares + square, squares + 2 * square, squares + 2 * square + most * F,
    )  # fmt: skip


@part()
def along_answers(
    out: Any, grad: Any, sums: Any, start: Any, tokens: Any, num_heads: Any, head: Any, width: Any, places: Any
) -> None:  # fmt: skip
    """Of one head's tokens: what all gradients of its probabilities have in common, and the logarithm of its sum."""
    for t in range(padded(tokens)):
        dot, logarithm = np.float32(0.0), np.float32(0.0)
        if t < tokens:
            of = (start + t) * num_heads + head
            for line in range(0, width, LINE_BYTES // H):
                fetch(out, (of + AHEAD * num_heads) * width + line)
            logarithm = read(sums, of)
            for j in range(U(width)):
                dot += read(out, U(of * width) + j) * read(grad, U(of * width) + j)
        write(floats(places[SUMS]), t, logarithm)
        write(floats(places[ALONG]), t, dot)


@part()
def add_to_keys(
    places: Any, block: Any, block_end: Any, tokens: Any, depth: Any, window: Any
) -> None:  # fmt: skip
    """Gradients of the scores of a block of keys, kept in strips; from them those of its keys and values."""
    size = padded(tokens)
    across = size // 32 * TILE
    for key in range(block, block_end, SIDE):
        end = min(size, padded(key + SIDE - 1 + window)) if window else size
        strip = (key - block) // 16 * across
        for query in range(key, end, SIDE):
            square(
                halves(places[KEYS]), key * depth, depth, 16 * depth, 32, halves(places[QUERIES_ACROSS]),
                query * depth, 16 * depth, depth // 32, floats(places[SCORES]), 0, SIDE, False,
            )  # fmt: skip
            square(
                halves(places[VALUES]), key * depth, depth, 16 * depth, 32, halves(places[GRADS_ACROSS]),
                query * depth, 16 * depth, depth // 32, floats(places[SLOPES]), 0, SIDE, False,
            )  # fmt: skip
            score_slopes(
                floats(places[SCORES]), floats(places[SLOPES]), key, query, tokens, window, floats(places[SUMS]),
                floats(places[ALONG]), halves(places[P]), halves(places[DS]), strip + query // 32 * TILE, across,
                halves(places[DS_PANELS]), query * BLOCK_KEYS + (key - block) * 16, BLOCK_KEYS * 16,
            )  # fmt: skip
        steps, at = (end - key) // 32, strip + key // 32 * TILE
        for d in range(0, depth, SIDE):
            square(
                halves(places[P]), at, 32, across, TILE, halves(places[GRADS_ALONG]), d * size + key * 16, size * 16,
                steps, floats(places[D_VALUES]), key * depth + d, depth, True,
            )  # fmt: skip
            square(
                halves(places[DS]), at, 32, across, TILE, halves(places[QUERIES_ALONG]), d * size + key * 16,
                size * 16, steps, floats(places[D_KEYS]), key * depth + d, depth, True,
            )  # fmt: skip


@part()
def add_to_queries(
    places: Any, block: Any, block_end: Any, tokens: Any, depth: Any, window: Any
) -> None:  # fmt: skip
    """From the strips of a block of keys the gradients of all queries that see any, [P / SIDE, D, SIDE]."""
    size = padded(tokens)
    end = min(size, padded(block_end - 1 + window)) if window else size
    for query in range(block, end, SIDE):
        begin = max(block, first_key(query, window) // SIDE * SIDE)
        steps = (min(block_end, query + SIDE) - begin) // SIDE
        for d in range(0, depth, SIDE):
            at = (d // SIDE * (size // SIDE) + begin // SIDE) * 2 * TILE
            square(
                halves(places[KEYS_ACROSS]), at, 32, TILE, 2 * TILE, halves(places[DS_PANELS]),
                query * BLOCK_KEYS + (begin - block) * 16, BLOCK_KEYS * 16, steps, floats(places[D_QUERIES]),
                query * depth + d * SIDE, SIDE, True,
            )  # fmt: skip


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
    places = places_backward(room, most, depth)
    start_products(shapes)
    for unit in range(first, last):
        row, kv = unit // num_kv, unit % num_kv
        start, tokens = read(rows, 2 * row), read(rows, 2 * row + 1)
        size, queries = padded(tokens), places[QUERIES]
        take_heads(k, start, tokens, k_step, kv * width, key_cos, key_sin, True, width, depth, halves(places[KEYS]))
        take_heads(v, start, tokens, v_step, kv * width, key_cos, key_sin, False, width, depth, halves(places[VALUES]))
        tiles_across(places[KEYS], size, depth, places[KEYS_ACROSS])
        zeros(floats(places[D_KEYS]), 0, size * depth)
        zeros(floats(places[D_VALUES]), 0, size * depth)
        for head in range(kv * group, (kv + 1) * group):
            own, step = head * width, num_heads * width
            take_heads(q, start, tokens, q_step, own, cos, sin, True, width, depth, halves(queries))
            panels_across(queries, size, depth, places[QUERIES_ACROSS])
            panels_along(queries, size, depth, places[QUERIES_ALONG])
            take_heads(grad, start, tokens, step, own, cos, sin, False, width, depth, halves(queries))
            panels_across(queries, size, depth, places[GRADS_ACROSS])
            panels_along(queries, size, depth, places[GRADS_ALONG])
            along_answers(out, grad, sums, start, tokens, num_heads, head, width, places)
            zeros(floats(places[D_QUERIES]), 0, size * depth)
            for block in range(0, size, BLOCK_KEYS):
                block_end = min(size, block + BLOCK_KEYS)
                add_to_keys(places, block, block_end, tokens, depth, window)
                add_to_queries(places, block, block_end, tokens, depth, window)
            for t in range(tokens):
                at = t // SIDE * SIDE * depth + t % SIDE
                for j in range(width):
                    write(floats(places[SCORES]), j, read(floats(places[D_QUERIES]), at + j * SIDE))
                put_turned(floats(places[SCORES]), 0, cos, sin, start + t, width, dq, (start + t) * step + own)
        for t in range(tokens):
            to = ((start + t) * num_kv + kv) * width
            put_turned(floats(places[D_KEYS]), t * depth, key_cos, key_sin, start + t, width, dk, to)
            copy(floats(places[D_VALUES]), U(t * depth), dv, U(to), U(width))
    end_products()


def room_forward(tokens: int, width: int) -> int:
    """Bytes that a thread of `attend` needs for rows of up to so many tokens."""
    size, depth = -(-tokens // SIDE) * SIDE, -(-width // SIDE) * SIDE
    return 3 * size * depth * H + SIDE * size * (F + H) + SIDE * (depth + 2) * F


def room_backward(tokens: int, width: int) -> int:
    """As `room_forward`, of `attend_backward`."""
    size, depth = -(-tokens // SIDE) * SIDE, -(-width // SIDE) * SIDE
    return 14 * size * depth * H + 3 * BLOCK_KEYS * size * H + 2 * (SIDE * SIDE + size) * F
