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
    halves,
    pointer_like,
    read,
    rounded,
    seen,
    words,
    write,
)
from model_foundry.models.tiles import (
    DEPTH,
    OUTPUTS,
    ROWS,
    add_0,
    add_1,
    leave_tiles,
    load_rows,
    load_weights_0,
    load_weights_1,
    shape_tiles,
    store_0,
    store_1,
    zero_0,
    zero_1,
)

U = np.uint64
AT_ONCE, AT_ONCE_BY_TILES = 16, 2 * OUTPUTS
"""Outputs computed together; what a matrix has must be a multiple."""
PATIENCE = 20_000
"""Looks at the others' count before the processor is offered to somebody else."""

PLAN = (
    "layers", "width", "heads", "kv_heads", "head_width", "inner", "rows", "padded_rows", "segment_tokens",
    "max_segments", "table", "positions", "segments", "cos", "sin", "qkv", "attended", "acted", "own", "own_bytes",
    "most_keys", "counter", "give_way", "tile_shapes", "block_outputs", "block_inputs",
    "adapters", "most_rank",
)  # fmt: skip
"""What the int64 of a plan are: sizes, and addresses. `own` is the first thread's room, `own_bytes` to the next's."""
(
    LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_WIDTH, INNER, NUM_ROWS, PADDED, SEGMENT_TOKENS, MAX_SEGMENTS, TABLE, POSITIONS,
    SEGMENTS, COS, SIN, QKV, ATTENDED, ACTED, OWN, OWN_BYTES, MOST_KEYS, COUNTER, GIVE_WAY, TILE_SHAPES, BLOCK_OUTPUTS,
    BLOCK_INPUTS, ADAPTERS, MOST_RANK,
) = range(len(PLAN))  # fmt: skip

TABLE_ROW = (
    "input_norm", "q", "k", "v", "q_bias", "k_bias", "v_bias", "q_norm", "k_norm", "cache", "window", "out", "mlp_norm",
    "gate", "up", "down",
)  # fmt: skip
"""What a layer's int64 are: addresses, 0 where there is none; and the number of keys in its window, 0 for all."""
(
    INPUT_NORM, Q, K, V, Q_BIAS, K_BIAS, V_BIAS, Q_NORM, K_NORM, CACHE, WINDOW, OUT, MLP_NORM, GATE, UP, DOWN,
) = range(len(TABLE_ROW))  # fmt: skip


PROJECTIONS = ("q", "k", "v", "out", "gate", "up", "down")
"""What an adapter may change; of each its table has (address of down [r, in], of up [out, r], r), r 0 for none."""
OF_Q, OF_K, OF_V, OF_OUT, OF_GATE, OF_UP, OF_DOWN = range(len(PROJECTIONS))


@part()
def _start_plain(plan: Any) -> None:
    pass


@part()
def _end_plain() -> None:
    pass


@part()
def _numbers_plain(room: Any) -> Any:
    return floats(room)


@part()
def _put_plain(room: Any, row: Any, place: Any, size: Any, x: Any, at: Any, count: Any) -> None:
    """Numbers of x, from `at` on, as those from `place` on of a row of `size`: the room is float32 [padded, size]."""
    copy(x, at, floats(room), U(row * size + place), U(count))


@part()
def _multiply_plain(plan: Any, weight: Any, output: Any, size: Any, room: Any, found: Any) -> None:
    """found [padded, AT_ONCE] float32 = the rows in the room × the weights of AT_ONCE outputs from `output` on."""
    x = floats(room)
    for row in range(0, read(plan, PADDED), 4):
        b0, b1, b2, b3 = U(row * size), U((row + 1) * size), U((row + 2) * size), U((row + 3) * size)
        for o in range(AT_ONCE):
            at = U((output + o) * size)
            s0 = s1 = s2 = s3 = np.float32(0.0)
            for j in range(U(size)):
                w = read(weight, at + j)
                s0 += w * read(x, b0 + j)
                s1 += w * read(x, b1 + j)
                s2 += w * read(x, b2 + j)
                s3 += w * read(x, b3 + j)
            to = U(row * AT_ONCE + o)
            write(found, to, s0)
            write(found, to + U(AT_ONCE), s1)
            write(found, to + U(2 * AT_ONCE), s2)
            write(found, to + U(3 * AT_ONCE), s3)


