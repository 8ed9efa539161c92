"""What a training service answers, as values. Names are those of the tinker SDK.

Shapes: T tokens of a row, K targets of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from model_foundry.types import SampledSequence


@dataclass(frozen=True, slots=True)
class PassOutput:
    """What a forward or backward pass measured.

    Attributes:
        loss_fn_outputs: one mapping a row; `logprobs` float32 [T] or [T, K], in nats.
        metrics: by `name:reduction`; `loss:sum` is the summed loss.
    """

    loss_fn_outputs: tuple[Mapping[str, np.ndarray], ...]
    metrics: dict[str, float]

    @property
    def loss_sum(self) -> float:
        return self.metrics["loss:sum"]

    @property
    def logprobs(self) -> tuple[np.ndarray, ...]:
        return tuple(row["logprobs"] for row in self.loss_fn_outputs)


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What an optimizer step measured: `step`, `skipped`, and `grad_norm` where it was finite."""

    metrics: dict[str, float]

    @property
    def grad_norm(self) -> float:
        return self.metrics.get("grad_norm", float("nan"))

    @property
    def skipped(self) -> bool:
        return bool(self.metrics["skipped"])

    @property
    def step(self) -> int:
        return int(self.metrics["step"])


@dataclass(frozen=True, slots=True)
class SavedPath:
    """Where something was saved, or loaded from: `tinker://RUN/weights/NAME`."""

    path: str


@dataclass(frozen=True, slots=True)
class ModelData:
    arch: str | None
    model_name: str | None
    tokenizer_id: str | None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Of a model; `train_unembed` is None where the service does not say it."""

    model_id: str
    model_data: ModelData
    lora_rank: int
    is_lora: bool
    train_unembed: bool | None = None


@dataclass(frozen=True, slots=True)
class WeightsInfo:
    """Of a checkpoint: over which base it was trained, and how."""

    base_model: str
    lora_rank: int
    train_unembed: bool
    train_mlp: bool
    train_attn: bool


@dataclass(frozen=True, slots=True)
class SampleOutput:
    """Continuations of a prompt of T tokens.

    Attributes:
        prompt_logprobs: one a token, None where there is none; None where they were not asked for.
        topk_prompt_logprobs: for each token of the prompt the likeliest ones as (token, logprob), or None.
        topk_logprobs: the same for each sampled token, one list a sequence.
    """

    sequences: tuple[SampledSequence, ...]
    prompt_logprobs: tuple[float | None, ...] | None = None
    topk_prompt_logprobs: tuple[list[tuple[int, float]] | None, ...] | None = None
    topk_logprobs: tuple[tuple[list[tuple[int, float]] | None, ...], ...] | None = None


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    checkpoint_id: str
    checkpoint_type: str
    tinker_path: str
    time: str
    size_bytes: int | None
    public: bool
    expires_at: str | None
    user_metadata: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class TrainingRun:
    training_run_id: str
    base_model: str
    lora_rank: int | None
    corrupted: bool
    last_request_time: str
    last_checkpoint: CheckpointInfo | None
    last_sampler_checkpoint: CheckpointInfo | None
    user_metadata: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class SupportedModel:
    model_name: str
    max_context_length: int | None
    trainable: bool
    sampleable: bool


T = TypeVar("T")


def from_reply(kind: Callable[..., T], values: Mapping[str, Any]) -> T:
    """One of these from what a service said; what it did not say is None."""
    return kind(**{name: values.get(name) for name in kind.__dataclass_fields__})  # pyright: ignore[reportFunctionMemberAccess]


def training_run(values: Mapping[str, Any]) -> TrainingRun:
    saved = {
        name: values.get(name) and from_reply(CheckpointInfo, values[name])
        for name in ("last_checkpoint", "last_sampler_checkpoint")
    }
    return from_reply(TrainingRun, {**values, **saved})
