"""Adapters of several units: the sums they should be, each to its own gradient buffers, in whatever company."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from model_foundry.engine.unit_adapters import Adapted, Factors, Gradients, LargeUnit, SmallUnits, Update
from model_foundry.models.lora import Linear

WIDTHS = (48, 160)
NUM_IN = 96


def adapted(ranks: tuple[int, int], seed: int, *, widths: tuple[int, int] = WIDTHS, num_in: int = NUM_IN) -> Adapted:
    drawn, layers = torch.Generator().manual_seed(seed), []
    for width, rank in zip(widths, ranks, strict=True):
        layer = Linear(torch.zeros(width, num_in), None)
        layer.lora_A = nn.Parameter(torch.randn(rank, num_in, generator=drawn))
        layer.lora_B = nn.Parameter(torch.randn(width, rank, generator=drawn))
        layer.lora_A.grad = torch.randn(rank, num_in, generator=drawn)
        layer.lora_B.grad = torch.randn(width, rank, generator=drawn)
        layer.scaling = 1.0 + seed / 2
        layers.append(layer)
    found = Adapted.of(layers)
    assert found is not None
    return found


class Rows:
    """What a pass hands to an update, of so many rows, and what comes of it."""

    def __init__(self, num: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.x, self.dx = torch.randn(num, NUM_IN).to(dtype), torch.randn(num, NUM_IN).to(dtype)
        self.outs = [torch.randn(num, width).to(dtype) for width in WIDTHS]
        self.grads = [torch.randn(num, width).to(dtype) for width in WIDTHS]

    def part(self, rows: slice) -> Rows:
        made = Rows(0, self.x.dtype)
        made.x, made.dx = self.x[rows].clone(), self.dx[rows].clone()
        made.outs, made.grads = ([each[rows].clone() for each in every] for every in (self.outs, self.grads))
        return made

    def run(self, update: Update) -> None:
        with torch.no_grad():
            low = update.forward(self.x, self.outs)
            update.backward(self.x, low, self.grads, self.dx)


def buffers(unit: Adapted) -> list[torch.Tensor]:
    return [factor.grad for pair in unit.factors for factor in pair if factor.grad is not None]


def check(rows: slice, unit: Adapted, first: Rows, after: Rows, gradients: list[torch.Tensor]) -> None:
    """gradients: what was added to A's and B's, layer by layer."""
    dtype, tolerance = first.x.dtype, 1e-4 if first.x.dtype == torch.float32 else 2e-2
    x, want_dx = first.x[rows].double(), first.dx[rows].double()
    for number, (layer, (down, up)) in enumerate(zip(unit.layers, unit.factors, strict=True)):
        a, b = down.detach().to(dtype).double(), (up.detach() * layer.scaling).to(dtype).double()
        grad = first.grads[number][rows].double()
        want = {
            "out": (after.outs[number][rows], first.outs[number][rows] + x @ a.t() @ b.t()),
            "A": (gradients[2 * number], (grad @ b).t() @ x),
            "B": (gradients[2 * number + 1], grad.t() @ (x @ a.t()) * layer.scaling),
        }
        want_dx = want_dx + grad @ b @ a
        for name, (found, right) in want.items():
            off = (found.double() - right).norm() / right.norm()
            assert off < tolerance, (name, number, float(off))
    assert (after.dx[rows].double() - want_dx).norm() / want_dx.norm() < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_units_of_any_ranks_get_their_own_sums(dtype: torch.dtype) -> None:
    ranks, sizes = [(4, 8), (1, 3), (5, 16)], [16, 32, 16]
    units, ends = [adapted(rank, seed) for seed, rank in enumerate(ranks)], [0, 16, 48, 64]
    places = [slice(*pair) for pair in pairwise(ends)]
    assert all(unit.goes_by_loop(size) for unit, size in zip(units, sizes, strict=True))
    first, after = Rows(80, dtype), Rows(80, dtype)
    before = [[each.clone() for each in buffers(unit)] for unit in units]
    after.run(SmallUnits(list(zip(places, units, strict=True))))
    for place, unit, old in zip(places, units, before, strict=True):
        check(place, unit, first, after, [new - was for new, was in zip(buffers(unit), old, strict=True)])
    assert torch.equal(after.dx[64:], first.dx[64:])
    assert all(torch.equal(new[64:], old[64:]) for new, old in zip(after.outs, first.outs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_kept", [False, True])
def test_a_large_unit_gets_its_own_sums(dtype: torch.dtype, is_kept: bool) -> None:
    unit, first, after = adapted((3, 8), seed=2), Rows(80, dtype), Rows(80, dtype)
    kept: Gradients | None = [] if is_kept else None
    before = [each.clone() for each in buffers(unit)]
    after.run(LargeUnit(slice(16, 64), Factors.of(unit, dtype), kept))
    added = [new - was for new, was in zip(buffers(unit), before, strict=True)]
    if kept is not None:
        assert not any(each.any() for each in added)
        found = {id(buffer): value for buffer, value in kept}
        added = [found[id(buffer)] for buffer in buffers(unit)]
    check(slice(16, 64), unit, first, after, added)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_small_unit_has_the_same_bits_beside_others(rank: int, dtype: torch.dtype) -> None:
    places = [slice(0, 16), slice(16, 48), slice(48, 64)]
    together, apart = ([adapted((rank, 2 * rank), seed) for seed in range(3)] for _ in range(2))
    after = Rows(64, dtype)
    after.run(SmallUnits(list(zip(places, together, strict=True))))
    for place, unit, other in zip(places, together, apart, strict=True):
        alone = Rows(64, dtype).part(place)
        alone.run(SmallUnits([(slice(0, place.stop - place.start), other)]))
        assert torch.equal(alone.dx, after.dx[place])
        assert all(torch.equal(own, every[place]) for own, every in zip(alone.outs, after.outs, strict=True))
        assert all(map(torch.equal, buffers(unit), buffers(other)))


def test_which_way_a_unit_goes_depends_on_its_rows_and_adapter() -> None:
    unit = adapted((8, 16), seed=0)
    assert [unit.goes_by_loop(num_rows) for num_rows in (16, 18, 128, 144)] == [True, False, True, False]
    assert not adapted((1, 1), seed=0).goes_by_loop(256)  # which threads may share
    odd = adapted((8, 16), seed=0, widths=(48, 152))
    assert not odd.goes_by_loop(16)
    assert Adapted.of([Linear(torch.zeros(48, NUM_IN), None)]) is None


def test_without_gradient_buffers_there_is_a_forward_pass_only() -> None:
    unit, rows = adapted((4, 4), seed=0), Rows(16, torch.float32)
    for pair in unit.factors:
        for factor in pair:
            factor.grad = None
    update = SmallUnits([(slice(0, 16), unit)])
    with torch.no_grad():
        low = update.forward(rows.x, rows.outs)
        with pytest.raises(AssertionError):
            update.backward(rows.x, low, rows.grads, rows.dx)
