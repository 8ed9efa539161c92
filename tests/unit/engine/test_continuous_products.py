"""Products of few rows: the same numbers in every order of the weight, and a place that matters is noticed."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from model_foundry.engine.continuous_products import Product, check_places
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
