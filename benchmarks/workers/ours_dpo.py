"""Our preference training for one short run: the reference asked once, then what the recipe calls in its order."""

from __future__ import annotations

# isort: off
import model_foundry  # noqa: F401 - before torch, as the command line does: it sets what torch's libraries read
# isort: on

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.workers.ours import MAX_GRAD_NORM, make_engine
from benchmarks.workers.process import StepLog, resident_bytes, run_worker, settle_memory
from model_foundry.types import AdamParams, Datum, Pair

BETA = 0.1
LOSS = {"loss_fn": "dpo_sigmoid", "loss_config": {"beta": BETA}}


def read_pairs(path: str) -> list[Datum]:
    pairs = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        prompt = record["prompt_ids"]
        sides = []
        for answer in (record["chosen_ids"], record["rejected_ids"]):
            weights = np.array([0.0] * len(prompt) + [1.0] * len(answer), dtype=np.float32)
            sides.append(Datum.from_row(np.array(prompt + answer, dtype=np.int32), weights))
        pairs.append(Pair(*sides).joined())
    return pairs


def with_reference(datum: Datum, logprobs: np.ndarray, *, share: float) -> Datum:
    weights = (datum.loss_inputs["weights"] * share).astype(np.float32)
    return replace(datum, loss_inputs={**datum.loss_inputs, "weights": weights, "logprobs": np.nan_to_num(logprobs)})


def train(spec: dict[str, Any]) -> dict[str, Any]:
    engine, model = make_engine(spec)
    facts = engine.describe(model)
    log = StepLog(num_trainable=facts["trained_parameters"], versions={"torch": torch.__version__}, notes=facts)
    log.num_parameters = facts["base_parameters"] + log.num_trainable
    size = spec["rows_per_step"]
    pairs = read_pairs(spec["pairs"])
    log.loaded_bytes = settle_memory()
    started = time.perf_counter()
    reference = [
        logprobs
        for first in range(0, len(pairs), size)
        for logprobs in engine.forward(model, pairs[first : first + size]).logprobs
    ]
    log.notes |= {"reference_seconds": time.perf_counter() - started, "num_pairs": len(pairs)}
    data = [with_reference(*each, share=1 / size) for each in zip(pairs, reference, strict=True)]
    for first in range(0, len(data), size):
        step = data[first : first + size]
        log.start()
        output = engine.forward_backward(model, step, **LOSS)
        params = AdamParams(learning_rate=spec["learning_rate"], grad_clip_norm=MAX_GRAD_NORM)
        log.grad_norms.append(engine.optim_step(model, params).grad_norm)
        log.stop()
        log.losses.append(output.loss_sum)
        log.tokens.append(sum(datum.num_tokens for datum in step))
        if first == 0:
            chosen = [np.nansum(p[d.num_shared :][: d.branches[0]]) for d, p in zip(step, output.logprobs, strict=True)]
            log.notes["first_logps"] = float(np.mean(chosen))
    log.peak_bytes = resident_bytes("VmHWM")
    log.loss_before = log.losses[0]
    log.loss_after = engine.forward(model, data[:size], **LOSS).loss_sum
    return log.as_dict()


if __name__ == "__main__":
    run_worker(train)
