"""The engine's contract: nine verbs over models that it holds. Synchronous; tokens in, numbers out.

An engine knows nothing of text, YAML, HTTP, epochs or schedules.

- The loss is the sum of weighted token losses; the caller normalises through the weights. So accumulating, splitting a
  batch and surviving out-of-memory are details of the engine, exact up to rounding.
- A mixture of experts may add its load-balancing loss in training: about all rows of a call, times their weights, and
  reported beside the loss. It is the one part that depends on what is passed together.
- `forward_backward` is all or nothing. When memory runs out, what is pending since the last `optim_step` is done again
  in smaller pieces; when even one row does not fit, the gradients are as they were before the call.
- `optim_step` takes its hyper-parameters with the call and clears the gradients.
- Same seed, data and thread count on a CPU: the same bits.
- Weights are portable between engines; optimizer state belongs to the kind of engine that wrote it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np

from model_foundry.types import (
    Datum,
    ForwardBackwardOutput,
    LoraConfig,
    OptimizerKind,
    OptimParams,
    OptimStepOutput,
    SampledSequence,
    SamplingParams,
)

if TYPE_CHECKING:
    import torch

EngineKind = Literal["torch", "mlx"]
LogprobScope = Literal["due", "all"]
"""Which log-probabilities to return: where the loss is due (the rest is NaN), or of every target."""


@runtime_checkable
class Engine(Protocol):
    """Models held in memory, and what can be done with them. Every verb names a model by its id."""

    def create_model(
        self,
        base: Path,
        *,
        lora: LoraConfig | None,
        seed: int = 0,
        adapter: Path | None = None,
        trainable: bool = True,
        optimizer: OptimizerKind = "adamw",
    ) -> str:
        """Load a Hugging Face folder; `lora`: a fresh adapter, `adapter`: a stored one. Returns the model's id."""
        ...

    def forward(
        self,
        model_id: str,
        data: Sequence[Datum],
        *,
        loss_fn: str = "cross_entropy",
        loss_config: Mapping[str, float] | None = None,
        logprobs: LogprobScope = "due",
    ) -> ForwardBackwardOutput:
        """The loss without gradients."""
        ...

    def forward_backward(
        self,
        model_id: str,
        data: Sequence[Datum],
        *,
        loss_fn: str = "cross_entropy",
        loss_config: Mapping[str, float] | None = None,
        logprobs: LogprobScope = "due",
    ) -> ForwardBackwardOutput:
        """Add the gradients of the summed loss to what is pending."""
        ...

    def optim_step(self, model_id: str, params: OptimParams) -> OptimStepOutput:
        """One step of the optimizer that the model was created with; the gradients are cleared. Skipped when they are
        not finite."""
        ...

    def stream(
        self, model_id: str, prompts: Sequence[np.ndarray], params: SamplingParams
    ) -> Iterator[tuple[int, int, float]]:
        """Continue prompts int32 [T]; yields (prompt number, token, logprob) as they come."""
        ...

    def sample(
        self, model_id: str, prompts: Sequence[np.ndarray], params: SamplingParams
    ) -> tuple[SampledSequence, ...]:
        """Collect `stream`."""
        ...

    def save_state(self, model_id: str, folder: Path) -> None:
        """Weights and optimizer state into an existing empty folder."""
        ...

    def load_state(self, model_id: str, folder: Path, *, optimizer: bool) -> tuple[str, ...]:
        """Read what `save_state` wrote; without `optimizer`, the optimizer starts afresh. Returns warnings."""
        ...

    def save_weights(self, model_id: str, folder: Path) -> None:
        """Weights alone: `adapter/` in PEFT's layout or `model/` in Hugging Face's."""
        ...

    def delete_model(self, model_id: str) -> None:
        """Forget a model and give its memory back."""
        ...


class LocalEngine(Engine, Protocol):
    """An engine in this process, and what a run asks of it beside the nine verbs. Tensors are torch's.

    Attributes:
        kind: what its optimizer states are readable by.
        device, dtype: where and in which type it computes.
        num_threads: CPU threads; None where the engine's library decides.
        world_size: processes that share the work.
        implementation, attention, quantization: as `TorchEngine` has them.
    """

    @property
    def kind(self) -> EngineKind: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def num_threads(self) -> int | None: ...

    @property
    def world_size(self) -> int: ...

    @property
    def implementation(self) -> str: ...

    @property
    def attention(self) -> str: ...

    @property
    def quantization(self) -> str: ...

    def create_model(
        self,
        base: Path,
        *,
        lora: LoraConfig | None,
        seed: int = 0,
        adapter: Path | None = None,
        trainable: bool = True,
        base_name: str | None = None,
        optimizer: OptimizerKind = "adamw",
    ) -> str:
        """`base_name` is what adapters name as their base; default the folder."""
        ...

    def discard_gradients(self, model_id: str) -> None:
        """Forget what is pending, as if `forward_backward` had not been called since the last step."""
        ...

    def trained_tensors(self, model_id: str) -> dict[str, torch.Tensor]:
        """What training changes, float32, by name in the files; read them before the next step."""
        ...

    def state_tensors(self, model_id: str) -> dict[str, torch.Tensor]:
        """Optimizer moments by name; read them before the next step."""
        ...

    def state_facts(self, model_id: str) -> dict[str, Any]:
        """What beside tensors the state holds; JSON values."""
        ...

    def limit_pieces(self, model_id: str, num_tokens: int) -> None:
        """Split this model's passes into pieces of at most so many tokens, as if memory had run out for more."""
        ...

    def write_weights(self, model_id: str, folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        """`save_weights` from `trained_tensors` of earlier; another thread may call it."""
        ...

    def write_state(
        self, model_id: str, folder: Path, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]
    ) -> None:
        """The optimizer's part of `save_state` from what was taken earlier; another thread may call it."""
        ...

    def describe(self, model_id: str) -> dict[str, Any]:
        """Facts for plans and reports: engine, implementation, counts of parameters, device, dtype."""
        ...

    def peak_memory_bytes(self) -> int: ...
