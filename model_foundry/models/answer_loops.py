"""One token of several answers through all layers of a Llama, as one compiled loop for each thread.

Between one layer's products there is so little to do that calling them takes longer than doing them. Threads share out
outputs and heads, and meet where one needs what another has made, five times a layer. Arithmetic is as in torch's
operations: products and sums in float32, what goes from one to the next rounded to the model's type. A row's bits
depend on that row alone, not on the rows beside it nor on the number of threads.

Shapes: R rows, D width, H heads, K key/value heads, G = H // K, W head width, I inner width of the MLP, T keys.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from model_foundry.models.answer_plan import (
    ACTED,
    ADAPTERS,
    ATTENDED,
    CACHE,
    COS,
    COUNTER,
    DOWN,
    GATE,
    GIVE_WAY,
    HEAD_WIDTH,
    HEADS,
    INNER,
    INPUT_NORM,
    K_NORM,
    KV_HEADS,
    LAYERS,
    MAX_SEGMENTS,
    MLP_NORM,
    MOST_KEYS,
    MOST_RANK,
    NUM_ROWS,
    OF_DOWN,
    OF_GATE,
    OF_K,
    OF_OUT,
    OF_Q,
    OF_UP,
    OF_V,
    OUT,
    OWN,
    OWN_BYTES,
    PADDED,
    POSITIONS,
    PROJECTIONS,
    Q_BIAS,
    Q_NORM,
    QKV,
    SEGMENT_TOKENS,
    SEGMENTS,
    SIN,
    TABLE,
    TABLE_ROW,
    UP,
    WIDTH,
    WINDOW,
    Q,
)
from model_foundry.models.answer_products import (
    AT_ONCE,
    AT_ONCE_BY_TILES,
    end_plain,
    end_tiles,
    multiply_plain,
    multiply_tiles,
    numbers_plain,
    numbers_tiles,
    put_plain,
    put_tiles,
    score_plain,
    score_tiles,
    start_plain,
    start_tiles,
)
from model_foundry.models.compiled_loop import loop, part
from model_foundry.models.cpu_loops import copy, exp, largest_of, norm, sigmoid, turn
from model_foundry.models.primitives import (
    LANES,
    TOGETHER,
    add_weighted,
    add_weighted_wide,
    call,
    count_up,
    floats,
    pointer_like,
    read,
    rounded,
    seen,
    words,
    write,
)
from model_foundry.models.tiles import ROWS

U = np.uint64
PATIENCE = 20_000
"""Looks at the others' count before the processor is offered to somebody else."""


@part()
def _meet(plan: Any, goal: Any) -> Any:
    """Wait until threads have come here `goal` times in all, which is returned."""
    counter, looks = words(read(plan, COUNTER)), 0
    count_up(counter)
    while seen(counter) < goal:
        looks += 1
        if looks >= PATIENCE:
            call(read(plan, GIVE_WAY))
    return goal


@part()
def _put_norm(put: Any, plan: Any, x: Any, weight: Any, eps: Any, room: Any) -> None:
    """The norm of every row, each thread for itself: telling the others would take longer.

    room: of one row, then of all as products read them.
    """
    width, normed = read(plan, WIDTH), pointer_like(room, x)
    room += width * 4
    for row in range(read(plan, NUM_ROWS)):
        norm(x, U(row * width), weight, eps, normed, U(0), width)
        put(room, row, 0, width, normed, U(0), width)


@part()
def _change(plan: Any, index: Any, which: Any, row: Any) -> Any:
    """Where the table of a row's adapter has what it changes of a layer; 0 where that is nothing."""
    table = read(words(read(plan, ADAPTERS)), row)
    if table == 0:
        return 0
    place = table + (index * len(PROJECTIONS) + which) * 3 * 8
    return place if read(words(place), 2) != 0 else 0


@part()
def _go_down(numbers: Any, plan: Any, index: Any, which: Any, x: Any, room: Any, size: Any, low: Any) -> None:
    """low [R, most_rank] float32 = rows in the room × down, of rows whose adapter changes this projection; each thread
    for itself."""
    rows, most = numbers(room), read(plan, MOST_RANK)
    for row in range(read(plan, NUM_ROWS)):
        place = _change(plan, index, which, row)
        if place != 0:
            down, at = pointer_like(read(words(place), 0), x), U(row * size)
            for k in range(read(words(place), 2)):
                total, of = np.float32(0.0), U(k * size)
                for j in range(U(size)):
                    total += read(rows, at + j) * read(down, of + j)
                write(low, U(row * most + k), rounded(x, total))


