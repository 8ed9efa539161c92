"""Products of bfloat16 tiles, where a processor multiplies them in one instruction (Intel's AMX, 2023).

A tile is 16 rows of 64 bytes. A product adds to a tile of [16 rows, 16 outputs] float32 that of a tile of 16 rows of 32
inputs, and one of 16 outputs' weights for those inputs, in pairs: [input / 2, output, 2].
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types

from model_foundry.models.compiled_loop import compiles_for
from model_foundry.models.primitives import primitive

ROWS, OUTPUTS, DEPTH = 16, 16, 32
"""Rows, outputs and inputs of a tile."""
_BYTE, _WORD, _VOID = ir.IntType(8), ir.IntType(64), ir.VoidType()
_TEXT = _BYTE.as_pointer()
_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _TILE_DATA = 158, 0x1023, 18


COMPILES_FOR_TILES = sys.platform == "linux" and compiles_for("amx-tile", "amx-bf16", "avx512f", "avx512bf16")


@functools.cache
def have_tiles() -> bool:
    """Whether this processor has them and the system lets this process use them, which has to be asked for once."""
    return COMPILES_FOR_TILES and ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _TILE_DATA) == 0


def tile_shapes() -> np.ndarray:
    """uint8 [64]: what `shape_tiles` is to be shown."""
    shapes = np.zeros(64, np.uint8)
    shapes[0] = 1
    shapes[16:32:2], shapes[48:56] = 64, ROWS
    return shapes


def _do(context: Any, builder: Any, name: str, *args: Any) -> Any:
    kind = ir.FunctionType(_VOID, [arg.type for arg in args])
    known = builder.module.globals.get(f"llvm.x86.{name}")
    builder.call(known or ir.Function(builder.module, kind, f"llvm.x86.{name}"), args)
    return context.get_dummy_value()


def _tile(number: int) -> ir.Constant:
    return ir.Constant(_BYTE, number)


@primitive
def shape_tiles(typing: Any, address: Any) -> Any:
    """Before a thread's first tile. address: of `tile_shapes`."""
    return types.void(types.int64), lambda context, builder, signature, args: _do(
        context, builder, "ldtilecfg", builder.inttoptr(args[0], _TEXT)
    )


@primitive
def leave_tiles(typing: Any) -> Any:
    """After its last: the thread is cheaper to switch."""
    return types.void(), lambda context, builder, signature, args: _do(context, builder, "tilerelease")


def _each(name: str, *tiles: int) -> Any:
    def act(typing: Any) -> Any:
        return types.void(), lambda context, builder, signature, args: _do(context, builder, name, *map(_tile, tiles))

    return primitive(act)


def _moved(name: str, number: int) -> Any:
    def move(typing: Any, pointer: Any, place: Any, step: Any) -> Any:
        def there(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            start = builder.bitcast(builder.gep(args[0], [args[1]]), _TEXT)
            return _do(context, builder, name, _tile(number), start, args[2])

        return types.void(pointer, types.int64, types.int64), there

    return primitive(move)


zero_0, zero_1 = (_each("tilezero", number) for number in (0, 1))
"""Sums 0 and 1 are tiles 0 and 1; rows are tile 2, and weights 0 and 1 tiles 3 and 4."""
add_0, add_1 = _each("tdpbf16ps", 0, 2, 3), _each("tdpbf16ps", 1, 2, 4)
"""To a sum the product of the rows and those weights."""
load_rows, load_weights_0, load_weights_1 = (_moved("tileloadd64", number) for number in (2, 3, 4))
store_0, store_1 = (_moved("tilestored64", number) for number in (0, 1))
"""(pointer, place, bytes from one row of the tile to the next)."""


@primitive
def zero_four(typing: Any) -> Any:
    """Sums 0 to 3, [2, 2] tiles, are nothing."""

    def act(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for number in range(4):
            _do(context, builder, "tilezero", _tile(number))
        return context.get_dummy_value()

    return types.void(), act


def _four_moved(name: str) -> Any:
    def move(typing: Any, pointer: Any, place: Any, step: Any, next_rows: Any) -> Any:
        def act(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            start, place, step, next_rows = args
            for number in range(4):
                column = builder.add(place, ir.Constant(_WORD, number % 2 * OUTPUTS))
                at = builder.add(column, next_rows) if number // 2 else column
                _do(context, builder, name, _tile(number), builder.bitcast(builder.gep(start, [at]), _TEXT), step)
            return context.get_dummy_value()

        return types.void(pointer, types.int64, types.int64, types.int64), act

    return primitive(move)


load_four, store_four = _four_moved("tileloadd64"), _four_moved("tilestored64")
"""The four sums, float32 (pointer, place, bytes to the next row, numbers to the lower two)."""


@primitive
def add_four(
    typing: Any, rows: Any, at: Any, step: Any, next_rows: Any, panels: Any, place: Any, next_panel: Any
) -> Any:
    """To the four sums the products of two tiles of rows, `step` bytes from row to row, with two that lie in one
    piece, in pairs of inputs, and are `next_panel` numbers apart."""

    def act(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows, at, step, next_rows, panels, place, next_panel = args
        line = ir.Constant(_WORD, 4 * OUTPUTS)
        for number, (pointer, start, apart) in enumerate(
            ((rows, at, step), (rows, builder.add(at, next_rows), step), (panels, place, line),
             (panels, builder.add(place, next_panel), line)), 4
        ):  # fmt: skip
            address = builder.bitcast(builder.gep(pointer, [start]), _TEXT)
            _do(context, builder, "tileloadd64", _tile(number), address, apart)
        for number in range(4):
            _do(context, builder, "tdpbf16ps", _tile(number), _tile(4 + number // 2), _tile(6 + number % 2))
        return context.get_dummy_value()

    numbers = types.int64
    return types.void(rows, numbers, numbers, numbers, panels, numbers, numbers), act


def in_tiles(weight: torch.Tensor, outputs: int) -> torch.Tensor:
    """bfloat16 [out, in] as blocks of so many outputs, in pairs of inputs: from a block every tile is read, and blocks
    lie one after the other. [out / outputs, in / 2, outputs, 2]."""
    num_out, num_in = weight.shape
    return weight.view(num_out // outputs, outputs, num_in // 2, 2).permute(0, 2, 1, 3).contiguous()
