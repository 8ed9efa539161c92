"""What the loops of attention do with sixteen numbers at once, in the registers that processors with tiles have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils

from model_foundry.models.primitives import LANES, function, in_all_lanes, lanes, primitive

binding.initialize_native_asmparser()  # for the one instruction that is written as such

_FLOAT, _BITS, _SHORT, _WORD = ir.FloatType(), ir.IntType(32), ir.IntType(16), ir.IntType(64)
_FLOATS, _INTS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_BITS, LANES)
_SHORTS = ir.VectorType(_SHORT, 2 * LANES)
_LEAST = float("-inf")
# One number of each of two rows after the other, where the rows are the halves.
_IN_PAIRS = [half * LANES + lane for lane in range(LANES) for half in (0, 1)]
NUMBERS = types.int64


def _number(value: int) -> ir.Constant:
    return ir.Constant(_WORD, value)


def _all(value: float) -> ir.Constant:
    return ir.Constant(_FLOATS, [value] * LANES)


def _bits(value: int) -> ir.Constant:
    return ir.Constant(_INTS, [value] * LANES)


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return builder.call(function(builder, "llvm.fma.v16f32", _FLOATS, [_FLOATS] * 3), [a, b, c])


def _exp(builder: Any, x: Any) -> Any:
    """As `cpu_loops.exp`: e^x of what is not above 0 (or by a rounding); 0 from -87 down."""
    too_small = builder.fcmp_ordered("<", x, _all(-87.0))
    y = builder.select(too_small, _all(-87.0), x)
    shifted = _fma(builder, y, _all(1.44269504088896341), _all(12582912.0))
    n = builder.fsub(shifted, _all(12582912.0))
    r = _fma(builder, n, _all(2.12194440e-4), _fma(builder, n, _all(-0.693359375), y))
    p = _all(1.9875691500e-4)
    for factor in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = _fma(builder, p, r, _all(factor))
    e = builder.fadd(_fma(builder, builder.fmul(p, r), r, r), _all(1.0))
    power = builder.add(builder.shl(builder.bitcast(shifted, _INTS), _bits(23)), _bits(127 << 23))
    return builder.select(too_small, _all(0.0), builder.fmul(e, builder.bitcast(power, _FLOATS)))


def _narrowed(builder: Any, low: Any, high: Any) -> Any:
    """Two times LANES as bfloat16, rounded to nearest, ties to even."""
    kind = ir.FunctionType(_SHORTS, [_FLOATS, _FLOATS])
    return builder.asm(kind, "vcvtne2ps2bf16 $1, $2, $0", "=v,v,v", [low, high], False)


def _put(builder: Any, value: Any, pointer: Any, place: Any, align: int = 2) -> None:
    builder.store(value, builder.bitcast(builder.gep(pointer, [place]), value.type.as_pointer()), align=align)


def _get(builder: Any, pointer: Any, place: Any, offset: int = 0) -> Any:
    return lanes(builder, pointer, builder.add(place, _number(offset)), types.float32)


def _larger(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _joined(builder: Any, vector: Any, join: Callable[[Any, Any, Any], Any]) -> Any:
    """All lanes' numbers joined, half with half."""
    for distance in (8, 4, 2, 1):
        order = ir.Constant(_INTS, [lane ^ distance for lane in range(LANES)])
        vector = join(builder, vector, builder.shuffle_vector(vector, vector, order))
    return builder.extract_element(vector, ir.Constant(_BITS, 0))