@part()
def _score_plain(
    queries: Any, room: Any, cache: Any, start: Any, first: Any, end: Any, tokens: Any, group: Any, width: Any,
    scores: Any, to: Any, step: Any,
) -> None:  # fmt: skip
    """scores [G, step] of keys [first, end) of a segment that starts at row `start` of the cache, to place `to` on."""
    for t in range(first, end):
        at = U((start + t) * width)
        for g in range(0, group, 4):
            b0, b1, b2, b3 = U(g * width), U((g + 1) * width), U((g + 2) * width), U((g + 3) * width)
            s0 = s1 = s2 = s3 = np.float32(0.0)
            for j in range(U(width)):
                key = read(cache, at + j)
                s0 += key * read(queries, b0 + j)
                s1 += key * read(queries, b1 + j)
                s2 += key * read(queries, b2 + j)
                s3 += key * read(queries, b3 + j)
            place = U(g * step + to + t - first)
            write(scores, place, s0)
            write(scores, place + U(step), s1)
            write(scores, place + U(2 * step), s2)
            write(scores, place + U(3 * step), s3)


@part()
def _start_tiles(plan: Any) -> None:
    shape_tiles(read(plan, TILE_SHAPES))


@part()
def _end_tiles() -> None:
    leave_tiles()


@part()
def _numbers_tiles(room: Any) -> Any:
    return halves(room)


@part()
def _put_tiles(room: Any, row: Any, place: Any, size: Any, x: Any, at: Any, count: Any) -> None:
    copy(x, at, halves(room), U(row * size + place), U(count))


@part()
def _multiply_tiles(plan: Any, weight: Any, output: Any, size: Any, room: Any, found: Any) -> None:
    """As `_multiply_plain`, of AT_ONCE_BY_TILES outputs. The weights are those of `tiles.in_tiles`."""
    x, outputs, inputs = halves(room), read(plan, BLOCK_OUTPUTS), read(plan, BLOCK_INPUTS)
    for row in range(0, read(plan, PADDED), ROWS):
        _multiply_rows(x, row, weight, output, size, outputs, inputs, found)


@part()
def _multiply_rows(
    x: Any, row: Any, weight: Any, output: Any, size: Any, outputs: Any, inputs: Any, found: Any
) -> None:  # fmt: skip
    """Of ROWS rows; `outputs` and `inputs` are the sides of a block of weights."""
    at = output // outputs * outputs * size + output % outputs * 2
    zero_0()
    zero_1()
    for block in range(0, size, inputs):
        for j in range(0, inputs, DEPTH):
            load_rows(x, row * size + block + j, 2 * size)
            load_weights_0(weight, at + j * outputs, 4 * outputs)
            add_0()
            load_weights_1(weight, at + j * outputs + 2 * OUTPUTS, 4 * outputs)
            add_1()
        at += outputs * inputs
    store_0(found, row * AT_ONCE_BY_TILES, 4 * AT_ONCE_BY_TILES)
    store_1(found, row * AT_ONCE_BY_TILES + OUTPUTS, 4 * AT_ONCE_BY_TILES)


@loop("int", "x*", "x*", "int", "int", "float32*", "x*", "int", "int", "int")
def product_of_few(
    shapes: int, x: Any, weight: Any, outputs: int, inputs: int, found: Any, out: Any, num_rows: int, size: int,
    num_out: int, first: int, last: int,
) -> None:  # fmt: skip
    """out [R, num_out] = x × weightᵀ, of outputs `first` to `last` in blocks of AT_ONCE_BY_TILES; x has ROWS rows.

    found: room for [ROWS, AT_ONCE_BY_TILES].
    """
    shape_tiles(shapes)
    for block in range(first, last):
        output = block * AT_ONCE_BY_TILES
        _multiply_rows(x, 0, weight, output, size, outputs, inputs, found)
        for row in range(num_rows):
            copy(found, U(row * AT_ONCE_BY_TILES), out, U(row * num_out + output), U(AT_ONCE_BY_TILES))
    leave_tiles()


