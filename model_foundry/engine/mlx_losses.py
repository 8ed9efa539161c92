"""The losses of `losses`, for MLX to differentiate: elementwise on the log-probability of each target.

Which inputs a loss takes and which settings it has is said there, once. Tests hold both to the same values and slopes.

Shapes: M tokens with a loss due, K targets of a token, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx

from model_foundry.engine.losses import CHUNK_LOGITS, LOSSES, Loss, Settings, choose_loss
from model_foundry.errors import EngineError

Inputs = Mapping[str, mx.array]
Terms = Callable[[mx.array, Inputs, Settings], mx.array]


def _ratio(logprobs: mx.array, inputs: Inputs) -> mx.array:
    return mx.exp(logprobs - inputs["logprobs"])


def _clipped(ratio: mx.array, settings: Settings) -> mx.array:
    return mx.clip(ratio, settings["clip_low_threshold"], settings["clip_high_threshold"])


def _cross_entropy(logprobs: mx.array, inputs: Inputs, settings: Settings) -> mx.array:
    del settings
    return -inputs["weights"] * logprobs


def _importance_sampling(logprobs: mx.array, inputs: Inputs, settings: Settings) -> mx.array:
    del settings
    return -_ratio(logprobs, inputs) * inputs["advantages"]


def _ppo(logprobs: mx.array, inputs: Inputs, settings: Settings) -> mx.array:
    ratio, advantages = _ratio(logprobs, inputs), inputs["advantages"]
    return -mx.minimum(ratio * advantages, _clipped(ratio, settings) * advantages)


def _cispo(logprobs: mx.array, inputs: Inputs, settings: Settings) -> mx.array:
    return -mx.stop_gradient(_clipped(_ratio(logprobs, inputs), settings)) * logprobs * inputs["advantages"]


def _dro(logprobs: mx.array, inputs: Inputs, settings: Settings) -> mx.array:
    distance = mx.square(logprobs - inputs["logprobs"])
    return -(logprobs * inputs["advantages"] - 0.5 * settings["beta"] * distance)


TERMS: dict[str, Terms] = {
    "cross_entropy": _cross_entropy,
    "importance_sampling": _importance_sampling,
    "ppo": _ppo,
    "cispo": _cispo,
    "dro": _dro,
}


def choose_mlx_loss(name: str, settings: Settings | None = None) -> Loss:
    """A loss by its name, with these settings.

    Raises:
        EngineError: there is no such loss, MLX does not have it, or a setting means nothing.
    """
    loss = choose_loss(name, settings)
    if name not in TERMS:
        raise EngineError(
            f"the engine mlx does not compute the loss {name}",
            hint=f"It computes {', '.join(each for each in LOSSES if each in TERMS)}; engine=torch computes all.",
        )
    terms: Any = TERMS[name]
    return replace(loss, terms=terms)


def target_logprobs(
    hidden: mx.array, head: mx.array, targets: mx.array, *, chunk_logits: int = CHUNK_LOGITS
) -> mx.array:
    """Log-probabilities of targets [M] or [M, K], float32 of their shape, from hidden [M, D] and head [V, D].

    Logits exist for a piece of the tokens at a time; for the gradients they are computed again.
    """
    step = max(1, chunk_logits // head.shape[0])
    columns = targets.reshape(targets.shape[0], -1)

    def piece(hidden: mx.array, head: mx.array, columns: mx.array) -> mx.array:
        logits = (hidden @ head.astype(hidden.dtype).T).astype(mx.float32)
        chosen = mx.take_along_axis(logits, mx.stop_gradient(columns), axis=1)
        return chosen - mx.logsumexp(logits, axis=1, keepdims=True)

    again = mx.checkpoint(piece)
    parts = [
        again(hidden[first : first + step], head, columns[first : first + step])
        for first in range(0, hidden.shape[0], step)
    ]
    return mx.concatenate(parts).reshape(targets.shape)
