"""Adapters' products beside a shared base's, of units of rows: many small ones in one call, large ones one by one.

Hundreds of small products take longer to call than to compute, so a compiled loop does those of all small units at
once. Which way a unit goes, and so its bits, depends on its own rows and adapter alone, not on who else is there nor on
the number of threads. It knows layers and their gradients. It knows no passes.

Shapes: N rows of a pass, n of a unit, D inputs, r rank, R the sum of ranks of layers that read the same input.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch

from model_foundry.engine.side_by_side import MIN_SHARE_TOKENS
from model_foundry.models import adapter_loops, fused
from model_foundry.models.compiled_loop import CompiledLoop
from model_foundry.models.lora import Linear

LOOP_WORK = 2048
"""n × r up to which a unit's products are done by the loops: for more, those of a BLAS are faster, calls included."""
LOOP_ROWS = 2 * MIN_SHARE_TOKENS
"""Rows from which on they never do: as many may be cut into units, by the number of threads."""
Gradients = list[tuple[torch.Tensor, torch.Tensor]]
"""(gradient buffer, what is to be added to it)."""


@dataclass(frozen=True, slots=True)
class Adapted:
    """Layers that read the same input, all with an adapter.

    Attributes:
        factors: A [r, in] and B [out, r] of each, float32.
        fits_loops: whether the loops take layers of these sides.
    """

    layers: list[Linear]
    factors: Sequence[tuple[torch.Tensor, torch.Tensor]]
    ranks: list[int]
    fits_loops: bool

    @classmethod
    def of(cls, layers: list[Linear]) -> Adapted | None:
        """None where they carry none."""
        factors = [
            (layer.lora_A, layer.lora_B) for layer in layers if layer.lora_A is not None and layer.lora_B is not None
        ]
        if not factors:
            return None
        every = [factor for pair in factors for factor in pair]
        fits = fused.fits(*every) and all(each.dtype == torch.float32 and each.is_contiguous() for each in every)
        fits &= all(width % adapter_loops.LANES == 0 for layer in layers for width in layer.shape)
        return cls(layers, factors, [down.shape[0] for down, _ in factors], fits)

    def goes_by_loop(self, num_rows: int) -> bool:
        """Whether a unit of so many rows is a small one."""
        is_small = num_rows < LOOP_ROWS and num_rows * max(self.ranks) <= LOOP_WORK
        return is_small and self.fits_loops and num_rows % adapter_loops.TOGETHER == 0


@dataclass(frozen=True, slots=True)
class Factors:
    """down: [R, in]; ups: [out, r] with the scale in them; both in the compute type."""

    adapted: Adapted
    down: torch.Tensor
    ups: list[torch.Tensor]

    @classmethod
    def of(cls, adapted: Adapted, dtype: torch.dtype) -> Factors:
        down = torch.cat([down for down, _ in adapted.factors]).detach().to(dtype)
        made = cls(adapted, down, [torch.empty_like(up, dtype=dtype) for _, up in adapted.factors])
        fill([made])
        return made


@torch.no_grad()
def fill(every: Iterable[Factors]) -> None:
    """Read the weights of all layers in one call: they are hundreds, and small."""
    outs: list[torch.Tensor] = []
    weights: list[Any] = []
    scales: list[float] = []
    for factors in every:
        adapted = factors.adapted
        outs += (*factors.down.split(adapted.ranks), *factors.ups)
        weights += [*(down for down, _ in adapted.factors), *(up for _, up in adapted.factors)]
        scales += [1.0] * len(adapted.layers) + [layer.scaling for layer in adapted.layers]
    if not outs:
        return
    if fused.fits(*outs, *weights) and all(each.dtype == torch.float32 and each.is_contiguous() for each in weights):
        fused.write_scaled(outs, weights, scales)
    else:
        torch._foreach_copy_(outs, torch._foreach_mul(weights, scales))