@part()
def _score_tiles(
    queries: Any, room: Any, cache: Any, start: Any, first: Any, end: Any, tokens: Any, group: Any, width: Any,
    scores: Any, to: Any, step: Any,
) -> None:  # fmt: skip
    """As `_score_plain`: keys are the rows. room: of queries in pairs of dimensions, then of a tile of scores."""
    x, tile = halves(room), floats(room + width * ROWS * 2)
    for g in range(group):
        for j in range(0, width, 2):
            write(x, U(j * ROWS + 2 * g), read(queries, U(g * width + j)))
            write(x, U(j * ROWS + 2 * g + 1), read(queries, U(g * width + j + 1)))
    for t in range(first, end, ROWS):
        begin = min(t, tokens - ROWS)  # not beyond the segment
        zero_0()
        for j in range(0, width, DEPTH):
            load_rows(cache, (start + begin) * width + j, 2 * width)
            load_weights_0(x, j * ROWS, 4 * ROWS)
            add_0()
        store_0(tile, 0, 4 * ROWS)
        if begin == t and t + ROWS <= end:
            for g in range(group):
                at = U(g * step + to + t - first)
                for key in range(U(ROWS)):
                    write(scores, at + key, read(tile, key * U(ROWS) + U(g)))
            continue
        for g in range(group):
            for key in range(t, min(end, begin + ROWS)):
                write(scores, U(g * step + to + key - first), read(tile, U((key - begin) * ROWS + g)))


@part()
def _meet(plan: Any, goal: Any) -> None:
    """Wait until `goal` threads in all have come here."""
    counter, looks = words(read(plan, COUNTER)), 0
    count_up(counter)
    while seen(counter) < goal:
        looks += 1
        if looks >= PATIENCE:
            call(read(plan, GIVE_WAY))


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
        score(queries, packed, cache, start, begin, end, tokens, group, width, scores, to, most)
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
        met += threads
        _meet(plan, met)
        for pair in range(pairs * thread // threads, pairs * (thread + 1) // threads):
            # By heads: what rows share is still at hand, and no two threads write to one line.
            _attend_row(put, score, plan, layer, x, eps, own, pair % num_rows, pair // num_rows)
        met += threads
        _meet(plan, met)
        weight, attended = pointer_like(read(layer, OUT), x), read(plan, ATTENDED)
        _add_product(
            multiply, numbers, at_once, plan, index, OF_OUT, weight, of_heads, attended, x, found, low, thread, threads
        )
        met += threads
        _meet(plan, met)
        _put_norm(put, plan, x, pointer_like(read(layer, MLP_NORM), x), eps, room)
        _act(put, multiply, numbers, at_once, plan, index, layer, x, rows, found, low, thread, threads)
        met += threads
        _meet(plan, met)
        weight, acted = pointer_like(read(layer, DOWN), x), read(plan, ACTED)
        _add_product(
            multiply, numbers, at_once, plan, index, OF_DOWN, weight, inner, acted, x, found, low, thread, threads
        )
        met += threads
        _meet(plan, met)
    end()


@loop("int64*", "x*", "float")
def answer(plan: Any, x: Any, eps: Any, first: int, last: int) -> None:
    """x [R, D] through all layers, in place. `first` is the thread's number, `last` how many there are."""
    _answer(
        _start_plain, _numbers_plain, _put_plain, _multiply_plain, _score_plain, _end_plain, AT_ONCE, plan, x, eps,
        first, last,
    )  # fmt: skip


@loop("int64*", "x*", "float")
def answer_by_tiles(plan: Any, x: Any, eps: Any, first: int, last: int) -> None:
    """As `answer`, for bfloat16 and matrices whose sides are multiples of AT_ONCE_BY_TILES."""
    _answer(
        _start_tiles, _numbers_tiles, _put_tiles, _multiply_tiles, _score_tiles, _end_tiles, AT_ONCE_BY_TILES, plan, x,
        eps, first, last,
    )  # fmt: skip
