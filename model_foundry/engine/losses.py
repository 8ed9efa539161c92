"""Losses as elementwise arithmetic on the log-probability of each target, summed over tokens, never averaged.

The head is computed in pieces of tokens, only where a loss is due, and its gradient in the same pass: the logits of the
whole batch never exist at once (as in Wijmans et al. 2024 and Liger). Of models it knows the head alone.

Importance sampling: Kahn and Marshall 1953. PPO: Schulman et al. 2017. CISPO: MiniMax 2025 (M1). DRO: Richemond et al.
2024. Their inputs, their sums and the defaults of their settings are those of the Tinker protocol.

Shapes: N packed tokens, M tokens with a loss due, K targets of a token, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch.nn import functional

from model_foundry.engine.preference_losses import ALONE_TERMS, PREFERENCE_TERMS
from model_foundry.errors import EngineError
from model_foundry.models import fused
from model_foundry.models.head import HeadUpdate

Inputs = Mapping[str, torch.Tensor]
Settings = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Loss:
    """`terms(logprobs [M] or [M, K], inputs, settings)` is elementwise.

    Attributes:
        due: the input that is zero where no loss is due; None: it is due everywhere.
        settings: what a call may set, with the defaults.
        many_targets: a token may have K targets; every input is [T, K] then.
        num_branches: not 0: the loss is of whole answers, the branches of a datum (see `pair_pass`); `terms` gets sums
            over each, [R, num_branches], and gives one loss a datum, [R].
    """

    terms: Callable[[torch.Tensor, Inputs, Settings], torch.Tensor]
    inputs: tuple[str, ...]
    due: str | None
    settings: Settings = field(default_factory=dict)
    many_targets: bool = False
    num_branches: int = 0


def _ratio(logprobs: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """How much likelier the token is now than where it was sampled."""
    return (logprobs - inputs["logprobs"]).exp()


def _clipped(ratio: torch.Tensor, settings: Settings) -> torch.Tensor:
    return ratio.clamp(settings["clip_low_threshold"], settings["clip_high_threshold"])


def _importance_sampling(logprobs: torch.Tensor, inputs: Inputs, settings: Settings) -> torch.Tensor:
    return -_ratio(logprobs, inputs) * inputs["advantages"]


def _ppo(logprobs: torch.Tensor, inputs: Inputs, settings: Settings) -> torch.Tensor:
    ratio, advantages = _ratio(logprobs, inputs), inputs["advantages"]
    return -torch.minimum(ratio * advantages, _clipped(ratio, settings) * advantages)


def _cispo(logprobs: torch.Tensor, inputs: Inputs, settings: Settings) -> torch.Tensor:
    return -_clipped(_ratio(logprobs, inputs), settings).detach() * logprobs * inputs["advantages"]


def _dro(logprobs: torch.Tensor, inputs: Inputs, settings: Settings) -> torch.Tensor:
    distance = (logprobs - inputs["logprobs"]).square()
    return -(logprobs * inputs["advantages"] - 0.5 * settings["beta"] * distance)


NUM_ANSWERS = 2
"""A better one and a worse one."""
_PAIR_ALONE = ("target_tokens", "weights")
_PAIR = (*_PAIR_ALONE, "logprobs")
_SAMPLED = ("target_tokens", "logprobs", "advantages")

LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(
        terms=lambda logprobs, inputs, settings: -inputs["weights"] * logprobs,
        inputs=("target_tokens", "weights"),
        due="weights",
        many_targets=True,
    ),
    "importance_sampling": Loss(_importance_sampling, _SAMPLED, due="advantages"),
    "ppo": Loss(_ppo, _SAMPLED, due="advantages", settings={"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}),
    "cispo": Loss(_cispo, _SAMPLED, due="advantages", settings={"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}),
    "dro": Loss(_dro, _SAMPLED, due=None, settings={"beta": 0.05}),
    **{
        f"dpo_{name}": Loss(terms, _PAIR, due="weights", settings=settings, num_branches=NUM_ANSWERS)
        for name, (terms, settings) in PREFERENCE_TERMS.items()
    },
    **{
        f"dpo_{name}": Loss(terms, _PAIR_ALONE, due="weights", settings=settings, num_branches=NUM_ANSWERS)
        for name, (terms, settings) in ALONE_TERMS.items()
    },
}


def choose_loss(name: str, settings: Settings | None = None) -> Loss:
    """A loss by its name, with these settings.

    Raises:
        EngineError: there is no such loss, it does not have the setting, or the value means nothing.
    """
    if name not in LOSSES:
        raise EngineError(f"no loss {name!r}", hint=f"There is: {', '.join(LOSSES)}.")
    loss, given = LOSSES[name], dict(settings or {})
    if unknown := sorted(given.keys() - loss.settings.keys()):
        takes = f"takes {', '.join(sorted(loss.settings))}" if loss.settings else "takes no settings"
        raise EngineError(f"the loss {name} {takes}, and got {', '.join(unknown)}")
    for key, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise EngineError(f"{key} is {value!r}", where=f"loss {name}")
    agreed = {**loss.settings, **given}
    if "clip_low_threshold" in agreed and agreed["clip_low_threshold"] > agreed["clip_high_threshold"]:
        raise EngineError("clip_low_threshold is above clip_high_threshold", where=f"loss {name}")
    return replace(loss, settings=agreed) if given else loss


CHUNK_LOGITS = 12_500_000
"""Logits computed at once: 256 tokens of a vocabulary of 49,152."""


@dataclass(slots=True)
class HeadResult:
    """loss: float64 sum. logprobs: float32, shaped as the targets. d_hidden: gradient for `hidden`, of its shape."""

    loss: float
    logprobs: torch.Tensor
    d_hidden: torch.Tensor | None


@torch.no_grad()
def head_pass(
    hidden: torch.Tensor,
    head: torch.Tensor | None,
    loss: Loss,
    inputs: Inputs,
    *,
    backward: bool,
    update: HeadUpdate | None = None,
    scale: float = 1.0,
    chunk_logits: int = CHUNK_LOGITS,
) -> HeadResult:
    """Loss, log-probabilities and gradient of the tokens where a loss is due.

    Args:
        hidden: [M, D] before the head; without a head, logits [M, V].
        head: [V, D]. When it is trained, its gradient is added to `head.grad` (float32).
        inputs: the loss's inputs, each [M], or each [M, K].
        update: an adapter's part of the head; where it is trained, its gradients are added to its parameters'.
        scale: gradients, and not the loss, are multiplied by it.
        chunk_logits: how many logits exist at once.
    """
    num_tokens = hidden.shape[0]
    weight = None if head is None else head.detach().to(hidden.dtype)
    vocab_size = hidden.shape[1] if weight is None else weight.shape[0]
    step = max(1, chunk_logits // vocab_size)
    result = HeadResult(
        loss=0.0,
        logprobs=torch.empty(inputs["target_tokens"].shape, dtype=torch.float32, device=hidden.device),
        d_hidden=torch.empty_like(hidden) if backward else None,
    )
    for first in range(0, num_tokens, step):
        # A call of its own: its logits are gone before the next piece makes its own.
        part = slice(first, min(first + step, num_tokens))
        _head_piece(part, hidden, head, weight, update, loss, inputs, scale, result)
    return result


def _head_piece(
    part: slice,
    hidden: torch.Tensor,
    head: torch.Tensor | None,
    weight: torch.Tensor | None,
    update: HeadUpdate | None,
    loss: Loss,
    inputs: Inputs,
    scale: float,
    result: HeadResult,
) -> None:
    """One piece of tokens; its share of the result is written into `result`."""
    logits = hidden[part].clone() if weight is None else functional.linear(hidden[part], weight)
    if update is not None:
        logits = update.add(logits, hidden[part])
    chunk = {name: value[part] for name, value in inputs.items()}
    scored = score(logits, loss, chunk, backward=result.d_hidden is not None, scale=scale)
    result.logprobs[part] = scored.logprobs
    result.loss += float(scored.values.cpu().double().sum())
    if result.d_hidden is None:
        return
    del logits
    d_logits = scored.d_logits
    assert d_logits is not None
    if weight is None or head is None:
        result.d_hidden[part] = d_logits
        return
    torch.mm(d_logits, weight, out=result.d_hidden[part])
    if head.requires_grad:
        add_gradient(head, fused.weight_gradient(d_logits, hidden[part]))
    if update is not None:
        down, up = update.factors(hidden.dtype)
        d_low = d_logits @ up
        result.d_hidden[part].addmm_(d_low, down)
        if update.is_trained:
            add_gradient(update.up, d_logits.t() @ (hidden[part] @ down.t()), scale=update.scaling)
            add_gradient(update.down, d_low.t() @ hidden[part])


def add_gradient(parameter: torch.Tensor, gradient: torch.Tensor, *, scale: float = 1.0) -> None:
    """To what is there, in float32."""
    wide = gradient.float() if scale == 1.0 else gradient.float().mul_(scale)
    parameter.grad = wide if parameter.grad is None else parameter.grad.add_(wide)


@dataclass(frozen=True, slots=True)
class Scored:
    """values: the loss of each target, before it is summed. logprobs: float32. Both shaped as the targets.
    d_logits: [M, V] in the type of the logits."""

    values: torch.Tensor
    logprobs: torch.Tensor
    d_logits: torch.Tensor | None


@torch.no_grad()
def score(logits: torch.Tensor, loss: Loss, inputs: Inputs, *, backward: bool, scale: float = 1.0) -> Scored:
    """A loss over logits [M, V] and its inputs, each [M] or [M, K]; nothing of a token depends on the others.

    The gradient, and not the loss, is multiplied by `scale`. The logits may be written over.
    """
    shape = inputs["target_tokens"].shape
    targets = inputs["target_tokens"].view(shape[0], -1)
    if fused.fits(logits):
        logits = logits.contiguous()
        normaliser = fused.log_normaliser(logits)
        logp = (logits.gather(1, targets).float() - normaliser[:, :1] - normaliser[:, 1:]).view(shape)
        slope, values = _slope(loss, logp, inputs)
        if not backward:
            return Scored(values, logp, None)
        slopes = (slope * scale).float().view(shape[0], -1)
        return Scored(values, logp, fused.score_gradient_(logits, normaliser, targets, slopes))
    # In bfloat16 a probability above 0.998 is 1: no loss and no gradient. Wider costs nothing beside the product.
    probabilities = torch.softmax(logits, dim=1, dtype=torch.promote_types(logits.dtype, torch.float32))
    logp = _log(probabilities.gather(1, targets), logits, targets).view(shape)
    slope, values = _slope(loss, logp, inputs)
    if not backward:
        return Scored(values, logp, None)
    slope = (slope * scale).to(probabilities.dtype).view(shape[0], -1)
    d_logits = probabilities.mul_(-slope.sum(1, keepdim=True)).scatter_add_(1, targets, slope).to(logits.dtype)
    return Scored(values, logp, d_logits)


def _log(chosen: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log of the targets' probabilities [M, K]; from the normaliser where they are too small for a float."""
    tiny = chosen < 1e-30
    if not bool(tiny.any()):
        return chosen.log()
    wide = logits.to(chosen.dtype)
    return torch.where(tiny, wide.gather(1, targets) - torch.logsumexp(wide, dim=1, keepdim=True), chosen.log())


def _slope(loss: Loss, logprobs: torch.Tensor, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """d loss / d logprob of each target, and the loss of each target, in the shape of `logprobs`."""
    with torch.enable_grad():
        leaf = logprobs.detach().requires_grad_()
        value = loss.terms(leaf, inputs, loss.settings)
        (slope,) = torch.autograd.grad(value.sum(), leaf)
    return slope, value.detach()
