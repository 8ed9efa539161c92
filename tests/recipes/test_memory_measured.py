"""Predicted peak memory within 20 % of the measured one: real model, fresh processes, two lengths, LoRA and full."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from model_foundry.models.architecture import Architecture, to_config
from model_foundry.models.config import ModelConfig
from model_foundry.models.finder import resolve_model
from model_foundry.models.folder import read_config
from model_foundry.models.initialise import write_fresh_model
from model_foundry.models.memory import estimate_memory
from model_foundry.recipes.measure_memory import measure, task_of
from model_foundry.types import Datum, LoraConfig, Pair
from tests.tiny_models import write_tokenizer

pytestmark = pytest.mark.slow

STEP = """
import json, sys
from pathlib import Path
import numpy as np
from model_foundry.engine.platform import resident_memory_bytes
from model_foundry.engine.torch_engine import TorchEngine
from model_foundry.types import AdamParams, Datum, LoraConfig
job = json.loads(sys.argv[1])
before = resident_memory_bytes()
engine = TorchEngine(
    dtype=job["dtype"], device="cpu", gradient_checkpointing=job["checkpointing"], quantization=job["quantization"]
)
model = engine.create_model(Path(job["folder"]), lora=LoraConfig() if job["lora"] else None)
random = np.random.default_rng(0)
rows = [random.integers(5, job["vocabulary"], length + 1).astype(np.int32) for length in job["rows"]]
data = [Datum.from_row(row, np.ones(len(row), np.float32)) for row in rows]
engine.forward_backward(model, data)
engine.optim_step(model, AdamParams())
print(json.dumps({"before": before, "peak": engine.peak_memory_bytes()}))
"""


@pytest.mark.parametrize(
    "lora, dtype, rows, checkpointing",
    [
        (True, "float32", [256, 256], False),
        (True, "float32", [768], False),
        (True, "bfloat16", [256, 256], False),
        (True, "float32", [256, 256], True),
        (False, "float32", [256, 256], False),
        (False, "float32", [768], False),
    ],
)
def test_the_predicted_peak_is_within_a_fifth_of_the_measured_one(
    lora: bool, dtype: str, rows: list[int], checkpointing: bool
) -> None:
    """A plan that says 3 GB for a run that takes 5 is worse than none."""
    folder = resolve_model("smollm2-135m-instruct").folder
    assert_foretold(folder, lora=lora, dtype=dtype, rows=rows, checkpointing=checkpointing)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("lora, rows", [(True, [256] * 4), (True, [768] * 2), (False, [256] * 4)])
def test_experts_and_packed_weights_are_foretold_as_well(
    lora: bool, rows: list[int], quantization: str, tmp_path: Path
) -> None:
    """Counted as if every token met every expert, a plan would refuse what fits."""
    if quantization == "nf4":
        pytest.importorskip("bitsandbytes", reason="the extra quant is not installed")
        if not lora:
            pytest.skip("packed weights are not trained whole")
    shape = Architecture(
        "qwen3_moe", 16_000, 2048, 8, 512, 8, num_key_value_heads=4, head_dim=64, num_experts=16,
        num_experts_per_tok=4, moe_intermediate_size=256, router_aux_loss_coef=0.0,
    )  # fmt: skip
    folder, tokenizer = tmp_path / "model", write_tokenizer(tmp_path / "tokenizer")
    write_fresh_model(folder, to_config(shape), seed=0, tokenizer_from=tokenizer)
    # One run in four finds 250 MB less: the heap of glibc grows in such steps, and now and then one is spared.
    for last in (False, False, True):
        try:
            assert_foretold(folder, lora=lora, rows=rows, quantization=quantization, vocabulary=16_000)
            break
        except AssertionError:
            if last:
                raise


def assert_foretold(
    folder: Path,
    *,
    lora: bool,
    rows: list[int],
    dtype: str = "float32",
    checkpointing: bool = False,
    quantization: str = "none",
    vocabulary: int = 49_000,
) -> None:
    job = {
        "folder": str(folder), "lora": lora, "dtype": dtype, "rows": rows, "checkpointing": checkpointing,
        "quantization": quantization, "vocabulary": vocabulary,
    }  # fmt: skip
    command = [sys.executable, "-c", STEP, json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    estimate = estimate_memory(
        ModelConfig.from_hf(read_config(folder)),
        lora=LoraConfig() if lora else None,
        rows=rows,
        dtype_bytes=2 if dtype == "bfloat16" else 4,
        gradient_checkpointing=checkpointing,
        process_bytes=measured["before"],
        packed=quantization != "none",
    )
    assert estimate.total == pytest.approx(measured["peak"], rel=0.2), estimate.as_dict()


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_the_peak_of_preference_training_is_foretold(lora: bool) -> None:
    """Prevents a plan that counts both answers' prompts, or a second model for the reference."""
    folder = resolve_model("smollm2-135m-instruct").folder
    batch = joined_pairs(num_pairs=2 if lora else 1, num_shared=384, num_answer=64)
    task = task_of(
        batch, folder=str(folder), lora=LoraConfig() if lora else None, device="cpu", dtype="float32", num_threads=1,
        implementation="auto", gradient_checkpointing=False, micro_batch_tokens=None, loss_fn="dpo_sigmoid",
    )  # fmt: skip
    measured = measure(task, timeout_s=280)
    estimate = estimate_memory(
        ModelConfig.from_hf(read_config(folder)),
        lora=task.lora,
        rows=[datum.num_tokens for datum in batch],
        num_due_tokens=sum(int((datum.loss_inputs["weights"] != 0).sum()) for datum in batch),
        process_bytes=measured.process,
    )
    assert estimate.total == pytest.approx(measured.peak, rel=0.15), estimate.as_dict()


def joined_pairs(*, num_pairs: int, num_shared: int, num_answer: int) -> list[Datum]:
    random, pairs = np.random.default_rng(0), []
    for _ in range(num_pairs):
        prompt = random.integers(5, 49_000, num_shared + 1).astype(np.int32)
        weights = np.concatenate([np.zeros(num_shared + 1), np.ones(num_answer)]).astype(np.float32)
        sides = [np.concatenate([prompt, random.integers(5, 49_000, num_answer).astype(np.int32)]) for _ in range(2)]
        pairs.append(Pair(*(Datum.from_row(ids, weights) for ids in sides)).joined())
    return pairs
