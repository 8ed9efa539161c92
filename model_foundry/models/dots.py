"""Products of bfloat16 in registers, where an instruction adds two of them to each of sixteen sums (AVX-512 BF16).

Operands lie as those of `tiles` do: rows as they are or in tiles, weights in panels of sixteen outputs, in pairs of
inputs.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils

from model_foundry.models.compiled_loop import compiles_for
from model_foundry.models.primitives import LANES, ask_for, primitive

binding.initialize_native_asmparser()

_FLOAT, _BITS, _WORD = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_FLOATS, _INTS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_BITS, LANES)
PAIRS = 16
"""Of inputs that lie one after the other in a row."""


HAVE_DOTS = compiles_for("avx512f", "avx512bf16")
"""Whether this processor has them."""


def _number(value: int) -> ir.Constant:
    return ir.Constant(_WORD, value)


def _vector(builder: Any, pointer: Any, place: Any, kind: Any) -> Any:
    return builder.load(builder.bitcast(builder.gep(pointer, [place]), kind.as_pointer()), align=2)


def _pair_in_all_lanes(builder: Any, pointer: Any, place: Any) -> Any:
    pair = builder.load(builder.bitcast(builder.gep(pointer, [place]), _BITS.as_pointer()), align=2)
    one = builder.insert_element(ir.Constant(_INTS, ir.Undefined), pair, ir.Constant(_BITS, 0))
    return builder.shuffle_vector(one, ir.Constant(_INTS, ir.Undefined), ir.Constant(_INTS, [0] * LANES))


def _add_dots(builder: Any, total: Any, panel: Any, row: Any) -> Any:
    kind = ir.FunctionType(_FLOATS, [_FLOATS, _INTS, _INTS])
    return builder.asm(kind, "vdpbf16ps $3, $2, $0", "=v,0,v,v", [total, panel, row], False)


def _dots(num_rows: int, num_panels: int, num_fetched: int = 0) -> Any:
    """For so many rows and panels; more sums than latencies, and no more than registers hold.

    num_fetched: panels of which the memory is asked for what lies `ahead` of each pair.
    """

    def dots(
        typing: Any, rows: Any, at: Any, row_step: Any, next_depth: Any, panels: Any, begin: Any, next_panel: Any,
        pair_step: Any, steps: Any, out: Any, to: Any, out_step: Any, add: Any, ahead: Any,
    ) -> Any:  # fmt: skip
        """out [rows, panels × LANES] float32 = (or +=, where `add` is not 0) rows × panels.

        A step is 2 × PAIRS inputs; from one to the next it is `next_depth` numbers in a row. Panels' pairs are
        `pair_step` numbers apart all along.
        """

        def act(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            rows, at, row_step, next_depth, panels, begin, next_panel, pair_step = args[:8]
            steps, out, to, out_step, add, ahead = args[8:]
            starts = [builder.add(at, builder.mul(row_step, _number(r))) for r in range(num_rows)]
            firsts = [builder.add(begin, builder.mul(next_panel, _number(p))) for p in range(num_panels)]
            places = [
                [builder.add(builder.add(to, builder.mul(out_step, _number(r))), _number(p * LANES))
                 for p in range(num_panels)] for r in range(num_rows)
            ]  # fmt: skip
            adds, nothing = builder.icmp_signed("!=", add, _number(0)), ir.Constant(_FLOATS, [0.0] * LANES)

            def begun(place: Any) -> Any:
                there = builder.select(adds, _vector(builder, out, place, _FLOATS), nothing)
                return cgutils.alloca_once_value(builder, there)

            totals = [[begun(place) for place in row] for row in places]
            with cgutils.for_range(builder, steps) as step:
                depth = builder.mul(step.index, next_depth)
                along = builder.mul(builder.mul(step.index, pair_step), _number(PAIRS))
                with cgutils.for_range(builder, _number(PAIRS)) as pair:
                    offset = builder.add(along, builder.mul(pair.index, pair_step))
                    held = [_vector(builder, panels, builder.add(first, offset), _INTS) for first in firsts]
                    for number in range(num_fetched):
                        there = builder.add(builder.add(firsts[number], offset), ahead)
                        ask_for(builder, builder.gep(panels, [there]))
                    inputs = builder.add(depth, builder.mul(pair.index, _number(2)))
                    for start, sums in zip(starts, totals, strict=True):
                        row = _pair_in_all_lanes(builder, rows, builder.add(start, inputs))
                        for panel, total in zip(held, sums, strict=True):
                            builder.store(_add_dots(builder, builder.load(total), panel, row), total)
            for row, sums in zip(places, totals, strict=True):
                for place, total in zip(row, sums, strict=True):
                    there = builder.bitcast(builder.gep(out, [place]), _FLOATS.as_pointer())
                    builder.store(builder.load(total), there, align=4)
            return context.get_dummy_value()

        n = types.int64
        return types.void(rows, n, n, n, panels, n, n, n, n, out, n, n, n, n), act

    return primitive(dots)


dots_4_2, dots_4_4, dots_8_1 = _dots(4, 2), _dots(4, 4), _dots(8, 1)
dots_4_4_1, dots_4_4_2 = _dots(4, 4, 1), _dots(4, 4, 2)
