"""Adapters' products beside a shared base's: units with equally many rows and equal ranks in one call each.

Hundreds of small products cost more to call than to compute. Each unit's part has the bits that it would have in a call
of its own: every kind of call is tried once, with sums that are nothing but rounding, and where its company matters
units are computed one by one. It knows layers and their gradients. It knows no passes.

Shapes: U units of a stack, n rows of each, r rank, R the sum of ranks of layers that read the same input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from model_foundry.models import fused
from model_foundry.models.lora import Linear

STACK_ROWS = 128
"""Units of more rows are computed one by one: there the products take longer than the calls."""
Gradients = list[tuple[torch.Tensor, torch.Tensor]]
"""(gradient buffer, what is to be added to it)."""


@dataclass(frozen=True, slots=True)
class Factors:
    """down: [R, in]; ups: [out, r] with the scale in them; both in the compute type."""

    layers: list[Linear]
    down: torch.Tensor
    ups: list[torch.Tensor]

    @classmethod
    def of(cls, layers: list[Linear], dtype: torch.dtype) -> Factors:
        ranks = [layer.lora_A.shape[0] for layer in layers if layer.lora_A is not None]
        down = torch.empty(sum(ranks), layers[0].shape[1], dtype=dtype, device=layers[0].device)
        ups = [down.new_empty(layer.shape[0], rank) for layer, rank in zip(layers, ranks, strict=True)]
        made = cls(layers, down, ups)
        fill([made])
        return made

    @property
    def ranks(self) -> list[int]:
        return [up.shape[1] for up in self.ups]


@torch.no_grad()
def fill(every: Iterable[Factors]) -> None:
    """Read the weights of all layers in one call: they are hundreds, and small."""
    outs: list[torch.Tensor] = []
    weights: list[Any] = []
    scales: list[float] = []
    for factors in every:
        outs += (*factors.down.split(factors.ranks), *factors.ups)
        weights += [*(layer.lora_A for layer in factors.layers), *(layer.lora_B for layer in factors.layers)]
        scales += [1.0] * len(factors.layers) + [layer.scaling for layer in factors.layers]
    if not outs:
        return
    if fused.fits(*outs, *weights) and all(each.dtype == torch.float32 and each.is_contiguous() for each in weights):
        fused.write_scaled(outs, weights, scales)
    else:
        torch._foreach_copy_(outs, torch._foreach_mul(weights, scales))


@dataclass(frozen=True, slots=True)
class Part:
    """One unit's rows of a pass and its adapter; kept: where its gradients go, None for the buffers themselves."""

    rows: slice
    factors: Factors
    kept: Gradients | None