@part()
def _add_up(
    plan: Any, index: Any, which: Any, x: Any, low: Any, output: Any, at_once: Any, found: Any
) -> None:  # fmt: skip
    """found += low × up, of outputs from `output` on."""
    most = read(plan, MOST_RANK)
    for row in range(read(plan, NUM_ROWS)):
        place = _change(plan, index, which, row)
        if place != 0:
            rank, up = read(words(place), 2), pointer_like(read(words(place), 1), x)
            for o in range(at_once):
                total, of, to = np.float32(0.0), U((output + o) * rank), U(row * at_once + o)
                for k in range(U(rank)):
                    total += read(low, U(row * most) + k) * read(up, of + k)
                write(found, to, read(found, to) + rounded(x, total))


@part()
def _project_heads(
    multiply: Any, numbers: Any, at_once: Any, plan: Any, index: Any, layer: Any, x: Any, room: Any, found: Any,
    low: Any, thread: Any, threads: Any,
) -> None:  # fmt: skip
    """Queries, keys and values of all rows, [R, (H + 2 K) W]."""
    step = read(plan, NUM_ROWS) * read(plan, MOST_RANK) * 4
    for which in range(OF_Q, OF_V + 1):
        _go_down(numbers, plan, index, which, x, room, read(plan, WIDTH), floats(low + which * step))
    width, head_width = read(plan, WIDTH), read(plan, HEAD_WIDTH)
    of_q, of_kv = read(plan, HEADS) * head_width, read(plan, KV_HEADS) * head_width
    every = of_q + 2 * of_kv
    out, blocks = pointer_like(read(plan, QKV), x), every // at_once
    for block in range(blocks * thread // threads, blocks * (thread + 1) // threads):
        first = block * at_once
        which, start = OF_Q, 0
        if first >= of_q + of_kv:
            which, start = OF_V, of_q + of_kv
        elif first >= of_q:
            which, start = OF_K, of_q
        bias = Q_BIAS + which
        multiply(plan, pointer_like(read(layer, Q + which), x), first - start, width, room, found)
        _add_up(plan, index, which, x, floats(low + which * step), first - start, at_once, found)
        added, of_bias = pointer_like(read(layer, bias), x), U(first - start)
        for row in range(read(plan, NUM_ROWS)):
            to, of = U(row * every + first), U(row * at_once)
            if read(layer, bias) != 0:
                for o in range(U(at_once)):
                    write(out, to + o, read(found, of + o) + read(added, of_bias + o))
            else:
                copy(found, of, out, to, U(at_once))


@part()
def _head(plan: Any, layer: Any, x: Any, at: Any, which: Any, eps: Any, angle: Any, out: Any, to: Any) -> None:
    """One head of a query or a key, normalised where the model does that, and rotated."""
    width, heads = read(plan, HEAD_WIDTH), pointer_like(read(plan, QKV), x)
    cos, sin = pointer_like(read(plan, COS), x), pointer_like(read(plan, SIN), x)
    if read(layer, which) != 0:
        norm(heads, at, pointer_like(read(layer, which), x), eps, heads, at, width)
    turn(heads, at, cos, sin, angle, np.float32(1.0), out, to, U(width // 2))


@part()
def _share(scores: Any, at: Any, count: Any, scale: Any) -> None:
    """Softmax of scores × scale, in place."""
    largest = largest_of(scores, at, count)
    total = np.float32(0.0)
    for t in range(count):
        power = exp((read(scores, at + t) - largest) * scale)
        write(scores, at + t, power)
        total += power
    inverse = np.float32(1.0) / total
    for t in range(count):
        write(scores, at + t, read(scores, at + t) * inverse)


@part()
def _add_values(
    scores: Any, at: Any, step: Any, cache: Any, first: Any, count: Any, width: Any, sums: Any, to: Any
) -> None:
    """sums [TOGETHER, W] += shares × values."""
    wide = width // (4 * LANES) * 4 * LANES
    for j in range(0, wide, 4 * LANES):
        add_weighted_wide(scores, at, step, cache, first + j, count, width, sums, to + j)
    for j in range(wide, width, LANES):
        add_weighted(scores, at, step, cache, first + j, count, width, sums, to + j)


@part()
def _attend_row(put: Any, score: Any, plan: Any, layer: Any, x: Any, eps: Any, own: Any, row: Any, head: Any) -> None:
    """The queries that share a key/value head, of one row: its key and value are kept, and all it may see is read."""
    heads, kv_heads, width = read(plan, HEADS), read(plan, KV_HEADS), read(plan, HEAD_WIDTH)
    group, tokens, most = heads // kv_heads, read(plan, SEGMENT_TOKENS), read(plan, MOST_KEYS)
    segments, position = words(read(plan, SEGMENTS)), read(words(read(plan, POSITIONS)), row)
    places = row * read(plan, MAX_SEGMENTS)
    cache, qkv = pointer_like(read(layer, CACHE), x), pointer_like(read(plan, QKV), x)
    padded = (group + TOGETHER - 1) // TOGETHER * TOGETHER
    queries, packed = pointer_like(own, x), own + padded * width * 4
    scores = floats(packed + ROWS * (width + ROWS) * 4)
    sums = floats(packed + (ROWS * (width + ROWS) + padded * most) * 4)
    angle, at = U(position * width + width // 2), row * (heads + 2 * kv_heads) * width
    for g in range(group):
        _head(plan, layer, x, U(at + (head * group + g) * width), Q_NORM, eps, angle, queries, U(g * width))
    start = read(segments, places + position // tokens) * 2 * kv_heads
    key = U(((start + head) * tokens + position % tokens) * width)
    _head(plan, layer, x, U(at + (heads + head) * width), K_NORM, eps, angle, cache, key)
    value = U(((start + kv_heads + head) * tokens + position % tokens) * width)
    copy(qkv, U(at + (heads + kv_heads + head) * width), cache, value, U(width))

    window = read(layer, WINDOW)
    first = max(0, position - window + 1) if window else 0
    for number in range(first // tokens, position // tokens + 1):
        start = (read(segments, places + number) * 2 * kv_heads + head) * tokens
        begin, end = max(first - number * tokens, 0), min(position + 1 - number * tokens, tokens)
        to = number * tokens + begin - first
        values = start + kv_heads * tokens
        score(queries, packed, cache, start, values, begin, end, tokens, group, width, scores, to, most)
    for j in range(U(padded * width)):
        write(sums, j, np.float32(0.0))
    for g in range(group):
        _share(scores, U(g * most), U(position + 1 - first), np.float32(1.0) / np.sqrt(np.float32(width)))
    for number in range(first // tokens, position // tokens + 1):
        start = (read(segments, places + number) * 2 * kv_heads + kv_heads + head) * tokens
        begin, end = max(first - number * tokens, 0), min(position + 1 - number * tokens, tokens)
        to = number * tokens + begin - first
        for g in range(0, padded, TOGETHER):
            _add_values(
                scores, g * most + to, most, cache, (start + begin) * width, end - begin, width, sums, g * width
            )
    for g in range(group):
        copy(sums, U(g * width), queries, U(0), U(width))
        put(read(plan, ATTENDED), row, (head * group + g) * width, heads * width, queries, U(0), width)


@part()
def _add_product(
    multiply: Any, numbers: Any, at_once: Any, plan: Any, index: Any, which: Any, weight: Any, size: Any, room: Any,
    x: Any, found: Any, low: Any, thread: Any, threads: Any,
) -> None:  # fmt: skip
    """x += a product, each thread its outputs."""
    width = read(plan, WIDTH)
    _go_down(numbers, plan, index, which, x, room, size, floats(low))
    blocks = width // at_once
    for block in range(blocks * thread // threads, blocks * (thread + 1) // threads):
        first = block * at_once
        multiply(plan, weight, first, size, room, found)
        _add_up(plan, index, which, x, floats(low), first, at_once, found)
        for row in range(read(plan, NUM_ROWS)):
            at, of = U(row * width + first), U(row * at_once)
            for o in range(U(at_once)):
                write(x, at + o, read(x, at + o) + rounded(x, read(found, of + o)))


@part()
def _act(
    put: Any, multiply: Any, numbers: Any, at_once: Any, plan: Any, index: Any, layer: Any, x: Any, room: Any,
    found: Any, low: Any, thread: Any, threads: Any,
) -> None:  # fmt: skip
    """silu(gate) × up into their room."""
    of_up = low + read(plan, NUM_ROWS) * read(plan, MOST_RANK) * 4
    _go_down(numbers, plan, index, OF_GATE, x, room, read(plan, WIDTH), floats(low))
    _go_down(numbers, plan, index, OF_UP, x, room, read(plan, WIDTH), floats(of_up))
    width, inner, size = read(plan, WIDTH), read(plan, INNER), at_once * read(plan, PADDED)
    gates, ups = pointer_like(read(layer, GATE), x), pointer_like(read(layer, UP), x)
    blocks = inner // at_once
    also = floats(read(plan, OWN) + thread * read(plan, OWN_BYTES) + size * 4)
    for block in range(blocks * thread // threads, blocks * (thread + 1) // threads):
        first = block * at_once
        multiply(plan, gates, first, width, room, found)
        _add_up(plan, index, OF_GATE, x, floats(low), first, at_once, found)
        multiply(plan, ups, first, width, room, also)
        _add_up(plan, index, OF_UP, x, floats(of_up), first, at_once, also)
        for j in range(U(read(plan, NUM_ROWS) * at_once)):
            gate, up = rounded(x, read(found, j)), rounded(x, read(also, j))
            write(found, j, rounded(x, gate * sigmoid(gate) * up))
        for row in range(read(plan, NUM_ROWS)):
            put(read(plan, ACTED), row, first, inner, found, U(row * at_once), at_once)


@part()
def _answer(
    start: Any, numbers: Any, put: Any, multiply: Any, score: Any, end: Any, at_once: Any, plan: Any, x: Any, eps: Any,
    thread: Any, threads: Any,
) -> None:  # fmt: skip
    """A thread's own room: [2, padded, at_once] float32 of products, [3, R, most_rank] of adapters, a row, then the
    normalised rows; or what heads need."""
    own, met, num_rows = read(plan, OWN) + thread * read(plan, OWN_BYTES), 0, read(plan, NUM_ROWS)
    found, low = floats(own), own + 2 * at_once * read(plan, PADDED) * 4
    room = low + (3 * num_rows * read(plan, MOST_RANK) + 15) // 16 * 64
    rows = room + read(plan, WIDTH) * 4
    kv_heads, inner, of_heads = read(plan, KV_HEADS), read(plan, INNER), read(plan, HEADS) * read(plan, HEAD_WIDTH)
    pairs = num_rows * kv_heads
    start(plan)
    for index in range(read(plan, LAYERS)):
        layer = words(read(plan, TABLE) + index * len(TABLE_ROW) * 8)
        _put_norm(put, plan, x, pointer_like(read(layer, INPUT_NORM), x), eps, room)
        _project_heads(multiply, numbers, at_once, plan, index, layer, x, rows, found, low, thread, threads)
        met = _meet(plan, met + threads)
        for pair in range(pairs * thread // threads, pairs * (thread + 1) // threads):
            # By heads: what rows share is still at hand, and no two threads write to one line.
            _attend_row(put, score, plan, layer, x, eps, own, pair % num_rows, pair // num_rows)
        met = _meet(plan, met + threads)
        weight, attended = pointer_like(read(layer, OUT), x), read(plan, ATTENDED)
        _add_product(
            multiply, numbers, at_once, plan, index, OF_OUT, weight, of_heads, attended, x, found, low, thread, threads
        )
        met = _meet(plan, met + threads)
        _put_norm(put, plan, x, pointer_like(read(layer, MLP_NORM), x), eps, room)
        _act(put, multiply, numbers, at_once, plan, index, layer, x, rows, found, low, thread, threads)
        met = _meet(plan, met + threads)
        weight, acted = pointer_like(read(layer, DOWN), x), read(plan, ACTED)
        _add_product(
            multiply, numbers, at_once, plan, index, OF_DOWN, weight, inner, acted, x, found, low, thread, threads
        )
        met = _meet(plan, met + threads)
    end()


@loop("int64*", "x*", "float")
def answer(plan: Any, x: Any, eps: Any, first: int, last: int) -> None:
    """x [R, D] through all layers, in place. `first` is the thread's number, `last` how many there are."""
    _answer(
        start_plain, numbers_plain, put_plain, multiply_plain, score_plain, end_plain, AT_ONCE, plan, x, eps,
        first, last,
    )  # fmt: skip


@loop("int64*", "x*", "float")
def answer_by_tiles(plan: Any, x: Any, eps: Any, first: int, last: int) -> None:
    """As `answer`, for bfloat16 and matrices whose sides are multiples of AT_ONCE_BY_TILES."""
    _answer(
        start_tiles, numbers_tiles, put_tiles, multiply_tiles, score_tiles, end_tiles, AT_ONCE_BY_TILES, plan, x,
        eps, first, last,
    )  # fmt: skip
