"""Peak memory of training steps, measured in a process of its own: `python -m model_foundry.recipes.measure_memory`.

Reads one JSON object from standard input (`MemoryTask`) and prints one. Memory that a process has once taken does not
come back, so two ways of training can only be compared in two processes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model_foundry.errors import EngineError
from model_foundry.types import AdamParams, Datum, LoraConfig

NUM_STEPS = 2
_OPTIONS = (
    "device", "dtype", "num_threads", "implementation", "attention", "quantization", "gradient_checkpointing",
    "micro_batch_tokens",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class MemoryTask:
    """One measurement: the model, how it is trained, and the rows of the batch."""

    folder: str
    lora: LoraConfig | None
    device: str
    dtype: str
    num_threads: int | None
    implementation: str
    gradient_checkpointing: bool
    micro_batch_tokens: int | None
    tokens: tuple[tuple[int, ...], ...]
    targets: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...]
    branches: tuple[tuple[int, ...], ...] = ()
    loss_fn: str = "cross_entropy"
    attention: str = "auto"
    quantization: str = "none"
    engine: str = "torch"


@dataclass(frozen=True, slots=True)
class MemoryPeak:
    """Bytes: before the model was loaded, with it loaded, and the peak of the steps."""

    process: int
    loaded: int
    peak: int


def task_of(batch: Sequence[Datum], **fields: Any) -> MemoryTask:
    return MemoryTask(
        tokens=tuple(tuple(datum.tokens.tolist()) for datum in batch),
        targets=tuple(tuple(datum.loss_inputs["target_tokens"].tolist()) for datum in batch),
        weights=tuple(tuple(datum.loss_inputs["weights"].tolist()) for datum in batch),
        branches=tuple(datum.branches for datum in batch),
        **fields,
    )


def measure(task: MemoryTask, *, timeout_s: float = 900) -> MemoryPeak:
    """Run the steps in a fresh process.

    Raises:
        EngineError: the process failed, and its last line says why; or it took too long.
    """
    command = [sys.executable, "-m", "model_foundry.recipes.measure_memory"]
    try:
        done = subprocess.run(
            command, input=json.dumps(asdict(task)), capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise EngineError(f"memory could not be measured within {timeout_s:.0f} seconds") from None
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise EngineError(f"memory could not be measured ({reason})")
    return MemoryPeak(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    from model_foundry.engine.choose import open_engine
    from model_foundry.engine.platform import resident_memory_bytes

    values = json.loads(sys.stdin.read())
    options = {name: values[name] for name in _OPTIONS}
    engine = open_engine(values["engine"], options)
    lora = values["lora"]
    if lora is not None and not isinstance(lora["target_modules"], str):
        lora["target_modules"] = tuple(lora["target_modules"])
    process = resident_memory_bytes()
    model_id = engine.create_model(Path(values["folder"]), lora=None if lora is None else LoraConfig(**lora))
    loaded = resident_memory_bytes()
    forks = values["branches"] or [()] * len(values["tokens"])
    batch = [_datum(*row) for row in zip(values["tokens"], values["targets"], values["weights"], forks, strict=True)]
    for _ in range(NUM_STEPS):
        engine.forward_backward(model_id, batch, loss_fn=values["loss_fn"])
        engine.optim_step(model_id, AdamParams())
    print(json.dumps({"process": process, "loaded": loaded, "peak": engine.peak_memory_bytes()}))


def _datum(tokens: list[int], targets: list[int], weights: list[float], branches: Sequence[int]) -> Datum:
    inputs = {"target_tokens": np.array(targets, dtype=np.int32), "weights": np.array(weights, dtype=np.float32)}
    inputs["logprobs"] = np.zeros_like(inputs["weights"])  # a reference, for losses that have one
    return Datum(np.array(tokens, dtype=np.int32), inputs, tuple(branches))


if __name__ == "__main__":
    main()
