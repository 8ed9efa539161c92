"""The random model that the command-line tests train, and one undisturbed run to compare with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from model_foundry.recipes.verify import compare_runs
from tests.tiny_models import write_tiny_model
from tests.tiny_runs import foundry, write_colours, write_project

NUM_STEPS = 24


@dataclass(frozen=True)
class Straight:
    """A configuration and the run it gave when nothing disturbed it."""

    config: Path
    run: Path

    def assert_equal(self, other: Path) -> None:
        """Weights, optimizer state and records of `other` are the same bits."""
        checks = compare_runs(self.run, other)
        assert all(check.passed for check in checks), checks


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for an adapter on frozen weights to learn eight answers by heart."""
    folder = tmp_path_factory.mktemp("model") / "llama"
    return write_tiny_model(folder, hidden_size=64, intermediate_size=96, tie_word_embeddings=True)


@pytest.fixture(scope="session")
def straight(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """Steps long enough to be interrupted, with everything in them that a resume could get wrong."""
    folder = tmp_path_factory.mktemp("straight")
    config = write_project(
        folder, model=model, lora__lora_dropout=0.1, data__max_length=1024,
        data__validation_file=str(folder / "train.jsonl"), training__max_steps=NUM_STEPS, training__batch_size=3,
        training__gradient_accumulation_steps=2, training__eval_steps=4, training__learning_rate=0.01,
    )  # fmt: skip
    write_colours(folder / "train.jsonl", repeat=20)
    done = foundry("train", config)
    assert done.returncode == 0, done.stderr
    return Straight(config, folder / "run")
