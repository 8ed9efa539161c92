"""A training client on an engine in this process. Calls are done when they return; `result()` hands over what came.

The names and the shape of the calls are those of the tinker SDK's TrainingClient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from model_foundry.engine.base import Engine
from model_foundry.types import (
    Datum,
    ForwardBackwardOutput,
    OptimParams,
    OptimStepOutput,
    SampledSequence,
    SamplingParams,
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Done(Generic[T]):
    """A future whose value is there."""

    value: T

    def result(self, timeout: float | None = None) -> T:
        return self.value


class TrainingClient:
    """Drives one model of an engine."""

    def __init__(self, engine: Engine, model_id: str) -> None:
        self.engine = engine
        self.model_id = model_id

    def forward(
        self,
        data: Sequence[Datum],
        loss_fn: str = "cross_entropy",
        loss_fn_config: Mapping[str, float] | None = None,
    ) -> Done[ForwardBackwardOutput]:
        return Done(self.engine.forward(self.model_id, data, loss_fn=loss_fn, loss_config=loss_fn_config))

    def forward_backward(
        self,
        data: Sequence[Datum],
        loss_fn: str = "cross_entropy",
        loss_fn_config: Mapping[str, float] | None = None,
    ) -> Done[ForwardBackwardOutput]:
        return Done(self.engine.forward_backward(self.model_id, data, loss_fn=loss_fn, loss_config=loss_fn_config))

    def optim_step(self, adam_params: OptimParams) -> Done[OptimStepOutput]:
        return Done(self.engine.optim_step(self.model_id, adam_params))

    def sample(self, prompts: Sequence[np.ndarray], params: SamplingParams) -> Done[tuple[SampledSequence, ...]]:
        return Done(self.engine.sample(self.model_id, prompts, params))

    def save_state(self, folder: Path) -> Done[None]:
        return Done(self.engine.save_state(self.model_id, folder))

    def load_state(self, folder: Path) -> Done[tuple[str, ...]]:
        """Weights alone; the optimizer starts afresh."""
        return Done(self.engine.load_state(self.model_id, folder, optimizer=False))

    def load_state_with_optimizer(self, folder: Path) -> Done[tuple[str, ...]]:
        return Done(self.engine.load_state(self.model_id, folder, optimizer=True))
