"""Gradients that are not finite: reported, skipped, borne so often and no more."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from model_foundry.errors import EngineError
from model_foundry.recipes.training_run import run_training
from model_foundry.run.directory import RunDirectory
from model_foundry.run.metrics import comparable_lines
from tests.tiny_models import write_tiny_model
from tests.tiny_runs import COLOURS, chat_row, checkpoint_names, records, tiny_config, write_jsonl

POISON = "~"
COMMON = {"training__batch_size": 1, "data__shuffle": False, "training__save_steps": 2}


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in which the embedding of one character is NaN: a row that holds it has no finite gradient."""
    folder = write_tiny_model(tmp_path_factory.mktemp("poisoned") / "model")
    tokens = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    weights = {name: np.array(tensor) for name, tensor in load_file(folder / "model.safetensors").items()}
    weights["model.embed_tokens.weight"][tokens[POISON]] = np.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_rows(path: Path, *, bad: set[int]) -> None:
    names = list(COLOURS.items())
    write_jsonl(path, [chat_row(name + POISON * (row in bad), colour) for row, (name, colour) in enumerate(names)])


def test_a_step_without_finite_gradients_is_reported_and_changes_nothing(poisoned: Path, tmp_path: Path) -> None:
    """Prevents one bad row from turning every weight into NaN, and a skip that nobody is told of."""
    config = tiny_config(tmp_path, model=poisoned, training__max_steps=8, criteria__replay_steps=4, **COMMON)
    write_rows(tmp_path / "train.jsonl", bad={2, 5})
    report = run_training(config)
    steps = records(config.run_dir)
    assert [record["step"] for record in steps if record["skipped"]] == [3, 6]
    assert steps[2]["loss"] is None
    assert steps[2]["grad_norm"] is None
    assert report.training["skipped_steps"] == 2
    assert any("2 steps" in note for note in report.notes)
    assert report.verdict == "passed", "the replay meets the same bad rows"
    final = load_file(config.run_dir / "checkpoints" / "final" / "adapter" / "adapter_model.safetensors")
    assert all(np.isfinite(tensor).all() for tensor in final.values())
    assert "step 3 skipped" in (config.run_dir / "run.log").read_text()


def test_too_many_in_a_row_stop_the_run_and_keep_what_was_saved(poisoned: Path, tmp_path: Path) -> None:
    """Prevents a night spent on skipping, and a resume that starts counting afresh and so never stops."""
    config = tiny_config(tmp_path, model=poisoned, training__max_skipped_steps=2, **COMMON)
    write_rows(tmp_path / "train.jsonl", bad={2, 4, 5, 6, 7})
    with pytest.raises(EngineError, match="3 steps in a row") as caught:
        run_training(config)
    assert caught.value.exit_code == 3
    assert caught.value.where == "step 7"
    assert [record["step"] for record in records(config.run_dir)] == list(range(1, 8))
    assert checkpoint_names(config.run_dir)[-1] == "step-00000006", "saved in the middle of the bad rows"
    assert (RunDirectory.read(config.run_dir).facts["outcome"] or {})["state"] == "failed"
    before = comparable_lines(config.run_dir / "metrics.jsonl")
    with pytest.raises(EngineError, match="3 steps in a row"):
        run_training(config, resume="auto")
    assert comparable_lines(config.run_dir / "metrics.jsonl") == before


def test_skips_far_apart_do_not_add_up(poisoned: Path, tmp_path: Path) -> None:
    """Prevents a limit on all skips, where it is one on skips in a row."""
    config = tiny_config(tmp_path, model=poisoned, training__max_skipped_steps=1, **COMMON)
    write_rows(tmp_path / "train.jsonl", bad={1, 3, 5})
    assert run_training(config).training["skipped_steps"] == 5


def test_a_model_of_nan_stops_at_once_and_says_why(tmp_path: Path) -> None:
    """Prevents a broken download from training to the end on nothing."""
    folder = write_tiny_model(tmp_path / "model")
    weights = {name: np.array(tensor) for name, tensor in load_file(folder / "model.safetensors").items()}
    weights["model.norm.weight"][:] = np.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = tiny_config(tmp_path, model=folder, training__max_skipped_steps=0)
    with pytest.raises(EngineError, match="1 step"):
        run_training(config)
    assert [record["skipped"] for record in records(config.run_dir)] == [True]


def test_an_absurd_rate_ends_in_finite_weights_or_in_an_error(model: Path, tmp_path: Path) -> None:
    """Prevents weights that are not numbers from being saved as a result."""
    config = tiny_config(
        tmp_path, model=model, training__learning_rate=10.0, training__max_grad_norm=0, lora__lora_alpha=1e18,
        training__max_steps=10, training__lr_scheduler="constant",
    )  # fmt: skip
    with pytest.raises(EngineError, match="steps in a row"):
        run_training(config)
    assert records(config.run_dir)[-1]["skipped"]


def test_a_run_that_begins_and_ends_with_skipped_steps_has_a_report(poisoned: Path, tmp_path: Path) -> None:
    """Prevents a report that cannot be written because a loss is not a number."""
    config = tiny_config(tmp_path, model=poisoned, training__max_steps=8, criteria__loss_fall=0.0, **COMMON)
    write_rows(tmp_path / "train.jsonl", bad={0, 7})
    report = run_training(config)
    assert (report.training["first_loss"], report.training["last_loss"]) == (None, None)
    assert (config.run_dir / "report.html").exists()
    assert "2 steps had no finite loss" in report.checks[0].evidence
