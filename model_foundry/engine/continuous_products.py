"""Products of a few rows with a frozen weight, as fast as the machine has them; and whether a row's place matters.

It knows matrices. It does not know layers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from model_foundry.engine.platform import multiplies_bfloat16
from model_foundry.errors import EngineError
from model_foundry.models import fused
from model_foundry.models.small_products import FEW_OUTPUTS, have_products
from model_foundry.models.tiles import DEPTH, ROWS, in_tiles

ORDERS = (32, 64)
"""Outputs of the blocks that oneDNN is known to use."""
_orders: dict[tuple[int, int], int] = {}
"""Those found, by the shape of the weight."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """A weight in memory as `models.tiles.in_tiles` lays it out: its address, and the outputs of a block."""

    address: int
    outputs: int


class Product:
    """x [R, in] → x Wᵀ + bias [R, out].

    On a CPU with bfloat16 the weight is kept in the order of oneDNN's kernels, which otherwise bring it into that order
    at every call: for few rows that is a third of the time. Where tiles can be read out of that order, few rows are
    multiplied by a loop of our own, which reads memory faster.

    Attributes:
        tiles: where tiles can be read out of that order; None elsewhere. Valid as long as the product is kept.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._weight, self._bias = weight.detach(), bias
        self.shape = (weight.shape[0], weight.shape[1])
        self._ordered = None
        self.tiles: Tiles | None = None
        if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and multiplies_bfloat16(weight.device):
            self._ordered = torch.ops.mkldnn._reorder_linear_weight(self._weight.contiguous())
            self.tiles = find_tiles(self._weight, self._ordered)
            self._weight = self._weight.new_empty(0)  # a slice would keep all of it

    def is_by_rows(self) -> bool:
        """Whether each of few rows has the bits that it has alone: nobody need fill them up to as many as ever."""
        return self.tiles is not None and self._bias is None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._ordered is None:
            return functional.linear(x, self._weight, self._bias)
        if self.tiles is not None and self.is_by_rows() and x.shape[0] <= ROWS:
            return fused.product_of_few(x, self.tiles.address, self.shape, self.tiles.outputs)
        return torch.ops.mkldnn._linear_pointwise(x, self._ordered, self._bias, "none", [], "")


def find_tiles(weight: torch.Tensor, ordered: torch.Tensor) -> Tiles | None:
    """oneDNN does not say which order it has chosen, so what lies there is compared with the weight [out, in].

    It chooses by the shape: the first of a shape is compared whole, others in their last outputs.
    """
    if not (fused.COMPILES and have_products() and hasattr(torch.ops.mkldnn, "data_ptr")):
        return None
    address, num_bytes = int(torch.ops.mkldnn.data_ptr(ordered)), int(torch.ops.mkldnn._nbytes(ordered))
    if num_bytes != weight.numel() * 2:
        return None
    there = torch.frombuffer((ctypes.c_char * num_bytes).from_address(address), dtype=torch.int16)
    num_out, num_in = weight.shape
    known = _orders.get((num_out, num_in))
    for outputs in ORDERS if known is None else (known,):
        if num_out % outputs == 0 and outputs % FEW_OUTPUTS == 0 and num_in % DEPTH == 0:
            rows = weight if known is None else weight[-outputs:]
            wanted = in_tiles(rows.contiguous().view(torch.int16), outputs).view(-1)
            if torch.equal(there[-len(wanted) :], wanted):
                _orders[num_out, num_in] = outputs
                return Tiles(address, outputs)
    return None


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
