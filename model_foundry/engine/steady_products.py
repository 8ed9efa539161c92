"""Products whose rows are the same bits in whatever company: the number of rows is cut into sizes that were tried.

A BLAS chooses its kernel, and so its order of summation, by the number of rows. Many numbers give one row the same
bits all the same, and which do is found by trying, with rows whose sums are nothing but rounding; where a number does
not, the rows are multiplied in parts. It knows matrices. It does not know layers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from model_foundry.engine.continuous_products import Product, cancelling_rows
from model_foundry.engine.platform import multiplies_bfloat16
from model_foundry.errors import EngineError

STEP_ROWS = 32
"""Rows come in multiples of this: on a CPU every other number costs kernels that stay in memory."""
LEAST_ROWS = 64
"""The fewest rows of a product, and those that the others are compared with."""

_PARTS = (512, 256, 192, 128, 96, LEAST_ROWS)
"""Where a number of rows does not hold, the first part is the largest of these that does; every trial takes time."""

Multiply = Callable[[torch.Tensor], torch.Tensor]


class SteadyProduct:
    """x [N, in] → x Mᵀ + bias [N, out], N a multiple of 32 from 64 on; a row's bits depend on that row alone.

    Args:
        multiply: the product.
        matrix: M [out, in].
        sizes: what is known of products of this shape; shared by all of them.

    Raises:
        EngineError: on the first call, where even one number of rows gives a row other bits in another place.
    """

    def __init__(self, multiply: Multiply, *, matrix: torch.Tensor, sizes: Sizes) -> None:
        self._multiply, self._matrix, self.sizes = multiply, matrix, sizes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        num_rows = x.shape[0]
        parts = self.sizes.parts(num_rows, self._is_steady)
        if len(parts) == 1:
            return self._multiply(x)
        if (spare := sum(parts) - num_rows) > 0:
            x = torch.cat([x, x.new_zeros(spare, x.shape[1])])
        return torch.cat([self._multiply(part) for part in x.split(parts)])[:num_rows]

    def try_rows(self, num_rows: int) -> None:
        """Find out how so many rows are cut. Raises: EngineError: as a call would."""
        self.sizes.parts(num_rows, self._is_steady)

    @torch.no_grad()
    def _is_steady(self, num_rows: int) -> bool:
        """Whether so many rows give each row the bits that it has among `LEAST_ROWS`, wherever it stands."""
        pool = cancelling_rows(self._matrix, LEAST_ROWS)
        want = self._multiply(pool)
        # 7 and 64 have no common factor: every row comes, at other places in every block.
        places = (torch.arange(num_rows) * 7 + 3) % LEAST_ROWS
        return torch.equal(self._multiply(pool[places]), want[places])


class Sizes:
    """Which numbers of rows were tried for one shape of products, and how others are cut into them."""

    def __init__(self) -> None:
        self._tried: dict[int, bool] = {}
        self._cut: dict[int, list[int]] = {}

    def parts(self, num_rows: int, is_steady: Callable[[int], bool]) -> list[int]:
        """Numbers of rows, each of them tried, that add up to `num_rows` or to a little more; few of them.

        Raises:
            EngineError: not even the least number can be relied on.
        """
        if num_rows not in self._cut:
            self._cut[num_rows] = self._search(num_rows, is_steady)
        return self._cut[num_rows]

    def _search(self, num_rows: int, is_steady: Callable[[int], bool]) -> list[int]:
        if num_rows < LEAST_ROWS or num_rows % STEP_ROWS:
            raise EngineError(f"{num_rows} rows; a steady product has a multiple of {STEP_ROWS} from {LEAST_ROWS} on")
        for first in (num_rows, *(part for part in _PARTS if part < num_rows)):
            if self._holds(first, is_steady):
                rest = num_rows - first
                return [first, *(self._search(max(rest, LEAST_ROWS), is_steady) if rest else ())]
        what = f"products of {num_rows} rows depend on who else is in them on this machine"
        raise EngineError(what, hint="Ask for co_batching=off.")

    def _holds(self, size: int, is_steady: Callable[[int], bool]) -> bool:
        if size not in self._tried:
            self._tried[size] = is_steady(size)
        return self._tried[size]


def steady_pair(
    weight: torch.Tensor, bias: torch.Tensor | None, known: dict[tuple[int, int, str], Sizes]
) -> tuple[SteadyProduct, SteadyProduct]:
    """x Wᵀ + bias and g W for a frozen weight [out, in].

    In bfloat16 on a CPU both keep a copy of it in the order of oneDNN's kernels: without, g W is another sum for almost
    every number of rows. `known`: what was tried, by shape.
    """
    num_out, num_in = weight.shape
    if weight.dtype == torch.bfloat16 and multiplies_bfloat16(weight.device):
        there: Multiply = Product(weight, bias)
        back: Multiply = Product(weight.t().contiguous())
    else:
        there, back = Product(weight, bias), lambda grad: grad @ weight

    def sizes(way: str) -> Sizes:
        return known.setdefault((num_out, num_in, way), Sizes())

    return (
        SteadyProduct(there, matrix=weight, sizes=sizes("there")),
        SteadyProduct(back, matrix=weight.t(), sizes=sizes("back")),
    )