@primitive
def turn_block(typing: Any, x: Any, at: Any, step: Any, out: Any, to: Any, out_step: Any) -> Any:
    """A square of 64 bytes a side transposed: rows `step` numbers apart become columns of those `out_step` apart.

    By exchanges of halves, of quarters, and so on, down to single numbers (Eklundh 1972).
    """
    bits = x.dtype.bitwidth
    side = 512 // bits

    def turn(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, at, step, out, to, out_step = args
        row = ir.VectorType(ir.IntType(bits), side)

        def places(start: Any, apart: Any) -> list[Any]:
            return [builder.add(start, builder.mul(apart, _number(number))) for number in range(side)]

        rows = [
            builder.load(builder.bitcast(builder.gep(x, [place]), row.as_pointer()), align=bits // 8)
            for place in places(at, step)
        ]
        distance = side // 2
        while distance:
            above = [lane if not lane & distance else side + lane - distance for lane in range(side)]
            below = [lane + distance if not lane & distance else side + lane for lane in range(side)]
            upper, lower = (ir.Constant(ir.VectorType(_BITS, side), order) for order in (above, below))
            for number in range(side):
                if not number & distance:
                    first, second = rows[number], rows[number + distance]
                    rows[number] = builder.shuffle_vector(first, second, upper)
                    rows[number + distance] = builder.shuffle_vector(first, second, lower)
            distance //= 2
        for value, place in zip(rows, places(to, out_step), strict=True):
            _put(builder, value, out, place, bits // 8)
        return context.get_dummy_value()

    return types.void(x, NUMBERS, NUMBERS, out, NUMBERS, NUMBERS), turn


@primitive
def pair_rows(typing: Any, x: Any, at: Any, step: Any, out: Any, to: Any) -> Any:
    """LANES numbers of 16 bits, and those `step` after them, by turns."""

    def pair(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, at, step, out, to = args
        row = ir.VectorType(_SHORT, LANES)
        first, second = (
            builder.load(builder.bitcast(builder.gep(x, [place]), row.as_pointer()), align=2)
            for place in (at, builder.add(at, step))
        )
        order = ir.Constant(ir.VectorType(_BITS, 2 * LANES), _IN_PAIRS)
        _put(builder, builder.shuffle_vector(first, second, order), out, to)
        return context.get_dummy_value()

    return types.void(x, NUMBERS, NUMBERS, out, NUMBERS), pair


@primitive
def largest_in_lanes(typing: Any, x: Any, at: Any, count: Any) -> Any:
    """Of so many float32, a multiple of two times LANES. What is no number is passed over."""

    def find(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, at, count = args
        held = [cgutils.alloca_once_value(builder, _all(_LEAST)) for _ in range(2)]
        with cgutils.for_range(builder, builder.udiv(count, _number(2 * LANES))) as each:
            begin = builder.add(at, builder.mul(each.index, _number(2 * LANES)))
            for number, most in enumerate(held):
                builder.store(_larger(builder, _get(builder, x, begin, number * LANES), builder.load(most)), most)
        return _joined(builder, _larger(builder, *map(builder.load, held)), _larger)

    return types.float32(x, NUMBERS, NUMBERS), find


@primitive
def powers(
    typing: Any, x: Any, at: Any, count: Any, largest: Any, scale: Any, out: Any, to: Any, step: Any
) -> Any:  # fmt: skip
    """The sum of e^(scale (x - largest)); they go to `out` as bfloat16, two times LANES a place, `step` to the next."""

    def find(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, at, count, largest, scale, out, to, step = args
        held = cgutils.alloca_once_value(builder, _all(0.0))
        less, factor = in_all_lanes(builder, largest), in_all_lanes(builder, scale)
        with cgutils.for_range(builder, builder.udiv(count, _number(2 * LANES))) as each:
            begin = builder.add(at, builder.mul(each.index, _number(2 * LANES)))
            apart = [builder.fsub(_get(builder, x, begin, offset), less) for offset in (0, LANES)]
            low, high = (_exp(builder, builder.fmul(each, factor)) for each in apart)
            builder.store(builder.fadd(builder.load(held), builder.fadd(low, high)), held)
            _put(builder, _narrowed(builder, low, high), out, builder.add(to, builder.mul(each.index, step)))
        return _joined(builder, builder.load(held), lambda builder, a, b: builder.fadd(a, b))

    numbers = NUMBERS
    return types.float32(x, numbers, numbers, types.float32, types.float32, out, numbers, numbers), find


@primitive
def slopes_of_scores(
    typing: Any, scores: Any, slopes: Any, at: Any, sums: Any, along: Any, of: Any, p: Any, ds: Any, to: Any,
    panels: Any, place: Any, next_panel: Any,
) -> Any:  # fmt: skip
    """Of two rows (keys) of two times LANES queries: probabilities e^(score - sum), and the gradients of scores,
    p (slope - along).

    Both go as bfloat16 rows to `to` of p and of ds; the latter also in pairs to `place` of panels, and to the next.
    """

    def find(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        scores, slopes, at, sums, along, of, p, ds, to, panels, place, next_panel = args
        rows: list[list[Any]] = []
        for row in (0, 1):
            chances, changes = [], []
            for offset in (0, LANES):
                score = _get(builder, scores, at, row * 2 * LANES + offset)
                slope = _get(builder, slopes, at, row * 2 * LANES + offset)
                chance = _exp(builder, builder.fsub(score, _get(builder, sums, of, offset)))
                chances.append(chance)
                changes.append(builder.fmul(chance, builder.fsub(slope, _get(builder, along, of, offset))))
            line = builder.add(to, _number(row * 2 * LANES))
            _put(builder, _narrowed(builder, *chances), p, line)
            _put(builder, _narrowed(builder, *changes), ds, line)
            rows.append(changes)
        order = ir.Constant(ir.VectorType(_BITS, 2 * LANES), _IN_PAIRS)
        for panel, (first, second) in enumerate(zip(*rows, strict=True)):
            both = _narrowed(builder, first, second)
            mixed = builder.shuffle_vector(both, ir.Constant(_SHORTS, ir.Undefined), order)
            _put(builder, mixed, panels, builder.add(place, next_panel) if panel else place)
        return context.get_dummy_value()

    n = NUMBERS
    return types.void(scores, slopes, n, sums, along, n, p, ds, n, panels, n, n), find
