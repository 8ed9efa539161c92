"""How a thread of `answer_loops` multiplies, plainly and by tiles: the two sets of parts that differ.

Rows wait for products in a room, [padded rows, inputs], as float32 plainly and as bfloat16 for tiles.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from model_foundry.models.answer_plan import BLOCK_OUTPUTS, PADDED, TILE_SHAPES
from model_foundry.models.compiled_loop import loop, part
from model_foundry.models.cpu_loops import copy
from model_foundry.models.primitives import LINE_BYTES, fetch, floats, halves, read, write
from model_foundry.models.small_products import (
    FEW_OUTPUTS,
    end_products,
    few_rows,
    one_panel,
    start_products,
)
from model_foundry.models.tiles import ROWS

U = np.uint64
AT_ONCE, AT_ONCE_BY_TILES = 16, FEW_OUTPUTS
"""Outputs computed together; what a matrix has must be a multiple."""


AHEAD = 4 * ROWS
"""Keys that are fetched before they are read."""


@part()
def start_plain(plan: Any) -> None:
    pass


@part()
def end_plain() -> None:
    pass


@part()
def numbers_plain(room: Any) -> Any:
    return floats(room)


@part()
def put_plain(room: Any, row: Any, place: Any, size: Any, x: Any, at: Any, count: Any) -> None:
    """Numbers of x, from `at` on, as those from `place` on of a row of `size`: the room is float32 [padded, size]."""
    copy(x, at, floats(room), U(row * size + place), U(count))


@part()
def _four_dots(
    one: Any, row: Any, others: Any, first: Any, size: Any, out: Any, to: Any, step: Any
) -> None:  # fmt: skip
    """Of a row of `one` with four of `others` from `first` on, all of `size`: to places `to`, `to` + step, .."""
    at = U(row * size)
    b0, b1, b2, b3 = U(first * size), U((first + 1) * size), U((first + 2) * size), U((first + 3) * size)
    s0 = s1 = s2 = s3 = np.float32(0.0)
    for j in range(U(size)):
        value = read(one, at + j)
        s0 += value * read(others, b0 + j)
        s1 += value * read(others, b1 + j)
        s2 += value * read(others, b2 + j)
        s3 += value * read(others, b3 + j)
    write(out, U(to), s0)
    write(out, U(to + step), s1)
    write(out, U(to + 2 * step), s2)
    write(out, U(to + 3 * step), s3)


@part()
def multiply_plain(plan: Any, weight: Any, output: Any, size: Any, room: Any, found: Any) -> None:
    """found [padded, AT_ONCE] float32 = the rows in the room × the weights of AT_ONCE outputs from `output` on."""
    for row in range(0, read(plan, PADDED), 4):
        for o in range(AT_ONCE):
            _four_dots(weight, output + o, floats(room), row, size, found, row * AT_ONCE + o, AT_ONCE)


@part()
def score_plain(
    queries: Any, room: Any, cache: Any, start: Any, values: Any, first: Any, end: Any, tokens: Any, group: Any,
    width: Any, scores: Any, to: Any, step: Any,
) -> None:  # fmt: skip
    """scores [G, step] of keys [first, end) of a segment that starts at row `start` of the cache, to place `to` on."""
    for t in range(first, end):
        for g in range(0, group, 4):
            _four_dots(cache, start + t, queries, g, width, scores, g * step + to + t - first, step)


@part()
def start_tiles(plan: Any) -> None:
    start_products(read(plan, TILE_SHAPES))


@part()
def end_tiles() -> None:
    end_products()


@part()
def numbers_tiles(room: Any) -> Any:
    return halves(room)


@part()
def put_tiles(room: Any, row: Any, place: Any, size: Any, x: Any, at: Any, count: Any) -> None:
    copy(x, at, halves(room), U(row * size + place), U(count))


@part()
def multiply_tiles(plan: Any, weight: Any, output: Any, size: Any, room: Any, found: Any) -> None:
    """As `multiply_plain`, of AT_ONCE_BY_TILES outputs. The weights are those of `tiles.in_tiles`."""
    outputs = read(plan, BLOCK_OUTPUTS)
    few_rows(halves(room), 0, read(plan, PADDED), size, weight, first_of(output, outputs, size), outputs, found)


@part()
def first_of(output: Any, outputs: Any, size: Any) -> Any:
    """Where an output's weights begin."""
    return output // outputs * outputs * size + output % outputs * 2


@loop("int", "x*", "x*", "int", "float32*", "x*", "int", "int", "int")
def product_of_few(
    shapes: int, x: Any, weight: Any, outputs: int, found: Any, out: Any, num_rows: int, size: int, num_out: int,
    first: int, last: int,
) -> None:  # fmt: skip
    """out [R, num_out] = x × weightᵀ, of outputs `first` to `last` in blocks of AT_ONCE_BY_TILES; x has ROWS rows.

    found: room for [ROWS, AT_ONCE_BY_TILES].
    """
    start_products(shapes)
    for block in range(first, last):
        output = block * AT_ONCE_BY_TILES
        few_rows(x, 0, num_rows, size, weight, first_of(output, outputs, size), outputs, found)
        for row in range(num_rows):
            copy(found, U(row * AT_ONCE_BY_TILES), out, U(row * num_out + output), U(AT_ONCE_BY_TILES))
    end_products()


@part()
def score_tiles(
    queries: Any, room: Any, cache: Any, start: Any, values: Any, first: Any, end: Any, tokens: Any, group: Any,
    width: Any, scores: Any, to: Any, step: Any,
) -> None:  # fmt: skip
    """As `score_plain`: keys are the rows. room: of queries in pairs of dimensions, then of a tile of scores.

    Of keys some tiles ahead, and of the values that start at row `values`, the lines are fetched meanwhile.
    """
    x, tile = halves(room), floats(room + width * ROWS * 2)
    for g in range(group):
        for j in range(0, width, 2):
            write(x, U(j * ROWS + 2 * g), read(queries, U(g * width + j)))
            write(x, U(j * ROWS + 2 * g + 1), read(queries, U(g * width + j + 1)))
    for t in range(first, end, ROWS):
        for line in range(0, ROWS * width, LINE_BYTES // 2):
            fetch(cache, (start + t + AHEAD) * width + line)
            fetch(cache, (values + t) * width + line)
        begin = min(t, tokens - ROWS)  # not beyond the segment
        one_panel(cache, (start + begin) * width, width, x, tile)
        if begin == t and t + ROWS <= end:
            for g in range(group):
                at = U(g * step + to + t - first)
                for key in range(U(ROWS)):
                    write(scores, at + key, read(tile, key * U(ROWS) + U(g)))
            continue
        for g in range(group):
            for key in range(t, min(end, begin + ROWS)):
                write(scores, U(g * step + to + key - first), read(tile, U((key - begin) * ROWS + g)))
