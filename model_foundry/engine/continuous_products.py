"""Products of a few rows with a frozen weight, as fast as the machine has them; and whether a row's place matters.

It knows matrices. It does not know layers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from model_foundry.engine.platform import multiplies_bfloat16
from model_foundry.errors import EngineError


class Product:
    """x [R, in] → x Wᵀ + bias [R, out].

    On a CPU with bfloat16 the weight is kept in the order of oneDNN's kernels, which otherwise bring it into that order
    at every call: for few rows that is a third of the time.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._weight, self._bias = weight.detach(), bias
        self.shape = (weight.shape[0], weight.shape[1])
        self._ordered = None
        if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and multiplies_bfloat16(weight.device):
            self._ordered = torch.ops.mkldnn._reorder_linear_weight(self._weight.contiguous())
            self._weight = self._weight.new_empty(0)  # a slice would keep all of it

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._ordered is None:
            return functional.linear(x, self._weight, self._bias)
        return torch.ops.mkldnn._linear_pointwise(x, self._ordered, self._bias, "none", [], "")


def cancelling_rows(matrix: torch.Tensor, num_rows: int) -> torch.Tensor:
    """[num_rows, in], each of which has one output of M [out, in], from the first to the last, whose terms cancel.

    That sum is zero but for what rounding leaves of its parts, and any other order of summation leaves something else.
    Of random rows' outputs a few in ten thousand would tell.
    """
    drawn = torch.Generator().manual_seed(0)
    num_out, num_in = matrix.shape
    weights = matrix[torch.linspace(0, num_out - 1, num_rows).long()].cpu()
    one, other = torch.randperm(num_in // 2 * 2, generator=drawn).chunk(2)
    scales = torch.exp2(torch.randint(-6, 7, (num_in // 2,), generator=drawn)).to(matrix.dtype)
    x = torch.zeros(num_rows, num_in, dtype=matrix.dtype)
    x[:, one], x[:, other] = weights[:, other] * scales, -weights[:, one] * scales
    return x.to(matrix.device)


def check_places(product: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> None:
    """Whether each row of x [R, in] gets the same bits in another place of the same number of rows.

    Raises:
        EngineError: it does not.
    """
    want = product(x)
    for shift in (1, x.shape[0] // 2 + 1):
        if not torch.equal(product(x.roll(shift, 0)), want.roll(shift, 0)):
            what = f"products of {x.shape[0]} rows depend on a row's place here ({x.shape[1]} to {want.shape[1]}, "
            raise EngineError(
                f"{what}{str(x.dtype).removeprefix('torch.')}), so equal answers in every company cannot be promised",
                hint="Ask for the free mode (invariant=False).",
            )


def blocks_together(product: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, block_rows: int) -> set[int]:
    """How many blocks of x [N, in] may be in one product, each with the bits that it has alone, in any place."""
    blocks = x.split(block_rows)
    want = [product(block) for block in blocks]

    def alike(size: int) -> bool:
        for first in range(len(blocks)):
            some = [(first + place) % len(blocks) for place in range(size)]
            found = product(torch.cat([blocks[each] for each in some])).split(block_rows)
            if not all(torch.equal(part, want[each]) for part, each in zip(found, some, strict=True)):
                return False
        return True

    return {1, *(size for size in range(2, len(blocks) + 1) if alike(size))}
