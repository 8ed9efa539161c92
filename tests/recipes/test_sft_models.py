"""The recipe is the same for every architecture and every format of rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model_foundry.errors import ModelError
from model_foundry.recipes.plan import plan_text
from model_foundry.recipes.training_run import plan_run, run_training
from tests.tiny_runs import COLOURS, losses, tiny_config, write_jsonl

FORMATS: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "sharegpt": lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
    "alpaca": lambda q, a: {"instruction": q, "input": "", "output": a},
    "input_output": lambda q, a: {"input": q, "output": a},
    "prompt_completion": lambda q, a: {"prompt": q, "completion": a},
    "text": lambda q, a: {"text": f"{q} {a}"},
}


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "gemma", "mistral", "qwen3", "qwen3-moe", "qwen3-moe-mixed"])
def test_every_architecture_trains_is_saved_and_repeats(
    kind: str, lora: bool, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Prevents an architecture that trains but cannot be saved, loaded or repeated."""
    config = tiny_config(
        tmp_path, model=tiny_folder(kind), lora__enabled=lora, training__max_steps=8, training__learning_rate=0.01,
        criteria__replay_steps=4, criteria__loss_fall=0.1,
    )  # fmt: skip
    report = run_training(config)
    assert report.verdict == "passed", [check.as_dict() for check in report.checks]
    assert [check.name for check in report.checks] == ["loss_fall", "artefacts_load", "replay_identical"]


def test_the_plan_of_a_foreign_architecture_says_that_it_predicts_nothing(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Prevents a number that nothing stands behind."""
    plan = plan_run(tiny_config(tmp_path, model=tiny_folder("gpt2")))
    assert plan["memory"] is None
    assert plan["measured_peak_bytes"] > 0


def test_a_dry_run_on_a_config_alone_says_what_can_be_said(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """A large model is fetched after its plan, not for it; and no row is read that may not exist yet."""
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape" / "config.json").write_text((tiny_folder("qwen3-moe") / "config.json").read_text())
    config = tiny_config(tmp_path, model=tmp_path / "shape")
    text = plan_text(plan_run(config))
    assert "no step was measured" in text
    assert "qwen3_moe" in text
    with pytest.raises(ModelError, match="holds no weights"):
        run_training(config)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_of_rows_trains(name: str, model: Path, tmp_path: Path) -> None:
    """Prevents a format that is read but has nothing to train on."""
    config = tiny_config(tmp_path, model=model, training__max_steps=6)
    write_jsonl(tmp_path / "train.jsonl", [FORMATS[name](f"Colour of {q}?", a) for q, a in COLOURS.items()])
    report = run_training(config)
    assert report.data["train"]["format"] == name
    falling = losses(config.run_dir)
    assert falling[-1] < falling[0]
