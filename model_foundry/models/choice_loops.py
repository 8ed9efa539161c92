"""The next token of each row of logits, and its log-probability, in one or two passes over the row."""

from __future__ import annotations

from typing import Any

import numpy as np

from model_foundry.models.compiled_loop import loop
from model_foundry.models.cpu_loops import exp, largest_of, sum_of
from model_foundry.models.primitives import read, write

U = np.uint64
BLOCK = 256
"""Shares that are summed before they are added to what came before."""


@loop("x*", "float32*", "float32*", "float32*", "int64*", "float32*", "int")
def choose(
    logits: Any, sharpness: Any, draws: Any, powers: Any, tokens: Any, logprobs: Any, width: int, first: int, last: int
) -> None:
    """Of rows [R, V] as they stand: the likeliest where `sharpness`, 1 / temperature, is 0; else the first whose share,
    with those of all before it, exceeds the draw.

    draws: [R], in [0, 1). powers: room for [V + V / BLOCK + 1]. Logprobs are those of temperature 1.
    """
    for row in range(first, last):
        at = U(row * width)
        largest, sharp = largest_of(logits, at, U(width)), read(sharpness, row)
        total = np.float32(0.0)
        for j in range(U(width)):
            total += exp(read(logits, at + j) - largest)
        token = width - 1
        if sharp == np.float32(0.0):
            for j in range(width):
                if read(logits, at + U(j)) == largest:
                    token = j
                    break
        else:
            whole = 0.0
            for block in range(0, width, BLOCK):
                end = min(block + BLOCK, width)
                for j in range(U(block), U(end)):
                    write(powers, j, exp((read(logits, at + j) - largest) * sharp))
                sums = sum_of(powers, U(block), U(end - block))
                write(powers, U(width + block // BLOCK), sums)
                whole += np.float64(sums)
            goal, before, block = np.float64(read(draws, row)) * whole, 0.0, 0
            while block + BLOCK < width and before + read(powers, U(width + block // BLOCK)) <= goal:
                before += np.float64(read(powers, U(width + block // BLOCK)))
                block += BLOCK
            for j in range(block, min(block + BLOCK, width)):
                power = read(powers, U(j))
                if power > np.float32(0.0):
                    token = j  # the last that can be, where rounding leaves the sum below the draw
                    before += np.float64(power)
                    if before > goal:
                        break
        write(tokens, row, token)
        write(logprobs, row, read(logits, at + U(token)) - largest - np.log(total))
