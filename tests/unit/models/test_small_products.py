"""Products of small pieces of bfloat16: every way that a processor has gives what float64 gives, from each layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numba import types

from model_foundry.models import small_products as products
from model_foundry.models.compiled_loop import BFLOAT16, CompiledLoop, loop
from model_foundry.models.dots import HAVE_DOTS
from model_foundry.models.small_products import OUTPUTS_BY_DOTS, OUTPUTS_BY_TILES, SIDE, TILE
from model_foundry.models.tiles import OUTPUTS, ROWS, have_tiles, in_tiles, tile_shapes

WAYS = [way for way, is_here in (("tiles", have_tiles()), ("dots", HAVE_DOTS)) if is_here]


def part(name: str, way: str) -> Any:
    return getattr(products, f"_{name}_by_{way}")


def square_loop(way: str) -> CompiledLoop:
    start, square, end = getattr(products, f"_start_{way}"), part("square", way), getattr(products, f"_end_{way}")

    @loop("int", "x*", "int", "int", "int", "x*", "int", "int", "float32*", "int")
    def multiply(
        shapes: int, rows: Any, row_step: int, next_rows: int, next_depth: int, panels: Any, next_panel: int,
        steps: int, out: Any, out_step: int, first: int, last: int,
    ) -> None:  # fmt: skip
        start(shapes)
        square(
            rows, 32, row_step, next_rows, next_depth, panels, 32, next_panel, steps, out, OUTPUTS, out_step, first == 1
        )  # fmt: skip
        end()

    return multiply


def rows_loop(way: str) -> CompiledLoop:
    start, few, end = getattr(products, f"_start_{way}"), part("few_rows", way), getattr(products, f"_end_{way}")
    one = part("one_panel", way)

    @loop("int", "x*", "int", "int", "x*", "int", "float32*", "x*", "float32*")
    def multiply(
        shapes: int, rows: Any, count: int, size: int, weights: Any, outputs: int, out: Any, panel: Any, other: Any,
        first: int, last: int,
    ) -> None:  # fmt: skip
        start(shapes)
        few(rows, 0, count, size, weights, first * 2, outputs, out)
        one(rows, 0, size, panel, other)
        end()

    return multiply


def as_panels(x: torch.Tensor) -> torch.Tensor:
    """[columns, depth] → [columns / 16, depth / 2, 16, 2]."""
    return in_tiles(x, OUTPUTS)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("in_pieces", [False, True])
def test_a_square_is_made_from_rows_and_from_tiles(way: str, in_pieces: bool) -> None:
    torch.manual_seed(0)
    depth, shapes = 96, torch.from_numpy(tile_shapes())
    left, right = (torch.randn(SIDE, depth).bfloat16() for _ in range(2))
    rows, steps = (left, (depth, ROWS * depth, 32)), depth // 32
    if in_pieces:
        # [depth / 32, 2, 16, 32]: tiles two by two.
        rows = left.view(2, ROWS, steps, 32).permute(2, 0, 1, 3).contiguous(), (32, TILE, 2 * TILE)
    before = torch.zeros(32, dtype=torch.bfloat16)  # so that what begins later is told from what begins at once
    laid, panels = torch.cat([before, rows[0].reshape(-1)]), torch.cat([before, as_panels(right).reshape(-1)])
    out = torch.full((SIDE, SIDE + OUTPUTS), 0.5)
    call, want = square_loop(way).of(BFLOAT16), left.double() @ right.double().t()
    for add in (0, 1):
        call(
            shapes.data_ptr(), laid.data_ptr(), *rows[1], panels.data_ptr(), OUTPUTS * depth, steps, out.data_ptr(),
            SIDE + OUTPUTS, add, add,
        )  # fmt: skip
        torch.testing.assert_close(out[:, OUTPUTS:].double(), want * (1 + add), rtol=1e-5, atol=1e-4)
    assert torch.all(out[:, :OUTPUTS] == 0.5), "nothing beside it was written"


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_few_rows_meet_weights_and_a_row_s_bits_are_its_own(way: str) -> None:
    torch.manual_seed(0)
    size, shapes = 160, torch.from_numpy(tile_shapes())
    at_once = OUTPUTS_BY_TILES if way == "tiles" else OUTPUTS_BY_DOTS
    outputs = 2 * at_once
    rows, weights = torch.randn(ROWS, size).bfloat16(), torch.randn(outputs, size).bfloat16()
    blocks, panel = in_tiles(weights, outputs), as_panels(weights[:OUTPUTS])
    call = rows_loop(way).of(BFLOAT16)

    def found(x: torch.Tensor, count: int, output: int) -> tuple[torch.Tensor, torch.Tensor]:
        out, other = torch.full((count + 1, at_once), 0.5), torch.zeros(ROWS, OUTPUTS)
        call(
            shapes.data_ptr(), x.data_ptr(), count, size, blocks.data_ptr(), outputs, out.data_ptr(),
            panel.data_ptr(), other.data_ptr(), output, output,
        )  # fmt: skip
        assert torch.all(out[count] == 0.5), "nothing after it was written"
        return out[:count], other

    want = rows.double() @ weights.double().t()
    for output in (0, at_once):
        out, other = found(rows, ROWS, output)
        torch.testing.assert_close(out.double(), want[:, output : output + at_once], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(other.double(), want[:, :OUTPUTS], rtol=1e-5, atol=1e-4)
    turned, of_turned = found(rows.roll(3, 0), ROWS, at_once)
    assert torch.equal(turned, out.roll(3, 0))
    assert torch.equal(of_turned, other.roll(3, 0))
    if way == "dots":
        assert torch.equal(found(rows, 4, at_once)[0], out[:4])


def test_code_is_kept_for_the_parts_that_were_handed_to_a_loop() -> None:
    """Both ways had one name, and whichever was compiled first was run for the other."""
    signature = types.void(types.int64)
    assert square_loop("tiles").kept_at(signature) != square_loop("dots").kept_at(signature)
    assert square_loop("dots").kept_at(signature) == square_loop("dots").kept_at(signature)
