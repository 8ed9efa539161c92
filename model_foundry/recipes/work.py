"""What a training run is made of, as the loop, the plan and the proofs see it, whatever its method.

`preparation.Prepared` is that of fine-tuning on rows, `corpus.PreparedCorpus` that of pretraining on shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from model_foundry.client.local import TrainingClient
from model_foundry.config.commands import RunConfig
from model_foundry.data.gate.verdict import GateReport
from model_foundry.evals.generation import Question
from model_foundry.models.finder import ModelSource
from model_foundry.recipes.schedule import LearningRate
from model_foundry.rendering import Renderer
from model_foundry.types import Datum, LoraConfig, OptimParams, SamplingParams


@dataclass(frozen=True, slots=True)
class HeldOutText:
    """Validation data as the loop measures it.

    Attributes:
        num_tokens: read in one measurement.
        text: that they stand for, where a loss in bits per byte means something; else None.
    """

    num_tokens: int
    text: str | None = None

    @property
    def num_bytes(self) -> int:
        return 0 if self.text is None else len(self.text.encode())


@dataclass(frozen=True, slots=True)
class Objective:
    """The engine's loss, by its name and with its settings."""

    loss_fn: str = "cross_entropy"
    loss_config: Mapping[str, float] = field(default_factory=dict)


class TokenLosses:
    """What a work is that imitates: each token bears its loss, and nothing but the data is needed to begin."""

    @property
    def objective(self) -> Objective:
        return Objective()

    @property
    def batches_read_before(self) -> Sequence[Sequence[Datum]]:
        return ()

    def begun(self, client: TrainingClient, facts: Mapping[str, Any]) -> Self:
        del client, facts
        return self

    def measures(self, data: Sequence[Datum], logprobs: Sequence[np.ndarray]) -> dict[str, float]:
        del data, logprobs
        return {}


class Work(Protocol):
    """A run's data as a function of the step, its schedule, and what it starts from."""

    @property
    def config(self) -> RunConfig: ...

    @property
    def source(self) -> ModelSource:
        """The model that training starts from."""
        ...

    @property
    def model_fingerprint(self) -> str: ...

    @property
    def renderer(self) -> Renderer: ...

    @property
    def now(self) -> datetime:
        """The date that a template may print, the same on every resume."""
        ...

    @property
    def lora(self) -> LoraConfig | None:
        """The adapter to train, or None for every weight."""
        ...

    @property
    def questions(self) -> tuple[Question, ...]: ...

    @property
    def gate(self) -> GateReport | None:
        """What the gate found in rows; None where there are none."""
        ...

    @property
    def objective(self) -> Objective: ...

    @property
    def batches_read_before(self) -> Sequence[Sequence[Datum]]:
        """What `begun` passes through the model, without gradients."""
        ...

    def begun(self, client: TrainingClient, facts: Mapping[str, Any]) -> Work:
        """The work with what it has to ask the model before its first step. The model is as it starts.

        Args:
            facts: the engine's on the model.
        """
        ...

    def measures(self, data: Sequence[Datum], logprobs: Sequence[np.ndarray]) -> dict[str, float]:
        """What a record says beside the loss, of rows and the log-probabilities that a pass gave their targets."""
        ...

    @property
    def total_steps(self) -> int: ...

    @property
    def learning_rate(self) -> LearningRate: ...

    @property
    def epochs(self) -> float:
        """Passes over the data in the whole run."""
        ...

    @property
    def micro_batches_per_epoch(self) -> int: ...

    @property
    def tokens_per_epoch(self) -> int: ...

    @property
    def held_out(self) -> HeldOutText | None: ...

    def epoch_at(self, step: int) -> float:
        """Passes over the data done after step 1, 2, …"""
        ...

    def micro_batches(self, step: int) -> list[list[Datum]]:
        """The rows of a step, weighted so that the summed loss is the mean over its trained tokens, or its pairs."""
        ...

    def longest_batch(self) -> list[Datum]:
        """The micro-batch with the most tokens in the whole run."""
        ...

    def adam_params(self, step: int) -> OptimParams: ...

    def validation_batches(self) -> Iterator[list[Datum]]:
        """The held-out tokens, weighted so that the summed losses are the mean over all that count."""
        ...

    @property
    def prompts(self) -> tuple[tuple[str, np.ndarray], ...]:
        """Beginnings to be gone on with while training, each as text and as tokens, int32 [T]."""
        ...

    @property
    def sampling(self) -> SamplingParams:
        """How they are gone on with."""
        ...

    def probe(self) -> np.ndarray:
        """Some tokens of the data, int32 [T], to see whether a loaded copy of the model says the same."""
        ...

    def token_counts(self) -> np.ndarray:
        """int64 [V]: how often each token stands in the training data."""
        ...

    def data_files(self) -> dict[str, Path]:
        """Every file that decides the outcome, by its field."""
        ...

    def data_summary(self) -> dict[str, Any]:
        """Counts of each file, for plans and reports."""
        ...

    def engine_options(self) -> Mapping[str, Any]:
        """How the engine is made."""
        ...