class StackedProducts:
    """a [U, m, k] @ b [U, k, n]: each of the U has the bits that it has alone."""

    def __init__(self) -> None:
        self._is_alike: dict[tuple[object, ...], bool] = {}

    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if self._together(a, b, None):
            return torch.bmm(a, b)
        return torch.cat([torch.bmm(a[unit : unit + 1], b[unit : unit + 1]) for unit in range(a.shape[0])])

    def add(self, out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        """The same, added to out [U, m, n]."""
        if self._together(a, b, out):
            out.baddbmm_(a, b)
            return
        for unit in range(a.shape[0]):
            one = slice(unit, unit + 1)
            out[one].baddbmm_(a[one], b[one])

    def _together(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None) -> bool:
        if a.shape[0] == 1:
            return True
        key = (a.dtype, a.shape, a.stride(), b.shape, b.stride(), None if out is None else out.stride())
        if key not in self._is_alike:
            self._is_alike[key] = _is_alike(a, b, out)
        return self._is_alike[key]


@torch.no_grad()
def _is_alike(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None) -> bool:
    """Whether products that lie in memory as these do are the same bits one by one."""
    num, _, k = a.shape
    drawn = torch.Generator().manual_seed(0)
    half, place = k // 2, torch.randperm(k, generator=drawn)
    left, right = (torch.randn(shape, generator=drawn).to(a) for shape in (a.shape, b.shape))
    # Every sum has each of its terms again with the other sign: what is left is rounding, which the order decides.
    left[:, :, half : 2 * half], right[:, half : 2 * half] = -left[:, :, :half], right[:, :half]
    if k > 1:
        left[:, :, 2 * half :] = 0
    a, b = _laid_out(left[:, :, place], a), _laid_out(right[:, place], b)

    def is_alike(product: Callable[[slice], torch.Tensor]) -> bool:
        want = product(slice(None))
        return all(torch.equal(product(slice(unit, unit + 1)), want[unit : unit + 1]) for unit in range(num))

    if out is None:
        return is_alike(lambda which: torch.bmm(a[which], b[which]))
    # To nothing, which shows how the sums are made, and to something, which shows when it is added.
    for first in (torch.zeros(out.shape), torch.randn(out.shape, generator=drawn)):
        laid = _laid_out(first.to(out), out)
        if not is_alike(lambda which, laid=laid: _laid_out(laid, laid)[which].baddbmm_(a[which], b[which])):
            return False
    return True


def _laid_out(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device).copy_(values)


class AdapterStack:
    """Parts whose rows lie one after the other, equally many, with equal ranks; for one pass, forward and back."""

    def __init__(self, parts: Sequence[Part], products: StackedProducts) -> None:
        self._parts, self._products = parts, products
        self._rows = slice(parts[0].rows.start, parts[-1].rows.stop)
        ends = torch.tensor([0, *parts[0].factors.ranks]).cumsum(0).tolist()
        self._columns = [slice(*pair) for pair in pairwise(ends)]
        self._stacked_downs: torch.Tensor | None = None
        self._stacked_ups: dict[int, torch.Tensor] = {}

    @classmethod
    def of(cls, parts: Sequence[Part], products: StackedProducts) -> list[AdapterStack]:
        """Neighbours that are alike together."""
        runs: list[list[Part]] = []
        for part in parts:
            if runs and _follows(runs[-1][-1], part):
                runs[-1].append(part)
            else:
                runs.append([part])
        return [cls(run, products) for run in runs]

    def forward(self, x: torch.Tensor, outs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Add to each layer's outputs [N, out]; returns x Aᵀ [U, n, R]."""
        low = self._products(self._of(x), self._downs().transpose(1, 2))
        for number, (out, columns) in enumerate(zip(outs, self._columns, strict=True)):
            self._products.add(self._of(out), low[:, :, columns], self._ups(number).transpose(1, 2))
        return low

    def backward(
        self, x: torch.Tensor, low: torch.Tensor, grads: Sequence[torch.Tensor], dx: torch.Tensor | None
    ) -> None:
        """Add to the adapters' gradients, and to dx [N, in]."""
        xs, d_low = self._of(x), torch.empty_like(low)
        for number, (grad, columns) in enumerate(zip(grads, self._columns, strict=True)):
            mine = self._of(grad)
            d_low[:, :, columns] = self._products(mine, self._ups(number))
            self._settle(number, "lora_B", self._products(mine.transpose(1, 2), low[:, :, columns]))
        d_downs = self._products(d_low.transpose(1, 2), xs)
        for number, columns in enumerate(self._columns):
            self._settle(number, "lora_A", d_downs[:, columns])
        if dx is not None:
            self._products.add(self._of(dx), d_low, self._downs())

    def _of(self, values: torch.Tensor) -> torch.Tensor:
        """[N, width] as [U, n, width]."""
        return values[self._rows].view(len(self._parts), -1, values.shape[1])

    def _downs(self) -> torch.Tensor:
        if self._stacked_downs is None:
            self._stacked_downs = torch.stack([part.factors.down for part in self._parts])
        return self._stacked_downs

    def _ups(self, number: int) -> torch.Tensor:
        if number not in self._stacked_ups:
            self._stacked_ups[number] = torch.stack([part.factors.ups[number] for part in self._parts])
        return self._stacked_ups[number]

    def _settle(self, number: int, name: str, gradients: torch.Tensor) -> None:
        """Gradients [U, ..] of one layer, to where each unit keeps them."""
        buffers, values = [], []
        for part, gradient in zip(self._parts, gradients.float(), strict=True):
            layer = part.factors.layers[number]
            scaled = gradient * layer.scaling if name == "lora_B" and layer.scaling != 1.0 else gradient
            buffer = getattr(layer, name).grad
            if part.kept is not None:
                part.kept.append((buffer, scaled))
            else:
                buffers.append(buffer)
                values.append(scaled)
        if buffers:
            torch._foreach_add_(buffers, values)


def _follows(one: Part, other: Part) -> bool:
    """Whether both can be in one stack."""
    size = one.rows.stop - one.rows.start
    return (
        size <= STACK_ROWS
        and other.rows.start == one.rows.stop
        and other.rows.stop - other.rows.start == size
        and one.factors.ranks == other.factors.ranks
    )
