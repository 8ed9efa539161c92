"""Products of small pieces of bfloat16, summed in float32: by tiles where the processor has them, else by dots.

A sum's bits depend on its row and its column alone. Both ways read the same layouts, which `tiles` says.
"""

from __future__ import annotations

from typing import Any

from model_foundry.models.compiled_loop import part
from model_foundry.models.dots import HAVE_DOTS, dots_4_2, dots_4_4, dots_4_4_1, dots_4_4_2, dots_8_1
from model_foundry.models.tiles import (
    COMPILES_FOR_TILES,
    DEPTH,
    OUTPUTS,
    ROWS,
    add_0,
    add_1,
    add_four,
    have_tiles,
    leave_tiles,
    load_four,
    load_rows,
    load_weights_0,
    load_weights_1,
    shape_tiles,
    store_0,
    store_1,
    store_four,
    zero_0,
    zero_1,
    zero_four,
)

SIDE = 2 * OUTPUTS
"""Rows and columns of a square."""
OUTPUTS_BY_TILES, OUTPUTS_BY_DOTS = 2 * OUTPUTS, 4 * OUTPUTS
FEW_OUTPUTS = OUTPUTS_BY_TILES if COMPILES_FOR_TILES else OUTPUTS_BY_DOTS
"""Columns of few rows. Memory gives most where all of a block is read in one stretch, which registers allow."""
TILE = ROWS * DEPTH
BFLOAT16_BYTES, FLOAT_BYTES = 2, 4
ROWS_AT_ONCE = ROWS if COMPILES_FOR_TILES else 4
"""What a number of few rows is filled up to a multiple of."""


def have_products() -> bool:
    """Whether they can be called."""
    return have_tiles() if COMPILES_FOR_TILES else HAVE_DOTS


@part()
def _start_tiles(shapes: Any) -> None:
    shape_tiles(shapes)


@part()
def _end_tiles() -> None:
    leave_tiles()


@part()
def _square_by_tiles(
    rows: Any, at: Any, row_step: Any, next_rows: Any, next_depth: Any, panels: Any, begin: Any, next_panel: Any,
    steps: Any, out: Any, to: Any, out_step: Any, add: Any,
) -> None:  # fmt: skip
    if add:
        load_four(out, to, FLOAT_BYTES * out_step, ROWS * out_step)
    else:
        zero_four()
    for step in range(steps):
        add_four(
            rows, at + step * next_depth, BFLOAT16_BYTES * row_step, next_rows, panels, begin + step * TILE, next_panel
        )
    store_four(out, to, FLOAT_BYTES * out_step, ROWS * out_step)


@part()
def _few_rows_by_tiles(
    rows: Any, at: Any, count: Any, size: Any, weights: Any, begin: Any, outputs: Any, out: Any
) -> None:  # fmt: skip
    for row in range(0, count, ROWS):
        zero_0()
        zero_1()
        for j in range(0, size, DEPTH):
            load_rows(rows, at + row * size + j, BFLOAT16_BYTES * size)
            load_weights_0(weights, begin + j * outputs, 2 * BFLOAT16_BYTES * outputs)
            add_0()
            load_weights_1(weights, begin + j * outputs + 2 * OUTPUTS, 2 * BFLOAT16_BYTES * outputs)
            add_1()
        store_0(out, row * OUTPUTS_BY_TILES, FLOAT_BYTES * OUTPUTS_BY_TILES)
        store_1(out, row * OUTPUTS_BY_TILES + OUTPUTS, FLOAT_BYTES * OUTPUTS_BY_TILES)


@part()
def _one_panel_by_tiles(rows: Any, at: Any, size: Any, panel: Any, out: Any) -> None:
    zero_0()
    for j in range(0, size, DEPTH):
        load_rows(rows, at + j, BFLOAT16_BYTES * size)
        load_weights_0(panel, j * OUTPUTS, 2 * BFLOAT16_BYTES * OUTPUTS)
        add_0()
    store_0(out, 0, FLOAT_BYTES * OUTPUTS)


