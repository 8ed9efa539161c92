"""Adapters of several units in one call: the sums they should be, each to its own gradient buffers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from model_foundry.engine import adapter_stacks
from model_foundry.engine.adapter_stacks import AdapterStack, Factors, Part, StackedProducts
from model_foundry.models.lora import Linear

WIDTHS = (12, 20)
NUM_IN = 24


def adapted(rank: int, seed: int) -> list[Linear]:
    drawn = torch.Generator().manual_seed(seed)
    layers = []
    for width in WIDTHS:
        layer = Linear(torch.zeros(width, NUM_IN), None)
        layer.lora_A = nn.Parameter(torch.randn(rank, NUM_IN, generator=drawn))
        layer.lora_B = nn.Parameter(torch.randn(width, rank, generator=drawn))
        layer.lora_A.grad, layer.lora_B.grad = torch.zeros(rank, NUM_IN), torch.zeros(width, rank)
        layer.scaling = 1.0 + seed
        layers.append(layer)
    return layers


def parts_of(ranks: list[int], sizes: list[int]) -> list[Part]:
    made, place = [], 0
    for seed, (rank, size) in enumerate(zip(ranks, sizes, strict=True)):
        factors = Factors.of(adapted(rank, seed), torch.float32)
        made.append(Part(slice(place, place + size), factors, [] if seed == 1 else None))
        place += size
    return made


def test_neighbours_with_equal_rows_and_ranks_are_one_stack() -> None:
    stacks = AdapterStack.of(parts_of([4, 4, 8, 8, 8], [16, 16, 16, 16, 32]), StackedProducts())
    x = torch.zeros(96, NUM_IN)
    outs = [torch.zeros(96, width) for width in WIDTHS]
    assert [tuple(stack.forward(x, outs).shape) for stack in stacks] == [(2, 16, 8), (2, 16, 16), (1, 32, 16)]


@pytest.mark.parametrize("alike", [True, False])
def test_every_unit_gets_its_own_sums(alike: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one too, as on a machine where company matters."""
    if not alike:
        monkeypatch.setattr(adapter_stacks, "_is_alike", lambda a, b, out: False)
    parts = parts_of([3, 3], [16, 16])
    (stack,) = AdapterStack.of(parts, StackedProducts())
    torch.manual_seed(0)
    x, outs = torch.randn(32, NUM_IN), [torch.randn(32, width) for width in WIDTHS]
    grads, dx = [torch.randn(32, width) for width in WIDTHS], torch.randn(32, NUM_IN)
    before, dx_before = [out.clone() for out in outs], dx.clone()
    low = stack.forward(x, outs)
    stack.backward(x, low, grads, dx)
    for unit, part in enumerate(parts):
        rows, want_dx = part.rows, dx_before[part.rows].double()
        kept = {id(buffer): value for buffer, value in part.kept or ()}
        for layer, out, first, grad in zip(part.factors.layers, outs, before, grads, strict=True):
            assert layer.lora_A is not None
            assert layer.lora_B is not None
            a, b, g = layer.lora_A.double(), layer.lora_B.double() * layer.scaling, grad[rows].double()
            torch.testing.assert_close(
                out[rows].double(), first[rows] + x[rows].double() @ a.t() @ b.t(), atol=1e-4, rtol=1e-4
            )
            want_dx = want_dx + g @ b @ a
            wanted = {
                "lora_A": (g @ b).t() @ x[rows].double(),
                "lora_B": g.t() @ (x[rows].double() @ a.t()) * layer.scaling,
            }
            for name, want in wanted.items():
                buffer = getattr(layer, name).grad
                found = kept[id(buffer)] if unit == 1 else buffer
                torch.testing.assert_close(found.double(), want.detach(), atol=1e-3, rtol=1e-4)
                if unit == 1:
                    assert not buffer.any()
        torch.testing.assert_close(dx[rows].double(), want_dx.detach(), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 2, 3, 8])
def test_a_unit_has_the_same_bits_beside_others(rank: int, dtype: torch.dtype) -> None:
    """Of rank 1 in float32, some kernels round the product before they add it, and others do not."""
    torch.manual_seed(0)
    low, up, out = (torch.randn(3, *shape).to(dtype) for shape in ((16, rank), (rank, 64), (16, 64)))
    products, together = StackedProducts(), out.clone()
    products.add(together, low, up)
    for unit in range(3):
        one, alone = slice(unit, unit + 1), out[unit : unit + 1].clone()
        products.add(alone, low[one], up[one])
        assert torch.equal(together[one], alone)
        assert torch.equal(products(low, up)[one], products(low[one], up[one]))
