"""Losses as elementwise arithmetic on the log-probability of each target, summed over tokens, never averaged.

The head is computed in pieces of tokens, only where a loss is due, and its gradient in the same pass: the logits of the
whole batch never exist at once (as in Wijmans et al. 2024 and Liger). It does not know models.

Shapes: N packed tokens, M tokens with a loss due, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

Inputs = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Loss:
    """`terms(logprobs [M], inputs) -> [M]`; due where `due` (an input) is not zero."""

    terms: Callable[[torch.Tensor, Inputs], torch.Tensor]
    inputs: tuple[str, ...]
    due: str


LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(
        terms=lambda logprobs, inputs: -inputs["weights"] * logprobs,
        inputs=("target_tokens", "weights"),
        due="weights",
    ),
}

CHUNK_LOGITS = 12_500_000
"""Logits computed at once: 256 tokens of a vocabulary of 49,152."""


@dataclass(slots=True)
class HeadResult:
    """loss: float64 sum. logprobs: float32 [M]. d_hidden: gradient for the hidden states given, [M, D] or [M, V]."""

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
    chunk_logits: int = CHUNK_LOGITS,
) -> HeadResult:
    """Loss, log-probabilities and gradient of the tokens where a loss is due.

    Args:
        hidden: [M, D] before the head; without a head, logits [M, V].
        head: [V, D]. When it is trained, its gradient is added to `head.grad` (float32).
        inputs: the loss's inputs, each [M].
        chunk_logits: how many logits exist at once.
    """
    num_tokens = hidden.shape[0]
    weight = None if head is None else head.detach().to(hidden.dtype)
    vocab_size = hidden.shape[1] if weight is None else weight.shape[0]
    step = max(1, chunk_logits // vocab_size)
    result = HeadResult(
        loss=0.0,
        logprobs=torch.empty(num_tokens, dtype=torch.float32, device=hidden.device),
        d_hidden=torch.empty_like(hidden) if backward else None,
    )
    for first in range(0, num_tokens, step):
        # A call of its own: its logits are gone before the next piece makes its own.
        _head_piece(slice(first, min(first + step, num_tokens)), hidden, head, weight, loss, inputs, result)
    return result


def _head_piece(
    part: slice,
    hidden: torch.Tensor,
    head: torch.Tensor | None,
    weight: torch.Tensor | None,
    loss: Loss,
    inputs: Inputs,
    result: HeadResult,
) -> None:
    """One piece of tokens; its share of the result is written into `result`."""
    chunk = {name: value[part] for name, value in inputs.items()}
    logits = hidden[part] if weight is None else functional.linear(hidden[part], weight)
    targets = chunk["target_tokens"][:, None]
    # In bfloat16 a probability above 0.998 is 1: no loss and no gradient. Wider costs nothing beside the product.
    probabilities = torch.softmax(logits, dim=1, dtype=torch.promote_types(logits.dtype, torch.float32))
    logp = _log(probabilities.gather(1, targets), logits, targets)[:, 0]
    result.logprobs[part] = logp
    slope, value = _slope(loss, logp, chunk)
    result.loss += float(value.cpu().double().sum())
    if result.d_hidden is None:
        return
    del logits
    slope = slope.to(probabilities.dtype)[:, None]
    d_logits = probabilities.mul_(-slope).scatter_add_(1, targets, slope).to(hidden.dtype)
    if weight is None or head is None:
        result.d_hidden[part] = d_logits
        return
    torch.mm(d_logits, weight, out=result.d_hidden[part])
    if head.requires_grad:
        gradient = (d_logits.t() @ hidden[part]).float()
        head.grad = gradient if head.grad is None else head.grad.add_(gradient)


def _log(chosen: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log of the targets' probabilities [M, 1]; from the normaliser where they are too small for a float."""
    tiny = chosen < 1e-30
    if not bool(tiny.any()):
        return chosen.log()
    wide = logits.to(chosen.dtype)
    return torch.where(tiny, wide.gather(1, targets) - torch.logsumexp(wide, dim=1, keepdim=True), chosen.log())


def _slope(loss: Loss, logprobs: torch.Tensor, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """d loss / d logprob of each token [M], and the loss of each token [M]."""
    with torch.enable_grad():
        leaf = logprobs.detach().requires_grad_()
        value = loss.terms(leaf, inputs)
        (slope,) = torch.autograd.grad(value.sum(), leaf)
    return slope, value.detach()
