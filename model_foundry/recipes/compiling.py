"""Whether a pretraining run compiles its layers: as asked, as the run was begun, or as a few measured passes decide.

What is decided is recorded in the run's folder, for the last bits depend on it: a resumed run does not measure again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from model_foundry.config.pretrain import ExperimentConfig
from model_foundry.engine.base import LocalEngine
from model_foundry.engine.torch_engine import TorchEngine
from model_foundry.errors import EngineError, FoundryError
from model_foundry.recipes.work import Work
from model_foundry.run.progress import duration

logger = logging.getLogger(__name__)
SHORT_RUN_SECONDS = 600
"""Compiling takes some seconds a layer: what it could save of a shorter run is not worth finding out."""
LEAST_GAIN = 0.05
"""Of a pass; less is the noise of a machine that does other things too."""
NUM_PASSES = 3


@dataclass(frozen=True, slots=True)
class Compiling:
    """Whether layers are compiled, and why; figures are in the reason."""

    on: bool
    why: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def choose_compiling(
    work: Work, engine: LocalEngine, model_id: str, *, seconds: float, before: Mapping[str, Any] | None
) -> Compiling | None:
    """Decide, and have the engine's model compiled accordingly; None for methods that do not compile.

    Args:
        seconds: that the run will take without.
        before: what this run recorded when it was begun.

    Raises:
        FoundryError: it was asked for, or is what the run was begun with, and cannot be done here.
    """
    if not isinstance(work.config, ExperimentConfig):
        return None
    asked = work.config.training.compile
    if before is not None:
        chosen = Compiling(bool(before["on"]), "as this run was begun")
        if chosen.on:
            _compile(work, engine, model_id)
    elif asked == "auto":
        chosen = _measured(work, engine, model_id, seconds)
    else:
        chosen = Compiling(asked == "on", "as asked")
        if chosen.on:
            _compile(work, engine, model_id)
    logger.info("torch.compile: %s (%s)", "on" if chosen.on else "off", chosen.why)
    return chosen


def _compile(work: Work, engine: LocalEngine, model_id: str) -> float:
    """Compile by a first pass; the seconds it took.

    Raises:
        EngineError: it failed. FoundryError: as the engine raises it.
    """
    if not isinstance(engine, TorchEngine):
        what = f"torch.compile is not for the engine {engine.kind}"
        raise EngineError(what, where="training.compile", hint="Set training.compile=off.")
    try:
        engine.compile_layers(model_id, True)
        return _seconds(work, engine, model_id, 1)
    except Exception as error:  # whatever a compiler, its tools or its files may raise
        engine.compile_layers(model_id, False)
        if isinstance(error, FoundryError):
            raise
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        hint = "Set training.compile=off."
        raise EngineError(f"torch.compile failed ({reason})", where="training.compile", hint=hint) from error


def _measured(work: Work, engine: LocalEngine, model_id: str, seconds: float) -> Compiling:
    """The same passes both ways. On where a run so long gains more than compiling takes."""
    if seconds < SHORT_RUN_SECONDS:
        return Compiling(False, f"the run takes about {duration(seconds)}, too short for compiling to pay")
    plain = _seconds(work, engine, model_id, NUM_PASSES)
    try:
        once = _compile(work, engine, model_id)
    except FoundryError as error:
        return Compiling(False, error.what)
    compiled = _seconds(work, engine, model_id, NUM_PASSES)
    gain = 1 - compiled / plain
    why = f"a pass takes {compiled:.3f} s compiled and {plain:.3f} s as it is; compiling took {once:.0f} s"
    if gain < LEAST_GAIN or gain * seconds < once:
        assert isinstance(engine, TorchEngine)
        engine.compile_layers(model_id, False)
        return Compiling(False, why)
    return Compiling(True, why)


def _seconds(work: Work, engine: LocalEngine, model_id: str, num_passes: int) -> float:
    """The quickest of some passes of the longest batch; nothing of them remains."""
    batch, best = work.longest_batch(), float("inf")
    for _ in range(num_passes):
        started = time.perf_counter()
        engine.forward_backward(model_id, batch)
        best = min(best, time.perf_counter() - started)
        engine.discard_gradients(model_id)
    return best
