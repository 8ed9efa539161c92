"""What loops give does not depend on where their numbers lie.

A compiler that cannot tell whether two arrays overlap asks when the loop runs, and takes another way where they lie
close together: sums were made in another order then, and a run's bits depended on what else was in memory.
"""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch

from model_foundry.models import choice_loops, cpu_loops
from model_foundry.models.compiled_loop import CompiledLoop
from model_foundry.models.fused import TYPES

ROWS, WIDTH, VOCABULARY = 5, 44, 300
KINDS = (torch.float32, torch.bfloat16)
GAPS = (0, 4, 64, 192, 8192)
"""Bytes between one array and the next; the last is far enough for any way."""


def numbers(*shape: int, seed: int = 0, kind: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(kind)


def run(loop: CompiledLoop, kind: torch.dtype, args: list[Any], order: tuple[int, ...], gap: int) -> list[bytes]:
    """What is in each tensor of the arguments afterwards, where they lay in this order."""
    tensors = [(place, each) for place, each in enumerate(args) if isinstance(each, torch.Tensor)]
    arena = torch.zeros(sum(each.nbytes for _, each in tensors) + len(tensors) * (gap + 64) + 64, dtype=torch.uint8)
    at, given, where = -arena.data_ptr() % 64, list(args), {}
    for index in order:
        place, each = tensors[index]
        at += -at % each.element_size()
        arena[at : at + each.nbytes] = each.reshape(-1).view(torch.uint8)
        where[index], given[place] = at, arena.data_ptr() + at
        at += each.nbytes + gap
    loop.of(TYPES[kind], TYPES[kind])(*given)
    return [bytes(arena[where[index] : where[index] + each.nbytes].tolist()) for index, (_, each) in enumerate(tensors)]


def chosen(logits: torch.Tensor) -> list[Any]:
    draws = torch.rand(ROWS, generator=torch.Generator().manual_seed(1))
    tokens, logprobs, width = torch.zeros(ROWS, dtype=torch.int64), torch.zeros(ROWS), logits.shape[1]
    room = torch.zeros(width + width // choice_loops.BLOCK + 1)
    return [logits, torch.full((ROWS,), 0.7), draws, room, tokens, logprobs, width]


def cases(kind: torch.dtype) -> dict[str, tuple[CompiledLoop, list[Any]]]:
    x, other, third = (numbers(ROWS, WIDTH, seed=seed, kind=kind) for seed in range(3))
    weight, out, out_2 = numbers(WIDTH, seed=4, kind=kind), torch.zeros_like(x), torch.zeros_like(x)
    room, sums = torch.zeros(WIDTH), torch.zeros(WIDTH)
    width, half = WIDTH, WIDTH // 2
    cos, sin = numbers(ROWS, half, seed=5, kind=kind), numbers(ROWS, half, seed=6, kind=kind)
    logits = numbers(ROWS, VOCABULARY, seed=7, kind=kind) * 3
    turned = [torch.zeros(0), 0, 0, torch.zeros(0), 0, cos, sin, 1, out, 1, ROWS, width]
    return {
        "norm": (cpu_loops.rms_norm, [x, width, weight, 1e-5, out, width]),
        "sum and norm": (
            cpu_loops.add_rms_norm, [x, width, other, width, out, width, weight, 1e-5, out_2, width]
        ),
        "norm back": (
            cpu_loops.rms_norm_backward,
            [x, width, weight, 1e-5, other, width, third, width, 1, out, sums, 1, width],
        ),
        "silu": (cpu_loops.gated_silu, [x, width, other, width, out, width]),
        "silu back": (
            cpu_loops.gated_silu_backward, [x, width, other, width, third, width, out, out_2, width]
        ),
        "heads": (cpu_loops.to_heads, [x, width, *turned]),
        "heads back": (cpu_loops.from_heads, [x, *turned]),
        "answers": (
            cpu_loops.join_answers,
            [torch.cat([x, other]), numbers(2, ROWS, seed=8), room, out, 2, ROWS, width],
        ),
        "softmax": (cpu_loops.causal_softmax, [x, room, width, ROWS, width - ROWS, 0]),
        "softmax in a window": (cpu_loops.causal_softmax, [x, room, width, ROWS, width - ROWS, 37]),
        "softmax back": (cpu_loops.softmax_backward, [x, other.softmax(1), width]),
        "normaliser": (cpu_loops.log_normaliser, [logits, torch.zeros(ROWS, 2), VOCABULARY]),
        "score gradient": (
            cpu_loops.score_gradient,
            [logits, logits.float().logsumexp(1, keepdim=True).repeat(1, 2) * torch.tensor([0.0, 1.0]),
             torch.arange(2 * ROWS), numbers(ROWS, 2, seed=9), torch.zeros(2), 2, VOCABULARY],
        ),
        "choice": (choice_loops.choose, chosen(logits)),
        "choice of few": (choice_loops.choose, chosen(x)),
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("name", list(cases(torch.float32)))
def test_where_numbers_lie_does_not_show(name: str, kind: torch.dtype) -> None:
    loop, args = cases(kind)[name]
    args = [*args, 0, ROWS if "heads" not in name else 1]
    num_tensors = sum(isinstance(each, torch.Tensor) for each in args)
    want = run(loop, kind, args, tuple(range(num_tensors)), GAPS[-1])
    orders = list(permutations(range(num_tensors)))
    for order in orders[:: max(1, len(orders) // 24)]:
        for gap in GAPS:
            assert run(loop, kind, args, order, gap) == want, (order, gap)
