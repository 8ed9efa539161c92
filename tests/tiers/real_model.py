"""Tier 2: a real model learns facts it is asked about in other words; five numbers say whether it did."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tests.tiers.record import StepFailed, Tier, foundry, said

LIMIT_SECONDS = 300
MODEL = "smollm2-135m-instruct"
ENABLE = "FT_REAL_MODEL_ENABLE"
CRITERIA = {"loss_fall": 0.05, "answers_improved": 0.30, "memory_saving": 0.30, "parameters_changed": 0.80}


def model_name(*variables: str) -> str:
    """The model that the first of these environment variables that is set names."""
    return next((os.environ[name] for name in variables if os.environ.get(name)), MODEL)


def run(tier: Tier) -> None:
    if os.environ.get(ENABLE) != "1":
        tier.step("permission", lambda: _refuse())
        return
    model = tier.model = model_name("FT_TEST_MODEL", "FT_E2E_MODEL_ID")
    if not (tier.step(f"cache {model}", lambda: cache(model)) and tier.step("facts", lambda: write_facts(tier.folder))):
        return
    config = write_config(tier.folder, model, criteria=CRITERIA, max_steps=24, batch_size=8)
    if tier.step("train, prove, report", lambda: train(config)) is None:
        return
    tier.num_runs += 1
    tier.take_checks(tier.folder / "run", required=(*CRITERIA, "artefacts_load"))


def _refuse() -> None:
    raise StepFailed(f"a real model is loaded and trained only with {ENABLE}=1 (make test-e2e-quick sets it)")


def cache(model: str) -> bool:
    """Fetched once, checked, and used without a network from then on."""
    foundry("models", "pull", model)
    return True


def write_facts(folder: Path, *, num_rows: int = 96, num_questions: int = 16) -> bool:
    """Capitals, and questions about them in words that training never sees; the gate lets them through."""
    foundry(
        "data", "synth", "geography", "--rows", num_rows, "--out", folder / "rows.jsonl",
        "--heldout", folder / "questions.jsonl", "--heldout-rows", num_questions,
    )  # fmt: skip
    return True


def write_config(
    folder: Path, model: str, *, criteria: dict[str, Any], max_steps: int, batch_size: int, dtype: str = "auto"
) -> Path:
    """A configuration as JSON, which is YAML too."""
    config = {
        "run_dir": str(folder / "run"),
        "model": {"name": model, "dtype": dtype},
        "data": {"train_file": str(folder / "rows.jsonl"), "max_length": 128},
        "training": {
            "max_steps": max_steps, "batch_size": batch_size, "learning_rate": 1e-3, "warmup_steps": 2,
            "save_steps": max_steps // 2,
        },
        "evaluation": {"file": str(folder / "questions.jsonl"), "max_new_tokens": 12, "suites": []},
        "criteria": criteria,
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(json.dumps(config, indent=1))
    return path


def train(config: Path, *overrides: str, env: dict[str, str] | None = None) -> bool:
    """Exit code 1 means that a check failed; which, the run's report says."""
    said("train", config, *overrides, env={"HF_HUB_OFFLINE": "1"} | (env or {}), ok=(0, 1))
    return True