@part()
def _start_dots(shapes: Any) -> None:
    pass


@part()
def _end_dots() -> None:
    pass


@part()
def _square_by_dots(
    rows: Any, at: Any, row_step: Any, next_rows: Any, next_depth: Any, panels: Any, begin: Any, next_panel: Any,
    steps: Any, out: Any, to: Any, out_step: Any, add: Any,
) -> None:  # fmt: skip
    for row in range(0, SIDE, 4):
        start = at + row // ROWS * next_rows + row % ROWS * row_step
        dots_4_2(
            rows, start, row_step, next_depth, panels, begin, next_panel, 2 * OUTPUTS, steps, out, to + row * out_step,
            out_step, 1 if add else 0, 0,
        )  # fmt: skip


@part()
def _few_rows_by_dots(
    rows: Any, at: Any, count: Any, size: Any, weights: Any, begin: Any, outputs: Any, out: Any
) -> None:  # fmt: skip
    # While rows after the first meet weights that are at hand, memory brings the next block's, a share with each four.
    step, steps, ahead = 2 * outputs, size // DEPTH, outputs * size
    for row in range(0, count, 4):
        at_row, to, panel = at + row * size, row * OUTPUTS_BY_DOTS, 2 * OUTPUTS
        if count >= 16 and row < 16:
            dots_4_4_1(
                rows, at_row, size, DEPTH, weights, begin, panel, step, steps, out, to, OUTPUTS_BY_DOTS, 0,
                ahead + row // 4 * panel,
            )  # fmt: skip
        elif 4 < count < 16 and row < 8:
            dots_4_4_2(
                rows, at_row, size, DEPTH, weights, begin, panel, step, steps, out, to, OUTPUTS_BY_DOTS, 0,
                ahead + row // 4 * 2 * panel,
            )  # fmt: skip
        else:
            dots_4_4(rows, at_row, size, DEPTH, weights, begin, panel, step, steps, out, to, OUTPUTS_BY_DOTS, 0, 0)


@part()
def _one_panel_by_dots(rows: Any, at: Any, size: Any, panel: Any, out: Any) -> None:
    for row in range(0, ROWS, 8):
        dots_8_1(
            rows,
            at + row * size,
            size,
            DEPTH,
            panel,
            0,
            0,
            2 * OUTPUTS,
            size // DEPTH,
            out,
            row * OUTPUTS,
            OUTPUTS,
            0,
            0,
        )


start_products = _start_tiles if COMPILES_FOR_TILES else _start_dots
"""Before a thread's first. (the address of `tiles.tile_shapes`)"""
end_products = _end_tiles if COMPILES_FOR_TILES else _end_dots
"""After its last."""
square = _square_by_tiles if COMPILES_FOR_TILES else _square_by_dots
"""out [SIDE, SIDE] = (or +=) rows × two panels, over `steps` × DEPTH of inputs.

(rows, at, from a row to the next, to the second sixteen, from a step to the next; panels, begin, to the second; steps;
out, to, from a row to the next; whether it adds). All count numbers. Panels are [inputs / 2, OUTPUTS, 2].
"""
few_rows = _few_rows_by_tiles if COMPILES_FOR_TILES else _few_rows_by_dots
"""out [count, FEW_OUTPUTS] = rows [count, size] × weights of FEW_OUTPUTS outputs.

(rows, at, count, a multiple of ROWS_AT_ONCE, size; weights, begin, outputs of a block of `tiles.in_tiles`; out). What
lies between blocks of inputs is nothing, so all are read as one.
"""
one_panel = _one_panel_by_tiles if COMPILES_FOR_TILES else _one_panel_by_dots
"""out [ROWS, OUTPUTS] = rows [ROWS, size] × one panel. (rows, at, size; panel; out)"""
