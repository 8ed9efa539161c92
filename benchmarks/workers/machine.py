"""How fast the machine is at this moment: matrix products at the model's own shapes, and memory bandwidth."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from benchmarks.workers.process import run_worker

# Rows of a step × (in, out) of SmolLM2-135M's linear layers: attention, MLP up, MLP down.
NUM_ROWS = 1024
SHAPES = ((576, 576), (576, 1536), (1536, 576))
COPY_BYTES = 256 << 20


def best_seconds(work: Callable[[], Any], *, budget_s: float) -> float:
    """The fastest repetition within the budget: others on the machine only ever slow it down."""
    work()
    best, deadline = float("inf"), time.perf_counter() + budget_s
    while time.perf_counter() < deadline:
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    import torch

    torch.set_num_threads(spec["num_threads"])
    result: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        pairs = [(torch.randn(NUM_ROWS, n_in).to(dtype), torch.randn(n_in, n_out).to(dtype)) for n_in, n_out in SHAPES]
        num_flops = sum(2 * NUM_ROWS * n_in * n_out for n_in, n_out in SHAPES) * 8

        def products(pairs: list[tuple[torch.Tensor, torch.Tensor]] = pairs) -> None:
            for _ in range(8):
                for left, right in pairs:
                    torch.mm(left, right)

        seconds = best_seconds(products, budget_s=spec["seconds"])
        result[f"gflops_{str(dtype).removeprefix('torch.')}"] = num_flops / seconds / 1e9
    source = torch.zeros(COPY_BYTES // 4)
    target = torch.empty_like(source)
    # A copy reads every byte once and writes it once.
    result["bandwidth_gb_s"] = (
        2 * COPY_BYTES / best_seconds(lambda: target.copy_(source), budget_s=spec["seconds"]) / 1e9
    )
    return result


if __name__ == "__main__":
    run_worker(measure)