class Update(Protocol):
    """What adapters add to layers that read the same input; for one pass, forward and back."""

    def forward(self, x: torch.Tensor, outs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Add to each layer's outputs [N, out]; returns what `backward` needs of it."""
        ...

    def backward(
        self, x: torch.Tensor, low: torch.Tensor, grads: Sequence[torch.Tensor], dx: torch.Tensor | None
    ) -> None:
        """Add to the adapters' gradients, and to dx [N, D]."""
        ...


def compile_loops(dtype: torch.dtype) -> None:
    """Before the first pass rather than in it: on a new machine that takes seconds."""
    if fused.COMPILES and dtype in fused.TYPES:
        for loop in (adapter_loops.forward, adapter_loops.backward):
            loop.of(fused.TYPES[dtype])


class SmallUnits:
    """Of any ranks; gradients are added at once.

    Args:
        units: the rows of each, and what its adapter is there.
    """

    def __init__(self, units: Sequence[tuple[slice, Adapted]]) -> None:
        self._num_units, self._num_low, self._room = len(units), 0, 0
        self._num_outs, num_in = [layer.shape[0] for layer in units[0][1].layers], units[0][1].layers[0].shape[1]
        self._has_gradients, facts, scales = True, list[int](), list[float]()
        for rows, adapted in units:
            num_rows = rows.stop - rows.start
            facts += (rows.start, num_rows, self._num_low)
            for layer, (down, up), rank in zip(adapted.layers, adapted.factors, adapted.ranks, strict=True):
                d_down, d_up = down.grad, up.grad
                self._has_gradients &= d_down is not None and d_up is not None
                facts += (down.data_ptr(), up.data_ptr(), _address(d_down), _address(d_up), rank)
                scales.append(layer.scaling)
            self._num_low += num_rows * sum(map(adapter_loops.filled, adapted.ranks))
            self._room = max(self._room, adapter_loops.room_of(num_rows, adapted.ranks, self._num_outs, num_in))
        self._facts, self._scales = torch.tensor(facts), torch.tensor(scales, dtype=torch.float32)

    def forward(self, x: torch.Tensor, outs: Sequence[torch.Tensor]) -> torch.Tensor:
        """low: x Aᵀ of all units, one after the other, float32."""
        low = torch.empty(self._num_low, dtype=torch.float32)
        self._run(adapter_loops.forward, x, low, outs)
        return low

    def backward(
        self, x: torch.Tensor, low: torch.Tensor, grads: Sequence[torch.Tensor], dx: torch.Tensor | None
    ) -> None:
        assert self._has_gradients
        self._run(adapter_loops.backward, x, low, grads, (x if dx is None else dx).data_ptr(), dx is not None)

    def _run(
        self, loop: CompiledLoop, x: torch.Tensor, low: torch.Tensor, outs: Sequence[torch.Tensor], *more: int
    ) -> None:
        assert all(each.is_contiguous() and each.dtype == x.dtype for each in (x, *outs))
        table = torch.tensor([(out.data_ptr(), num) for out, num in zip(outs, self._num_outs, strict=True)])
        room = torch.empty(self._room, dtype=torch.float32)
        loop.of(fused.TYPES[x.dtype])(
            table.data_ptr(), self._facts.data_ptr(), self._scales.data_ptr(), x.data_ptr(), low.data_ptr(), *more,
            room.data_ptr(), len(outs), x.shape[1], 0, self._num_units,
        )  # fmt: skip


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class LargeUnit:
    """One unit's; kept: where its gradients go, None for the buffers themselves."""

    def __init__(self, rows: slice, factors: Factors, kept: Gradients | None) -> None:
        self._rows, self._factors, self._kept = rows, factors, kept
        ends = [0, *accumulate(factors.adapted.ranks)]
        self._columns = [slice(*pair) for pair in pairwise(ends)]

    def forward(self, x: torch.Tensor, outs: Sequence[torch.Tensor]) -> torch.Tensor:
        """low: x Aᵀ [n, R]."""
        low = x[self._rows] @ self._factors.down.t()
        for out, up, columns in zip(outs, self._factors.ups, self._columns, strict=True):
            out[self._rows].addmm_(low[:, columns], up.t())
        return low

    def backward(
        self, x: torch.Tensor, low: torch.Tensor, grads: Sequence[torch.Tensor], dx: torch.Tensor | None
    ) -> None:
        d_low = torch.empty_like(low)
        adapted, ups = self._factors.adapted, self._factors.ups
        for layer, grad, up, columns in zip(adapted.layers, grads, ups, self._columns, strict=True):
            mine = grad[self._rows]
            d_low[:, columns] = mine @ up
            settle(layer.lora_B, mine.t() @ low[:, columns], layer.scaling, self._kept)
        d_down = d_low.t() @ x[self._rows]
        for layer, columns in zip(adapted.layers, self._columns, strict=True):
            settle(layer.lora_A, d_down[columns], 1.0, self._kept)
        if dx is not None:
            dx[self._rows].addmm_(d_low, self._factors.down)


def settle(parameter: torch.Tensor | None, gradient: torch.Tensor, scale: float, kept: Gradients | None) -> None:
    """Add scale × gradient to a parameter's, or keep it."""
    assert parameter is not None
    assert parameter.grad is not None
    wide = gradient.float()
    scaled = wide if scale == 1.0 else wide * scale
    if kept is None:
        parameter.grad.add_(scaled)
    else:
        kept.append((parameter.grad, scaled))
