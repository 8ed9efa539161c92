"""Our engine for one short run: the same rows, eight a step, packed.

It calls what the recipe calls and in the same order: `forward_backward`, `optim_step`, and for B12 a save beside the
next forward pass.
"""

from __future__ import annotations

# isort: off
import model_foundry  # noqa: F401 - before torch, as the command line does: it sets what torch's libraries read
# isort: on

import contextlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.chat_rows import IGNORED, ChatRow, read_rows
from benchmarks.workers.process import StepLog, resident_bytes, run_worker, settle_memory
from model_foundry.checkpoint.background import BackgroundSaver
from model_foundry.checkpoint.store import CheckpointStore, step_name
from model_foundry.engine.torch_engine import TorchEngine
from model_foundry.types import AdamParams, Datum, LoraConfig

# What HF Trainer clips at unless told otherwise.
MAX_GRAD_NORM = 1.0


def as_datums(rows: list[ChatRow]) -> list[Datum]:
    """Weights are one over the step's trained tokens, so that the summed loss is their mean."""
    share = 1.0 / sum(row.num_trained_tokens for row in rows)
    return [
        Datum.from_row(
            np.asarray(row.input_ids, dtype=np.int32),
            np.asarray([share if label != IGNORED else 0.0 for label in row.labels], dtype=np.float32),
        )
        for row in rows
    ]


def make_engine(spec: dict[str, Any]) -> tuple[TorchEngine, str]:
    engine = TorchEngine(
        device="cpu",
        dtype=spec["dtype"],
        num_threads=spec["num_threads"],
        gradient_checkpointing=spec.get("gradient_checkpointing", False),
    )
    lora = LoraConfig(**spec["lora"]) if spec.get("lora") else None
    return engine, engine.create_model(Path(spec["model"]), lora=lora, seed=spec["seed"])


def train(spec: dict[str, Any]) -> dict[str, Any]:
    engine, model = make_engine(spec)
    facts = engine.describe(model)
    log = StepLog(num_trainable=facts["trained_parameters"], versions={"torch": torch.__version__}, notes=facts)
    log.num_parameters = facts["base_parameters"] + (log.num_trainable if spec.get("lora") else 0)
    rows = read_rows(spec["rows"])
    size = spec["rows_per_step"]
    steps = [rows[first : first + size] for first in range(0, len(rows), size)]
    probe = as_datums(read_rows(spec["probe"])) if "probe" in spec else None
    before = engine.forward(model, probe).loss_sum if probe else None
    log.loaded_bytes = settle_memory()
    with contextlib.ExitStack() as stack:
        saver = None
        if spec.get("save_steps"):
            saver = stack.enter_context(BackgroundSaver(CheckpointStore(Path(spec["scratch"], "checkpoints")), keep=2))
        for number, step in enumerate(steps, start=1):
            make_step(engine, model, step, log, saver=saver, learning_rate=spec["learning_rate"])
            if saver and number % spec["save_steps"] == 0:
                saver.start(step_name(number), number, lambda folder: engine.save_state(model, folder))
                log.saved_after.append(number)
    log.peak_bytes = resident_bytes("VmHWM")
    log.loss_before, log.loss_after = log.losses[0], log.losses[-1]
    if before is not None and probe:
        log.loss_before, log.loss_after = before, engine.forward(model, probe).loss_sum
    return log.as_dict()


def make_step(
    engine: TorchEngine,
    model: str,
    rows: list[ChatRow],
    log: StepLog,
    *,
    saver: BackgroundSaver | None,
    learning_rate: float,
) -> None:
    log.start()
    output = engine.forward_backward(model, as_datums(rows))
    if saver:
        saver.wait_until_read()
    result = engine.optim_step(model, AdamParams(learning_rate=learning_rate, grad_clip_norm=MAX_GRAD_NORM))
    log.stop()
    log.notes.setdefault("first_step_ended", time.time())
    log.losses.append(output.loss_sum)
    log.grad_norms.append(result.grad_norm)
    log.tokens.append(sum(len(row.input_ids) for row in rows))


if __name__ == "__main__":
    run_worker(train)
