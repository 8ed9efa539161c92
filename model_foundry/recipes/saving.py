"""Checkpoints of a run: written beside the loop, and read back.

Knows the engine's tensors and the run's folder; decides nothing about when.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from model_foundry.checkpoint.background import BackgroundSaver
from model_foundry.checkpoint.store import FINAL, Checkpoint, step_name
from model_foundry.engine.base import LocalEngine
from model_foundry.errors import RunError
from model_foundry.recipes.work import Work
from model_foundry.run.directory import RunDirectory


class RunSaver:
    """Saves a model's weights and optimizer under the step's name, in the background, keeping few."""

    def __init__(self, run: RunDirectory, engine: LocalEngine, model_id: str, work: Work) -> None:
        self._engine, self._model_id, self._prepared = engine, model_id, work
        self.saver = BackgroundSaver(run.checkpoints, keep=work.config.training.save_total_limit)

    def save(self, step: int, *, final: bool = False) -> None:
        """Begin a save; what an earlier one failed with is raised here. See `before_update`."""
        engine, model_id = self._engine, self._model_id
        weights, moments = engine.trained_tensors(model_id), engine.state_tensors(model_id)
        facts = engine.state_facts(model_id)

        def write(folder: Path) -> None:
            engine.write_weights(model_id, folder, weights)
            engine.write_state(model_id, folder, moments, facts)

        num_bytes = sum(t.numel() * t.element_size() for t in (*weights.values(), *moments.values()))
        metadata = checkpoint_metadata(self._prepared, step)
        self.saver.start(FINAL if final else step_name(step), step, write, metadata, expected_bytes=num_bytes)

    def before_update(self) -> None:
        """Wait until a save under way has read the weights, which the next step changes."""
        self.saver.wait_until_read()


def checkpoint_metadata(work: Work, step: int) -> dict[str, Any]:
    """What a checkpoint must fit to be loaded here."""
    return {
        "method": work.config.method,
        "step": step,
        "renderer": work.renderer.fingerprint,
        "model": work.model_fingerprint,
        "seed": work.config.seed,
    }


def load_checkpoint(
    checkpoint: Checkpoint, engine: LocalEngine, model_id: str, work: Work, say: Callable[[str], None]
) -> int:
    """Load weights and optimizer; the step it was saved at.

    Raises:
        RunError: it was made with another model, template or seed.
    """
    expected = checkpoint_metadata(work, checkpoint.step)
    for key in ("method", "renderer", "model", "seed"):
        if checkpoint.metadata.get(key) != expected[key]:
            raise RunError(f"the checkpoint was made with another {key}", where=str(checkpoint.path))
    for warning in engine.load_state(model_id, checkpoint.path, optimizer=True):
        say(warning)
    return checkpoint.step
