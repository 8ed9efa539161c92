"""Products of few rows: the same numbers in every order of the weight, and a place that matters is noticed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable

import pytest
import torch
from torch.nn import functional

from model_foundry.engine import continuous_products
from model_foundry.engine.continuous_products import (
    Product,
    blocks_together,
    cancelling_rows,
    check_places,
    find_tiles,
)
from model_foundry.errors import EngineError
from model_foundry.models.small_products import have_products
from model_foundry.models.tiles import in_tiles


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 7, 16, 64])
def test_the_order_of_the_weight_changes_nothing(dtype: torch.dtype, num_rows: int) -> None:
    torch.manual_seed(0)
    weight, bias, x = (torch.randn(*shape, dtype=dtype) for shape in ((40, 24), (40,), (num_rows, 24)))
    want = functional.linear(x.double(), weight.double(), bias.double())
    # Half a unit in the last place of the answer, and of the sum before the bias.
    assert torch.allclose(Product(weight, bias)(x).double(), want, rtol=2 * torch.finfo(dtype).eps, atol=1e-2)


def test_a_product_that_depends_on_the_row_is_refused() -> None:
    """Answers would depend on who else is there, by a bit that flips a near tie once a week."""
    torch.manual_seed(0)
    weight, x = torch.randn(40, 24), torch.randn(16, 24)
    check_places(Product(weight), x)
    with pytest.raises(EngineError, match=r"a row's place here \(24 to 40, float32\)"):
        check_places(lambda rows: Product(weight)(rows) + torch.arange(16)[:, None] * 1e-6, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_whose_terms_cancel_tell_every_order_of_summation(dtype: torch.dtype) -> None:
    """Random rows passed products of 192 rows as those of 64, whose bits were others once in some thousand outputs."""
    torch.manual_seed(0)
    weight = torch.randn(50, 96).to(dtype)
    x = cancelling_rows(weight, 16)
    outputs = torch.linspace(0, 49, 16).long()
    exact = (x.double() @ weight.double().t())[torch.arange(16), outputs]
    assert exact.abs().max() < 1e-9

    terms = (x[:, None].float() * weight[None].float())[torch.arange(16), outputs]

    def summed(places: Iterable[int]) -> torch.Tensor:
        total = torch.zeros(16)
        for place in places:
            total += terms[:, place]
        return total

    assert (summed(range(96)) != summed(reversed(range(96)))).sum() >= 14


def test_blocks_are_put_together_where_their_bits_stay() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(40, 24), torch.randn(4 * 8, 24)

    def by_rows(rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([functional.linear(row[None], weight) for row in rows])

    assert blocks_together(by_rows, x, 8) == {1, 2, 3, 4}
    assert blocks_together(lambda rows: by_rows(rows) * (1 + 1e-6 * (len(rows) > 16)), x, 8) == {1, 2}
    # In the first place alike, in others not.
    uneven = torch.cat([torch.ones(8), torch.full((24,), 1 + 1e-6)])
    assert blocks_together(lambda rows: by_rows(rows) * uneven[: len(rows), None], x, 8) == {1}


def test_the_layout_of_tiles() -> None:
    """[out / 4, 6 pairs, 4 outputs, 2]."""
    weight = torch.arange(8 * 12).view(8, 12)
    tiles = in_tiles(weight, 4)
    assert tiles.shape == (2, 6, 4, 2)
    for output in range(8):
        for place in range(12):
            found = tiles[output // 4, place // 2, output % 4, place % 2]
            assert found == weight[output, place]


@pytest.mark.skipif(not have_products(), reason="this processor multiplies no bfloat16")
def test_an_order_of_the_weight_is_compared_before_tiles_are_read_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 128, dtype=torch.bfloat16)
    ordered = torch.ops.mkldnn._reorder_linear_weight(weight)
    found = find_tiles(weight, ordered)
    assert found is not None
    assert found.outputs % 32 == 0
    # Few rows are multiplied by tiles read out of that order, padded or not.
    product = Product(weight)
    for num_rows in (1, 7, 16):
        x = torch.randn(num_rows, 128, dtype=torch.bfloat16)
        want = functional.linear(x.double(), weight.double())
        assert torch.allclose(product(x).double(), want, rtol=2**-7, atol=1e-2)
        assert torch.equal(product(x), product(torch.cat([x, x])[:16])[:num_rows])
    other = weight.clone()
    other[63, 127] += 1
    assert find_tiles(other, ordered) is None
    # The first of a shape whole.
    other = weight.clone()
    other[0, 0] += 1
    monkeypatch.setattr(continuous_products, "_orders", {})
    assert find_tiles(other, ordered) is None
    assert find_tiles(weight, ordered) == found
    assert find_tiles(weight[:32], ordered) is None
    assert Product(torch.randn(40, 24, dtype=torch.bfloat16)).tiles is None


@pytest.mark.slow
def test_where_nothing_is_compiled_torch_multiplies() -> None:
    """A loop that was asked for all the same is no loop, and serving ended with an error of the compiler's."""
    code = """
import torch
from model_foundry.engine.continuous_products import Product
weight = torch.eye(64, dtype=torch.bfloat16)
x = torch.arange(128.0).view(2, 64).bfloat16()
print(Product(weight).tiles is None and torch.equal(Product(weight)(x), x))
"""
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"]
