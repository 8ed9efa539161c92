"""What the training benchmarks share: real tokens a second, the proof that a run trained, utilisation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.chat_rows import fixed_rows, make_rows, write_rows
from benchmarks.harness import BenchmarkError, Options, Result, Rounds
from model_foundry.rendering import Renderer
from model_foundry.tokenizer import Tokenizer

ROWS_PER_STEP = 8
NUM_PROBE_ROWS = 4
# Steps left out of the time: kernels are chosen and the allocator warms up in the first.
NUM_WARM_UP_STEPS = 1
LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-2}
LORA = {"r": 16, "lora_alpha": 32.0, "target_modules": "all-linear"}
LEARNING_RATE = 2e-4


def write_data(
    folder: Path,
    *,
    model: Path,
    options: Options,
    tokens_per_row: int | None = None,
    rows_per_step: int = ROWS_PER_STEP,
) -> dict[str, Any]:
    """Writes the rows every peer trains on, and the probe rows on which their losses must agree.

    With `tokens_per_row` every step has the same rows of exactly that length.
    """
    renderer = Renderer(Tokenizer.load(model))
    if tokens_per_row is None:
        rows = make_rows(renderer, num_rows=options.num_rows, seed=options.seed)
    else:
        rows = fixed_rows(renderer, num_rows=rows_per_step, num_tokens=tokens_per_row, seed=options.seed)
        rows = rows * (options.num_rows // rows_per_step)
    write_rows(folder / "rows.jsonl", rows)
    write_rows(folder / "probe.jsonl", make_rows(renderer, num_rows=NUM_PROBE_ROWS, seed=options.seed + 1))
    return {
        "model": str(model),
        "rows": str(folder / "rows.jsonl"),
        "probe": str(folder / "probe.jsonl"),
        "rows_per_step": rows_per_step,
        "learning_rate": LEARNING_RATE,
        "lora": LORA,
    }


def tokens_per_second(result: Result) -> float:
    """Real tokens (no padding) over the time of the optimizer steps, warm-up left out."""
    return sum(result["tokens"][NUM_WARM_UP_STEPS:]) / sum(result["seconds"][NUM_WARM_UP_STEPS:])


def check_learned(name: str, result: Result) -> None:
    norms = result["grad_norms"]
    if not norms or not all(math.isfinite(norm) and norm > 0 for norm in norms):
        raise BenchmarkError(f"{name}: gradient norms must be finite and above zero, they were {norms}")
    if not result["loss_after"] < result["loss_before"]:
        raise BenchmarkError(f"{name}: the loss went from {result['loss_before']} to {result['loss_after']}")


def check_agreement(rounds: Rounds, *, dtype: str) -> dict[str, float]:
    """Every peer's loss on the probe rows, through its own training path, before its first step."""
    losses = {name: statistics.median(r["loss_before"] for r in results) for name, results in rounds.results.items()}
    for name, results in rounds.results.items():
        for result in results:
            check_learned(name, result)
    middle = statistics.median(losses.values())
    apart = {name: loss for name, loss in losses.items() if abs(loss / middle - 1) > LOSS_TOLERANCE[dtype]}
    if apart:
        raise BenchmarkError(f"the peers do not compute the same loss: {losses}")
    return losses


def utilisation(rate: float, *, num_parameters: int, flops_per_parameter: int, machine: Mapping[str, float]) -> float:
    """Share of the measured bfloat16 matrix speed: 4N FLOPs a token for LoRA, 6N for full training."""
    return rate * flops_per_parameter * num_parameters / (machine["gflops_bfloat16"] * 1e9)
