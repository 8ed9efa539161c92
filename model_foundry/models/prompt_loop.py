"""Attention of blocks of prompts over keys and values that a running batch keeps, by tiles of bfloat16.

A unit of work is a block and a key/value head. A query's bits depend on what it sees, not on the block it is read in.
"""

from __future__ import annotations

from typing import Any

from model_foundry.models.attention_loops import (
    SIDE,
    U,
    answer,
    first_key,
    padded,
    panels_across,
    panels_along,
    places_forward,
    put_answers,
    take_heads,
    zeros,
)
from model_foundry.models.compiled_loop import loop, part
from model_foundry.models.cpu_loops import copy
from model_foundry.models.primitives import floats, halves, read
from model_foundry.models.small_products import end_products, start_products


@part()
def take_kept(
    cache: Any, segments: Any, own: Any, head: Any, heads: Any, length: Any, first: Any, end: Any, width: Any,
    depth: Any, out: Any,
) -> None:  # fmt: skip
    """Keys or values [first, end) of one of the `heads` of the cache, as out [padded, D]."""
    for t in range(first, end):
        at = (read(segments, own + t // length) * heads + head) * length + t % length
        copy(cache, U(at * width), out, U((t - first) * depth), U(width))
        zeros(out, (t - first) * depth + width, depth - width)
    zeros(out, (end - first) * depth, (padded(end - first) - end + first) * depth)


@loop(
    "x*", "x*", "int64*", "int64*", "x*", "float", "int", "int", "int", "int", "int", "int", "int", "int", "int"
)  # fmt: skip
def attend_prompts(
    q: Any, cache: Any, spans: Any, segments: Any, out: Any, scale: Any, room: int, shapes: int, most: int,
    most_segments: int, length: int, num_heads: int, num_kv: int, width: int, window: int, first: int, last: int,
) -> None:  # fmt: skip
    """out [N, H, W] of q over cache [segments, 2 K, length, W].

    Args:
        spans: [S, 3], of each block its first row, how many it has, and the position of the first.
        segments: [S, most_segments], where its keys are, in their order.
        room: for as many bytes as `room_forward` says of `most`: the keys that a block sees, padded.
    """
    depth, group = padded(width), num_heads // num_kv
    natural, keys, values, scores, weights, found = places_forward(room, most, depth)
    start_products(shapes)
    for unit in range(first, last):
        span, kv = unit // num_kv, unit % num_kv
        start, num_rows, position = read(spans, 3 * span), read(spans, 3 * span + 1), read(spans, 3 * span + 2)
        tokens, begin, own = position + num_rows, first_key(position, window) // SIDE * SIDE, span * most_segments
        size, heads = padded(tokens - begin), 2 * num_kv
        take_kept(cache, segments, own, kv, heads, length, begin, tokens, width, depth, halves(natural))
        panels_across(natural, size, depth, keys)
        take_kept(cache, segments, own, num_kv + kv, heads, length, begin, tokens, width, depth, halves(natural))
        panels_along(natural, size, depth, values)
        for head in range(kv * group, (kv + 1) * group):
            take_heads(q, start, num_rows, num_heads * width, head * width, q, q, False, width, depth, halves(natural))
            for row in range(0, num_rows, SIDE):
                base = first_key(position + row, window) // SIDE * SIDE
                answer(
                    natural, row * depth, keys, values, size, begin, depth, base, position + row, tokens, window,
                    scale, scores, weights, found,
                )  # fmt: skip
                to = ((start + row) * num_heads + head) * width
                put_answers(floats(found), num_rows - row, depth, width, out, to, num_heads * width)
    end_products()
