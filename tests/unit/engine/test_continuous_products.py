"""Products of few rows: the same numbers in every order of the weight, and a place that matters is noticed."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch.nn import functional

from model_foundry.engine.continuous_products import Product, cancelling_rows, check_places
from model_foundry.errors import EngineError


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
