"""What loops do with single numbers, addresses and other threads, where Python has no word for it.

Each is a function that Numba replaces by a few instructions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from model_foundry.models.compiled_loop import BFLOAT16, FLOAT32

_FLOAT, _BITS, _HALF, _WORD = ir.FloatType(), ir.IntType(32), ir.IntType(16), ir.IntType(64)


def primitive(emit: Callable[..., Any]) -> Any:
    return intrinsic(emit)


def _bits(number: int) -> ir.Constant:
    return ir.Constant(_BITS, number)


def _widened(builder: Any, bits: Any) -> Any:
    return builder.bitcast(builder.shl(builder.zext(bits, _BITS), _bits(16)), _FLOAT)


def _narrowed(builder: Any, value: Any) -> Any:
    """To the nearest bfloat16, ties to even."""
    bits = builder.bitcast(value, _BITS)
    odd = builder.and_(builder.lshr(bits, _bits(16)), _bits(1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, _bits(0x7FFF))), _bits(16))
    # Rounding would carry what is no number over into one.
    nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(nan, _bits(0x7FC0), rounded), _HALF)


@primitive
def read(typing: Any, pointer: Any, place: Any) -> Any:
    """A number in memory: floats as float32, others as they are."""
    kind = pointer.dtype

    def load(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = builder.load(builder.gep(args[0], [args[1]]))
        return _widened(builder, value) if kind == BFLOAT16 else value

    return (types.float32 if kind == BFLOAT16 else kind)(pointer, place), load


@primitive
def write(typing: Any, pointer: Any, place: Any, value: Any) -> Any:
    """A number into memory: a float32 as bfloat16 rounded to nearest, ties to even; integers as they are."""

    def store(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = _narrowed(builder, args[2]) if pointer.dtype == BFLOAT16 else args[2]
        builder.store(value, builder.gep(args[0], [args[1]]))
        return context.get_dummy_value()

    return types.void(pointer, place, types.float32 if pointer.dtype == BFLOAT16 else pointer.dtype), store


@primitive
def rounded(typing: Any, pointer: Any, value: Any) -> Any:
    """A float32 as it would be read again after `write`."""

    def change(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _widened(builder, _narrowed(builder, args[1])) if pointer.dtype == BFLOAT16 else args[1]

    return types.float32(pointer, types.float32), change


@primitive
def as_int(typing: Any, value: Any) -> Any:
    """The bits of a float32."""
    return types.int32(types.float32), lambda context, builder, signature, args: builder.bitcast(args[0], _BITS)


@primitive
def as_float(typing: Any, value: Any) -> Any:
    """The float32 of these bits."""
    return types.float32(types.int32), lambda context, builder, signature, args: builder.bitcast(args[0], _FLOAT)


@primitive
def pointer_like(typing: Any, address: Any, pointer: Any) -> Any:
    """An address as a pointer to what the other one points to."""

    def point(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(pointer))

    return pointer(types.int64, pointer), point


def _pointer_to(kind: Any) -> Any:
    def pointer(typing: Any, address: Any) -> Any:
        def point(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(types.CPointer(kind)))

        return types.CPointer(kind)(types.int64), point

    return primitive(pointer)


floats, halves, words = _pointer_to(types.float32), _pointer_to(BFLOAT16), _pointer_to(types.int64)
shorts, pairs = _pointer_to(types.int16), _pointer_to(types.int32)
"""An address as a pointer to float32, to bfloat16, to int64; to a bfloat16, and to two, as they are."""


@primitive
def count_up(typing: Any, counter: Any) -> Any:
    """Add one, as no other thread does at the same instant; what was written before is seen by who sees it."""

    def add(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.atomic_rmw("add", args[0], ir.Constant(_WORD, 1), "acq_rel")
        return context.get_dummy_value()

    return types.void(types.CPointer(types.int64)), add


@primitive
def seen(typing: Any, counter: Any) -> Any:
    """What others have counted."""
    return (
        types.int64(types.CPointer(types.int64)),
        lambda context, builder, signature, args: builder.load_atomic(args[0], "acquire", 8),
    )


@primitive
def call(typing: Any, address: Any) -> Any:
    """The function at an address, which takes nothing and whose answer nobody reads."""

    def there(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.int64), there


LINE_BYTES = 64
"""What a processor fetches at once."""


def ask_for(builder: Any, address: Any) -> None:
    text = ir.IntType(8).as_pointer()
    prefetch = function(builder, "llvm.prefetch.p0", ir.VoidType(), [text, _BITS, _BITS, _BITS])
    # To read; into the second level; no code.
    builder.call(prefetch, [builder.bitcast(address, text), _bits(0), _bits(2), _bits(1)])


@primitive
def fetch(typing: Any, pointer: Any, place: Any) -> Any:
    """Have the memory bring what will be read soon. It may be read by nobody, and need not be there."""

    def ask(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        ask_for(builder, builder.gep(args[0], [args[1]]))
        return context.get_dummy_value()

    return types.void(pointer, types.int64), ask


LANES = 16
_LANES = ir.VectorType(_FLOAT, LANES)
TOGETHER = 4
"""Queries whose sums are made together by `add_weighted`."""


def lanes(builder: Any, pointer: Any, place: Any, kind: Any) -> Any:
    """LANES numbers as float32."""
    start = builder.gep(pointer, [place])
    if kind != BFLOAT16:
        return builder.load(builder.bitcast(start, _LANES.as_pointer()), align=4)
    bits = builder.load(builder.bitcast(start, ir.VectorType(_HALF, LANES).as_pointer()), align=2)
    wide = ir.VectorType(_BITS, LANES)
    return builder.bitcast(builder.shl(builder.zext(bits, wide), ir.Constant(wide, [16] * LANES)), _LANES)


def in_all_lanes(builder: Any, value: Any) -> Any:
    one = builder.insert_element(ir.Constant(_LANES, ir.Undefined), value, _bits(0))
    return builder.shuffle_vector(
        one, ir.Constant(_LANES, ir.Undefined), ir.Constant(ir.VectorType(_BITS, LANES), [0] * LANES)
    )


def _add_weighted(blocks: int) -> Any:
    """For so many times LANES."""

    def add_weighted(
        typing: Any, weights: Any, at: Any, step: Any, rows: Any, first: Any, count: Any, size: Any, sums: Any, to: Any
    ) -> Any:
        def add(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            weights, at, step, values, first, count, size, sums, to = args
            fma = function(builder, "llvm.fma.v16f32", _LANES, [_LANES] * 3)
            offsets = [ir.Constant(_WORD, block * LANES) for block in range(blocks)]
            own = [builder.add(at, builder.mul(step, ir.Constant(_WORD, q))) for q in range(TOGETHER)]
            starts = [builder.add(to, builder.mul(size, ir.Constant(_WORD, q))) for q in range(TOGETHER)]
            places = [[builder.add(start, offset) for offset in offsets] for start in starts]
            held = [
                [cgutils.alloca_once_value(builder, lanes(builder, sums, place, FLOAT32)) for place in row]
                for row in places
            ]
            with cgutils.for_range(builder, count) as each:
                begin = builder.add(first, builder.mul(each.index, size))
                row = [lanes(builder, values, builder.add(begin, offset), rows.dtype) for offset in offsets]
                for place, totals in zip(own, held, strict=True):
                    weight = in_all_lanes(builder, builder.load(builder.gep(weights, [builder.add(place, each.index)])))
                    for value, total in zip(row, totals, strict=True):
                        builder.store(builder.call(fma, [weight, value, builder.load(total)]), total)
            for row, totals in zip(places, held, strict=True):
                for place, total in zip(row, totals, strict=True):
                    there = builder.bitcast(builder.gep(sums, [place]), _LANES.as_pointer())
                    builder.store(builder.load(total), there, align=4)
            return context.get_dummy_value()

        numbers = types.int64
        return types.void(weights, numbers, numbers, rows, numbers, numbers, numbers, sums, numbers), add

    return primitive(add_weighted)


add_weighted, add_weighted_wide = _add_weighted(1), _add_weighted(4)
"""sums[to + q size + l] += Σ_t weights[at + q step + t] × rows[first + t size + l], t < count.

