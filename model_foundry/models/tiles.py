"""Products of bfloat16 tiles, where a processor multiplies them in one instruction (Intel's AMX, 2023).

A tile is 16 rows of 64 bytes. `dot` adds to tile 0, [16 outputs, 16 rows] float32, the product of tile 1, 16 outputs'
weights for 32 inputs, and tile 2, those inputs of 16 rows in pairs.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import sys
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types

from model_foundry.models.primitives import primitive

ROWS, DEPTH = 16, 32
"""Rows and outputs of a tile, and inputs."""
_BYTE, _WORD, _VOID = ir.IntType(8), ir.IntType(64), ir.VoidType()
_TEXT = _BYTE.as_pointer()
_NEEDED = ("amx-tile", "amx-bf16")
_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _TILE_DATA = 158, 0x1023, 18


@functools.cache
def have_tiles() -> bool:
    """Whether this processor has them and the system lets this process use them, which has to be asked for once."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    features = llvmlite.binding.get_host_cpu_features()
    if not all(features.get(name) for name in _NEEDED):
        return False
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _TILE_DATA) == 0


def tile_shapes() -> np.ndarray:
    """uint8 [64]: what `shape_tiles` is to be shown."""
    shapes = np.zeros(64, np.uint8)
    shapes[0] = 1
    shapes[16:22:2], shapes[48:51] = 64, ROWS
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


@primitive
def zero(typing: Any) -> Any:
    """Tile 0."""
    return types.void(), lambda context, builder, signature, args: _do(context, builder, "tilezero", _tile(0))


@primitive
def dot(typing: Any) -> Any:
    return types.void(), lambda context, builder, signature, args: _do(
        context, builder, "tdpbf16ps", _tile(0), _tile(1), _tile(2)
    )


def _moved(name: str, number: int) -> Any:
    def move(typing: Any, pointer: Any, place: Any, step: Any) -> Any:
        def there(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            start = builder.bitcast(builder.gep(args[0], [args[1]]), _TEXT)
            return _do(context, builder, name, _tile(number), start, args[2])

        return types.void(pointer, types.int64, types.int64), there

    return primitive(move)


load_weights, load_rows, store = _moved("tileloadd64", 1), _moved("tileloadd64", 2), _moved("tilestored64", 0)
"""(pointer, place, bytes from one row of the tile to the next): into tiles 1 and 2, and tile 0 out."""
