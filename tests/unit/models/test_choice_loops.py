"""The next token by a loop, and what loops add in lanes: the same as float64 gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model_foundry.models import fused
from model_foundry.models.compiled_loop import loop
from model_foundry.models.primitives import add_weighted, add_weighted_wide

DTYPES = [torch.float32, torch.bfloat16]


def numbers(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale).to(dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 256, 257, 1000])
def test_the_next_token_of_each_row(width: int, dtype: torch.dtype, threads: int) -> None:
    """The first whose share, with all before it, exceeds the draw: as torch's operations find it in float64."""
    logits = numbers(40, width, dtype=dtype, scale=3.0)
    temperatures = [0.0, 1.0, 0.3, 2.0] * 10
    draws = torch.linspace(0, 0.999, 40).tolist()
    tokens, logprobs = fused.choose_tokens(logits, temperatures, draws)
    exact = logits.double()
    assert logprobs.double() == pytest.approx(torch.log_softmax(exact, 1)[torch.arange(40), tokens], abs=1e-5)
    for row, (temperature, draw) in enumerate(zip(temperatures, draws, strict=True)):
        if not temperature:
            assert tokens[row] == int(logits[row].argmax())
            continue
        sums = torch.softmax(exact[row] / temperature, 0).cumsum(0)
        before = float(sums[tokens[row] - 1]) if tokens[row] else 0.0
        assert before - 1e-6 <= draw <= float(sums[tokens[row]]) + 1e-6


def test_a_token_that_cannot_be_is_never_drawn() -> None:
    """Not by the largest draw there is, where rounding leaves the sum of the shares below it."""
    logits = torch.full((3, 600), float("-inf"))
    logits[:, 100:400] = numbers(300, dtype=torch.float32)
    tokens, _ = fused.choose_tokens(logits, [1.0, 1e300, 1e-30], [0.0, 1 - 2**-24, 0.5])
    assert (tokens[0], tokens[1]) == (100, 399)
    assert tokens[2] == int(logits[2].argmax())


def test_rows_that_are_no_numbers_give_a_token_of_the_vocabulary() -> None:
    logits = torch.full((4, 300), float("nan"))
    logits[1, 7] = float("inf")
    logits[2] = float("inf")
    logits[3] = float("-inf")
    tokens, logprobs = fused.choose_tokens(logits, [0.0, 1.0, 0.0, 1.0], [0.5] * 4)
    assert all(0 <= token < 300 for token in tokens.tolist())
    assert bool(logprobs[:2].isnan().all())


@loop("float32*", "x*", "float32*", "int", "int", "int", "int", "int")
def weighted(
    weights: Any, rows: Any, sums: Any, step: int, count: int, size: int, wide: int, start: int, first: int, last: int
) -> None:
    if wide:
        add_weighted_wide(weights, start, step, rows, start * size, count, size, sums, 0)
    else:
        add_weighted(weights, start, step, rows, start * size, count, size, sums, 0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("wide", [0, 1])
def test_rows_are_added_by_their_weights(wide: int, count: int, dtype: torch.dtype) -> None:
    size = 64 if wide else 16
    weights, rows = numbers(4, 9, dtype=torch.float32), numbers(9, size, dtype=dtype)
    sums = numbers(4, size, dtype=torch.float32)
    wanted = sums.double() + weights[:, 2 : 2 + count].double() @ rows[2 : 2 + count].double()
    weighted.of(fused.TYPES[dtype])(weights.data_ptr(), rows.data_ptr(), sums.data_ptr(), 9, count, size, wide, 2, 0, 1)
    assert float((sums - wanted).abs().max()) < 1e-5