Of TOGETHER q, and of LANES l or four times as many. The sums stay in registers."""


def _sum_of_lanes(builder: Any, value: Any) -> Any:
    """Halves are added until one number is left."""
    width = LANES
    while width > 1:
        width //= 2
        kind, nothing = ir.VectorType(_BITS, width), ir.Constant(value.type, ir.Undefined)
        places = [ir.Constant(kind, [*range(start, start + width)]) for start in (0, width)]
        halves = [builder.shuffle_vector(value, nothing, place) for place in places]
        value = builder.fadd(*halves)
    return builder.extract_element(value, _bits(0))


@primitive
def products_of_rows(
    typing: Any, a: Any, at: Any, a_step: Any, b: Any, begin: Any, b_step: Any, size: Any, out: Any, to: Any,
    out_step: Any,
) -> Any:  # fmt: skip
    """out[to + i out_step + j] = Σ_l a[at + i a_step + l] × b[begin + j b_step + l], l < size, of TOGETHER i and j.

    size is a multiple of LANES. The sums stay in registers.
    """

    def add(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        a_rows, at, a_step, b_rows, begin, b_step, size, out, to, out_step = args
        fma = function(builder, "llvm.fma.v16f32", _LANES, [_LANES] * 3)

        def starts(first: Any, step: Any) -> list[Any]:
            return [builder.add(first, builder.mul(step, ir.Constant(_WORD, i))) for i in range(TOGETHER)]

        a_starts, b_starts = starts(at, a_step), starts(begin, b_step)
        nothing = ir.Constant(_LANES, [ir.Constant(_FLOAT, 0.0)] * LANES)
        sums = [[cgutils.alloca_once_value(builder, nothing) for _ in b_starts] for _ in a_starts]
        with cgutils.for_range(builder, builder.udiv(size, ir.Constant(_WORD, LANES))) as each:
            place = builder.mul(each.index, ir.Constant(_WORD, LANES))
            others = [lanes(builder, b_rows, builder.add(start, place), b.dtype) for start in b_starts]
            for start, row in zip(a_starts, sums, strict=True):
                own = lanes(builder, a_rows, builder.add(start, place), a.dtype)
                for other, total in zip(others, row, strict=True):
                    builder.store(builder.call(fma, [own, other, builder.load(total)]), total)
        for start, row in zip(starts(to, out_step), sums, strict=True):
            for j, total in enumerate(row):
                there = builder.gep(out, [builder.add(start, ir.Constant(_WORD, j))])
                builder.store(_sum_of_lanes(builder, builder.load(total)), there)
        return context.get_dummy_value()

    number = types.int64
    return types.void(a, number, number, b, number, number, number, out, number, number), add


def function(builder: Any, name: str, result: Any, args: Any) -> Any:
    known = builder.module.globals.get(name)
    return known or ir.Function(builder.module, ir.FunctionType(result, args), name)
