"""The recipe learns: eight facts that no model can know come back word for word, however it is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from model_foundry.recipes.training_run import run_training
from tests.tiny_runs import losses, records, tiny_config, write_questions

LORA = {"training__max_steps": 50, "training__learning_rate": 0.01}
WAYS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "lora in bfloat16": LORA | {"model__dtype": "bfloat16"},
    "rsLoRA": LORA | {"lora__use_rslora": True, "lora__lora_alpha": 6},
    "DoRA": LORA | {"lora__use_dora": True},
    "packed": LORA | {"data__packing": True, "data__max_length": 128, "training__batch_size": 4},
    "checkpointed": LORA | {"training__gradient_checkpointing": True},
    "full": {"lora__enabled": False, "training__max_steps": 40, "training__learning_rate": 0.01},
    "full in bfloat16": {
        "lora__enabled": False, "training__max_steps": 40, "training__learning_rate": 0.01, "model__dtype": "bfloat16"
    },
    "full with muon": {
        "lora__enabled": False, "training__max_steps": 40, "training__learning_rate": 0.02,
        "training__optimizer": "muon",
    },
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_eight_examples_are_learnt_by_heart(way: str, model: Path, tmp_path: Path) -> None:
    """Prevents a loss mask, a gradient or an optimizer that trains something else than the answers."""
    questions = write_questions(tmp_path / "questions.jsonl")
    changes = {"evaluation__file": str(questions), "evaluation__max_new_tokens": 12, "training__save_steps": 0}
    report = run_training(tiny_config(tmp_path, model=model, **changes, **WAYS[way]))
    assert report.evaluation["before"]["exact"] == 0.0
    assert report.evaluation["after"]["exact"] == 1.0
    falling = losses(tmp_path / "run")
    assert falling[-1] < falling[0] / 10
    assert report.training["first_loss"] == falling[0]
    assert report.training["last_loss"] == falling[-1]
    assert report.verdict == "passed"


def test_dropout_trains_and_is_the_same_on_every_run(model: Path, tmp_path: Path) -> None:
    """Prevents dropout that is silently off, and dropout drawn from hidden state."""
    curves = {
        name: losses(tmp_path / name / "run")
        for name, dropout in (("none", 0.0), ("some", 0.3), ("again", 0.3))
        if run_training(tiny_config(tmp_path / name, model=model, lora__lora_dropout=dropout))
    }
    assert curves["some"] == curves["again"]
    assert curves["some"][0] == curves["none"][0], "B is zero, so the first loss knows no dropout"
    assert all(a != b for a, b in zip(curves["some"][1:], curves["none"][1:], strict=True))
    assert curves["some"][-1] < curves["some"][0]


def test_validation_loss_is_the_mean_over_trained_tokens_and_knows_no_dropout(model: Path, tmp_path: Path) -> None:
    """Prevents a mean of means, and a validation in training mode."""
    config = tiny_config(
        tmp_path, model=model, data__validation_file=str(tmp_path / "train.jsonl"), lora__lora_dropout=0.5,
        training__eval_steps=1, training__max_steps=2, training__learning_rate=1e-9,
    )  # fmt: skip
    run_training(config)
    validation, training = records(tmp_path / "run", "validation"), records(tmp_path / "run")
    assert [record["step"] for record in validation] == [0, 1, 2]
    assert validation[0]["loss"] == pytest.approx(training[0]["loss"], rel=1e-6)
    assert validation[2]["loss"] == pytest.approx(validation[0]["loss"], rel=1e-4)
