"""Adapters' products beside a frozen base's, and their gradients: all units of a pass in one call.

A unit is neighbouring rows under one adapter. Of a unit of few rows the products take less time than calling them one
by one. Factors are read where they are kept, in float32, and rounded to the compute type; sums are float32. What a
unit gets depends on its own rows and adapter alone.

Shapes: n rows of a unit, a multiple of 4; D inputs and O outputs of a layer, multiples of 16; R the sum over layers
of ranks r, each filled up to a multiple of 4 with zeros. Matrices in `room` have no gaps.

`layers` [layers, 2]: the address of the outputs, or of their gradients, [N, O] as `x` points to, and O. `units` is
[units, 3 + 5 layers]: the first row, n, where the unit's part of `low` begins; then for each layer the addresses of
A [r, D], B [O, r] and their gradients, and r.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from model_foundry.models.compiled_loop import loop, part
from model_foundry.models.primitives import (
    LANES,
    TOGETHER,
    add_weighted,
    add_weighted_wide,
    floats,
    pointer_like,
    products_of_rows,
    read,
    rounded,
    write,
)

U = np.uint64
HEAD, EACH = 3, 5
"""Numbers of a unit before its layers', and of each layer."""
WIDE, FLOAT_BYTES = 4 * LANES, 4


def filled(rank: int) -> int:
    """A rank filled up."""
    return -(-rank // TOGETHER) * TOGETHER


filled_up = part()(filled)
"""The same in loops."""


@part()
def rank_of(units: Any, facts: Any) -> Any:
    """A layer's, filled up."""
    return filled_up(read(units, facts + 4))


@part()
def read_down(like: Any, a: Any, rank: Any, width: Any, out: Any, to: Any) -> None:
    """A [r, D] in the compute type, and rows of zeros after it."""
    for j in range(U(rank * width)):
        write(out, U(to) + j, rounded(like, read(a, j)))
    for j in range(U(rank * width), U(filled_up(rank) * width)):
        write(out, U(to) + j, np.float32(0.0))


@part()
def read_up(like: Any, b: Any, rank: Any, scale: Any, width: Any, out: Any) -> None:
    """s B [O, r] turned, [r, O], in the compute type, and rows of zeros after it."""
    for block in range(U(0), U(width), U(LANES)):  # what is read at a stride stays at hand
        for k in range(U(rank)):
            for j in range(block, block + U(LANES)):
                write(out, k * U(width) + j, rounded(like, read(b, j * U(rank) + k) * scale))
    for j in range(U(rank * width), U(filled_up(rank) * width)):
        write(out, j, np.float32(0.0))


@part()
def weighted_sums(
    weights: Any, at: Any, step: Any, rows: Any, first: Any, count: Any, width: Any, sums: Any, to: Any, lanes: Any
) -> None:  # fmt: skip
    """Σ_t weights[at + q step + t] × rows[first + t width + l], so many lanes of sums [4, width] from `to` on."""
    for q in range(TOGETHER):
        for j in range(U(lanes)):
            write(sums, U(to + q * width) + j, np.float32(0.0))
    if lanes == WIDE:
        add_weighted_wide(weights, at, step, rows, first, count, width, sums, to)
    else:
        add_weighted(weights, at, step, rows, first, count, width, sums, to)


@part()
def add_spread(
    low: Any, at: Any, step: Any, factor: Any, rank: Any, width: Any, out: Any, to: Any, num: Any, sums: Any
) -> None:  # fmt: skip
    """out [num, width] += low [num, rank] × factor [rank, width]."""
    column = 0
    while column < width:
        lanes = WIDE if column + WIDE <= width else LANES
        for row in range(0, num, TOGETHER):
            weighted_sums(low, at + row * step, step, factor, column, rank, width, sums, column, lanes)
            for q in range(TOGETHER):
                place = U(to + (row + q) * width + column)
                for j in range(U(lanes)):
                    write(out, place + j, read(out, place + j) + read(sums, U(q * width + column) + j))
        column += lanes


@part()
def gradient_of_factor(
    turned: Any, at: Any, num: Any, rows: Any, first: Any, rank: Any, width: Any, sums: Any
) -> None:  # fmt: skip
    """sums [rank, width] = turned [rank, num] × rows [num, width]."""
    column = 0
    while column < width:
        lanes = WIDE if column + WIDE <= width else LANES
        for k in range(0, rank, TOGETHER):
            weighted_sums(
                turned, at + k * num, num, rows, first + column, num, width, sums, k * width + column, lanes
            )  # fmt: skip
        column += lanes


@part()
def products(
    x: Any, at: Any, num: Any, width: Any, factor: Any, rank: Any, out: Any, to: Any, step: Any
) -> None:  # fmt: skip
    """out [num, rank], from row to row `step`, = x [num, width] × factor [rank, width]ᵀ."""
    for k in range(0, rank, TOGETHER):
        for row in range(0, num, TOGETHER):
            products_of_rows(
                x, at + row * width, width, factor, k * width, width, width, out, to + row * step + k, step
            )  # fmt: skip


@part()
def turn_over(x: Any, at: Any, num: Any, width: Any, out: Any) -> None:
    """[num, width] as [width, num]."""
    for k in range(width):
        for row in range(num):
            write(out, k * num + row, read(x, at + row * width + k))


@part()
def add_turned(sums: Any, rank: Any, width: Any, scale: Any, grad: Any) -> None:
    """grad [width, rank] += scale × sums [rank, width]ᵀ."""
    for block in range(U(0), U(width), U(LANES)):
        for k in range(U(rank)):
            for j in range(block, block + U(LANES)):
                place = j * U(rank) + k
                write(grad, place, read(grad, place) + scale * read(sums, k * U(width) + j))


@part()
def add_to_downs(sums: Any, units: Any, facts: Any, num_layers: Any, width: Any) -> None:
    """The gradient of each layer's A, from sums [R, D]."""
    at = U(0)
    for _ in range(num_layers):
        grad = floats(read(units, facts + 2))
        for j in range(U(read(units, facts + 4) * width)):
            write(grad, j, read(grad, j) + read(sums, at + j))
        at += U(rank_of(units, facts) * width)
        facts += EACH


@part()
def all_ranks(units: Any, facts: Any, num_layers: Any) -> Any:
    total = 0
    for layer in range(num_layers):
        total += rank_of(units, facts + EACH * layer)
    return total


@part()
def read_downs(like: Any, units: Any, facts: Any, num_layers: Any, width: Any, out: Any) -> None:
    """The A's of all layers, [R, D]."""
    to = 0
    for _ in range(num_layers):
        read_down(like, floats(read(units, facts)), read(units, facts + 4), width, out, to)
        to += rank_of(units, facts) * width
        facts += EACH


@loop("int64*", "int64*", "float32*", "x*", "float32*", "int", "int", "int")
def forward(
    layers: Any, units: Any, scales: Any, x: Any, low: Any, room: int, num_layers: int, width: int, first: int,
    last: int,
) -> None:  # fmt: skip
    """Adds to each layer's outputs; low: x Aᵀ [n, R] of every unit. room: [R, D], or of a layer [r, O] and [4, O]."""
    for unit in range(first, last):
        own = unit * (HEAD + EACH * num_layers)
        row, num, place, facts = read(units, own), read(units, own + 1), read(units, own + 2), own + HEAD
        step, factor = all_ranks(units, facts, num_layers), floats(room)
        read_downs(x, units, facts, num_layers, width, factor)
        products(x, row * width, num, width, factor, step, low, place, step)
        for layer in range(num_layers):
            rank, num_out = rank_of(units, facts), read(layers, 2 * layer + 1)
            scale, out = read(scales, unit * num_layers + layer), pointer_like(read(layers, 2 * layer), x)
            read_up(x, floats(read(units, facts + 1)), read(units, facts + 4), scale, num_out, factor)
            sums = floats(room + FLOAT_BYTES * rank * num_out)
            add_spread(low, place, step, factor, rank, num_out, out, row * num_out, num, sums)
            place += rank
            facts += EACH


@loop("int64*", "int64*", "float32*", "x*", "float32*", "x*", "int", "int", "int", "int")
def backward(
    layers: Any, units: Any, scales: Any, x: Any, low: Any, dx: Any, with_dx: int, room: int, num_layers: int,
    width: int, first: int, last: int,
) -> None:  # fmt: skip
    """Adds to the gradients of A, of B and, if asked, to dx [N, D].

    low: of `forward`. room: d_low [n, R], low and then d_low turned [R, n], and after them as in `forward`, with [R, D]
    and [4, D] at once, or [r, O] twice.
    """
    for unit in range(first, last):
        own = unit * (HEAD + EACH * num_layers)
        row, num, place, facts = read(units, own), read(units, own + 1), read(units, own + 2), own + HEAD
        step = all_ranks(units, facts, num_layers)
        d_low, turned = floats(room), floats(room + FLOAT_BYTES * num * step)
        rest = room + FLOAT_BYTES * 2 * num * step
        factor = floats(rest)
        turn_over(low, place, num, step, turned)
        at = 0
        for layer in range(num_layers):
            rank, num_out, own_rank = rank_of(units, facts), read(layers, 2 * layer + 1), read(units, facts + 4)
            scale, grad = read(scales, unit * num_layers + layer), pointer_like(read(layers, 2 * layer), x)
            read_up(x, floats(read(units, facts + 1)), own_rank, scale, num_out, factor)
            products(grad, row * num_out, num, num_out, factor, rank, d_low, at, step)
            sums = floats(rest + FLOAT_BYTES * rank * num_out)
            gradient_of_factor(turned, at * num, num, grad, row * num_out, rank, num_out, sums)
            add_turned(sums, own_rank, num_out, scale, floats(read(units, facts + 3)))
            at += rank
            facts += EACH
        turn_over(d_low, 0, num, step, turned)
        gradient_of_factor(turned, 0, num, x, row * width, step, width, factor)
        add_to_downs(factor, units, own + HEAD, num_layers, width)
        if with_dx:
            read_downs(x, units, own + HEAD, num_layers, width, factor)
            sums = floats(rest + FLOAT_BYTES * step * width)
            add_spread(d_low, 0, step, factor, step, width, dx, row * width, num, sums)


def room_of(num_rows: int, ranks: Sequence[int], num_outs: Sequence[int], width: int) -> int:
    """How many float32 a unit needs for either loop."""
    every = [filled(rank) for rank in ranks]
    per_layer = max(2 * rank * num_out for rank, num_out in zip(every, num_outs, strict=True))
    return 2 * num_rows * sum(every) + max((sum(every) + TOGETHER) * width, per_layer)
