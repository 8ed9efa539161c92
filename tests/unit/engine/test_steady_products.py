"""Products cut into numbers of rows that give every row its own bits, in whatever company."""

from __future__ import annotations

import pytest
import torch

from model_foundry.engine.steady_products import Sizes, SteadyProduct
from model_foundry.errors import EngineError


class Kernels:
    """x Mᵀ as a BLAS does it that adds up from the other end above 64 rows, but for one number."""

    def __init__(self, matrix: torch.Tensor, like_64: int) -> None:
        self.matrix, self.like_64 = matrix, like_64
        self.called: list[int] = []

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.called.append(x.shape[0])
        ascending = x.shape[0] in (64, self.like_64)
        order = range(x.shape[1]) if ascending else reversed(range(x.shape[1]))
        total = torch.zeros(x.shape[0], self.matrix.shape[0])
        for place in order:
            total += x[:, place, None] * self.matrix[None, :, place]
        return total


@pytest.mark.parametrize(
    ("num_rows", "cut"),
    [(64, [64]), (96, [64, 64]), (128, [64, 64]), (160, [64, 64, 64]), (256, [256]), (288, [256, 64])],
)
def test_a_row_has_the_same_bits_among_any_number(num_rows: int, cut: list[int]) -> None:
    """96 rows that differed from 64, in one product of a hundred, switched shared passes off for the whole service."""
    torch.manual_seed(0)
    kernels = Kernels(torch.randn(24, 48), like_64=256)
    product = SteadyProduct(kernels, matrix=kernels.matrix, sizes=Sizes())
    x = torch.randn(num_rows, 48)
    alone = torch.cat([x[-1:], torch.zeros(63, 48)])
    want = product(alone)[0]
    product.try_rows(num_rows)
    kernels.called.clear()
    assert torch.equal(product(x)[-1], want)
    assert kernels.called == cut


def test_a_kernel_that_knows_no_steady_number_is_refused() -> None:
    matrix = torch.randn(24, 48)

    def by_place(x: torch.Tensor) -> torch.Tensor:
        return x @ matrix.t() + torch.arange(x.shape[0])[:, None] * 1e-6

    with pytest.raises(EngineError, match="products of 96 rows depend on who else is in them"):
        SteadyProduct(by_place, matrix=matrix, sizes=Sizes()).try_rows(96)
