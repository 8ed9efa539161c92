"""The plan's predicted peak memory against the peak of a fresh process, on the real model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model_foundry.config.load import load_config
from model_foundry.config.schema import TrainConfig
from model_foundry.recipes.measure_memory import measure, task_of
from model_foundry.recipes.preparation import prepare
from model_foundry.run.directory import utc_now
from tests.tiny_runs import chat_row, foundry, write_jsonl

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
MAX_ERROR = 0.2
QUESTION = "Tell me everything there is to know about the island of Merrowick, and then some more. "


@pytest.mark.parametrize("lora", [True, False])
def test_the_predicted_peak_is_within_a_fifth_of_the_measured_one(lora: bool, tmp_path: Path) -> None:
    """Prevents a plan that promises what the machine cannot hold, or refuses what it can."""
    rows = write_jsonl(tmp_path / "train.jsonl", [chat_row(QUESTION * (1 + n % 9), "No. " * 30) for n in range(8)])
    overrides = [
        "model.name=smollm2-135m-instruct", "model.dtype=float32", f"data.train_file={rows}", "training.batch_size=4",
        "training.max_steps=2", "training.num_threads=2", f"lora.enabled={str(lora).lower()}",
        "lora.target_modules=[q_proj,v_proj,down_proj]", f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    done = foundry("train", "--dry-run", "--json", *overrides, timeout=300)
    assert done.returncode == 0, done.stderr
    plan: dict[str, Any] = json.loads(done.stdout)
    assert not (tmp_path / "run").exists()
    prepared = prepare(load_config(TrainConfig, path=None, overrides=overrides).config, now=utc_now())
    task = task_of(
        prepared.longest_batch(), folder=str(prepared.source.folder), lora=prepared.lora, device="cpu", dtype="float32",
        num_threads=2, implementation="auto", gradient_checkpointing=False, micro_batch_tokens=None,
    )  # fmt: skip
    peak = measure(task, timeout_s=300).peak
    predicted = plan["memory"]["total"]
    assert abs(predicted / peak - 1) < MAX_ERROR, (predicted, peak, plan["memory"])
    assert plan["longest_batch_tokens"] == sum(datum.num_tokens for datum in prepared.longest_batch())
