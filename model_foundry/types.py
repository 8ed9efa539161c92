"""Values that cross module borders. Frozen, no behaviour beyond checking themselves, numpy only.

Shapes: T tokens of one row, N tokens of a packed batch, V vocabulary, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from model_foundry.errors import BrokenModelError


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `role` is system, user, assistant or tool; `extra` holds what a template may also read."""

    role: str
    content: str
    extra: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {"role": self.role, "content": self.content, **self.extra}


@dataclass(frozen=True, slots=True)
class Datum:
    """One row for the engine, already shifted: `loss_inputs[...][t]` belongs to the token after `tokens[t]`.

    Attributes:
        tokens: int32 [T], the model's input.
        loss_inputs: arrays of length T; `target_tokens` int32 and `weights` float32 for cross-entropy (both [T, K]
            where a token has K targets), plus what other losses need (`logprobs`, `advantages`).
        branches: lengths of the parts that the row ends with, each of which goes on from what stands before all of
            them and sees none of the others; () for a plain row.
    """

    tokens: np.ndarray
    loss_inputs: Mapping[str, np.ndarray]
    branches: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return int(self.tokens.shape[0])

    @property
    def num_shared(self) -> int:
        """Tokens before the branches."""
        return self.num_tokens - sum(self.branches)

    @property
    def num_positions(self) -> int:
        """The longest way from the beginning to the end of a branch: what must fit a model's context."""
        return self.num_shared + max(self.branches, default=0)

    @staticmethod
    def from_row(ids: np.ndarray, weights: np.ndarray) -> Datum:
        """Shift a rendered row (ids int32 [T+1], weights float32 [T+1]) into inputs and targets."""
        return Datum(
            tokens=np.ascontiguousarray(ids[:-1], dtype=np.int32),
            loss_inputs={
                "target_tokens": np.ascontiguousarray(ids[1:], dtype=np.int32),
                "weights": np.ascontiguousarray(weights[1:], dtype=np.float32),
            },
        )


@dataclass(frozen=True, slots=True)
class Pair:
    """A better and a worse answer to one prompt, each a row of its own with weights on the answer alone."""

    chosen: Datum
    rejected: Datum

    @property
    def num_shared(self) -> int:
        """Inputs that both rows begin with, before the first one that is followed by a weighted target."""
        one, other = self.chosen, self.rejected
        length = min(one.num_tokens, other.num_tokens)
        apart = one.tokens[:length] != other.tokens[:length]
        for each in (one, other):
            apart = apart | (each.loss_inputs["weights"][:length] != 0)
        return int(np.argmax(apart)) if apart.any() else length

    def joined(self) -> Datum:
        """One row: what both begin with, then a branch for each answer, `chosen` first."""
        shared = self.num_shared
        parts = (self.chosen, self.rejected)
        inputs = {
            name: np.concatenate([value[:shared], *(each.loss_inputs[name][shared:] for each in parts)])
            for name, value in self.chosen.loss_inputs.items()
        }
        tokens = np.concatenate([self.chosen.tokens[:shared], *(each.tokens[shared:] for each in parts)])
        return Datum(tokens, inputs, tuple(each.num_tokens - shared for each in parts))


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """Low-rank adaptation by PEFT's names (Hu et al. 2021; rsLoRA: Kalajdzievski 2023; DoRA: Liu et al. 2024)."""

    r: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


@dataclass(frozen=True, slots=True)
class AdamParams:
    """Hyper-parameters of one AdamW step (Loshchilov and Hutter 2019). `grad_clip_norm` 0 means no clipping."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


@dataclass(frozen=True, slots=True)
class MuonParams:
    """Hyper-parameters of one Muon step (Jordan et al. 2024), for a model that was created with `optimizer="muon"`.

    `momentum` is for hidden matrices; betas and `eps` for the parameters that take AdamW's steps. Learning rate and
    decay are for both, in AdamW's measure. `grad_clip_norm` 0 means no clipping.
    """

    learning_rate: float = 1e-4
    momentum: float = 0.95
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


OptimizerKind = Literal["adamw", "muon"]
OptimParams = AdamParams | MuonParams


@dataclass(frozen=True, slots=True)
class ForwardBackwardOutput:
    """What a pass measured.

    Attributes:
        loss_sum: sum over tokens of weight × token loss (never a mean).
        logprobs: one float32 array a datum in the shape of its targets, the log-probability of each target in nats;
            NaN where it was not asked for (see `Engine.forward_backward`).
        num_micro_batches: pieces the batch was computed in; more than planned means out-of-memory was survived.
        router_loss: the load-balancing loss of a mixture of experts, where it is trained: times the sum of the weights,
            so that it may be added to `loss_sum`, which is without it.
    """

    loss_sum: float
    logprobs: tuple[np.ndarray, ...]
    num_micro_batches: int = 1
    router_loss: float = 0.0


@dataclass(frozen=True, slots=True)
class OptimStepOutput:
    """`grad_norm` is the global L2 norm before clipping; `skipped` when it was not finite and nothing changed.

    Attributes:
        step: of the optimizer, which does not count what was skipped.
        loss_scale: by which gradients were larger in this step, where activations are float16 (see `loss_scale`).
        next_loss_scale: in the next one.
    """

    grad_norm: float
    skipped: bool
    step: int
    loss_scale: float | None = None
    next_loss_scale: float | None = None


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to continue a prompt. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 switch those filters off."""

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SampledSequence:
    """A continuation: tokens int32 [T] (the stop token included), logprobs float32 [T], reason `stop` or `length`."""

    tokens: np.ndarray
    logprobs: np.ndarray
    stop_reason: str


def check_logprob(logprob: float) -> None:
    """Of a token that was chosen.

    Raises:
        BrokenModelError: it is no number, so the token means nothing.
    """
    if math.isnan(logprob):
        what = "the model's logits are no numbers: its weights hold NaN or infinity, or overflow"
        raise BrokenModelError(what, hint="Go on from an earlier checkpoint, with a lower learning rate.")


@dataclass(frozen=True, slots=True)
class Check:
    """One measured claim: what was measured, the bound it must meet, and the evidence."""

    name: str
    passed: bool
    value: float | str | None
    bound: str
    evidence: str

    @property
    def shown(self) -> str:
        """The value as a line has room for it."""
        return f"{self.value:.3g}" if isinstance(self.value, float) else str(self.value)

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "passed": self.passed,
            "value": self.value,
            "bound": self.bound,
            "evidence": self.evidence,
        }
