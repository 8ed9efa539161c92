"""The head's pass for losses of pairs, whose gradient is known only when all of an answer has been read.

A datum is a pair: it ends in two branches, the better answer first. Their tokens bear the pair's weight, so that a
pair's loss scales with its weight as token losses do; their `logprobs`, where the loss has a reference, are its. It
knows no models.

Shapes: R pairs, M tokens with a loss due, D width, V vocabulary; [R, 2] is better and worse.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn import functional

from model_foundry.engine.losses import CHUNK_LOGITS, NUM_ANSWERS, HeadResult, Inputs, Loss, head_pass
from model_foundry.models.head import HeadUpdate

_EACH = Loss(lambda logprobs, inputs, settings: logprobs, inputs=("target_tokens",), due=None)
"""The log-probabilities themselves, whose gradient is that of each token alone."""
_SLOPED = Loss(lambda logprobs, inputs, settings: inputs["slopes"] * logprobs, inputs=("target_tokens",), due=None)


def pair_pass(
    hidden: torch.Tensor,
    head: torch.Tensor | None,
    loss: Loss,
    inputs: Inputs,
    *,
    answers: torch.Tensor,
    num_pairs: int,
    backward: bool,
    update: HeadUpdate | None = None,
    scale: float = 1.0,
    chunk_logits: int = CHUNK_LOGITS,
) -> HeadResult:
    """As `losses.head_pass`, for a loss of whole answers; the logits never exist at once here either.

    A token's log-probability enters the loss through its answer's sum alone. So its gradient is the answer's slope
    times the gradient of the token by itself, which the one pass over the head has made before any sum is known. Only a
    head that is trained needs a second pass, whose weights are the slopes.

    Args:
        hidden: [M, D] of the tokens due; without a head, logits [M, V].
        inputs: each [M].
        answers: int64 [M] on the CPU, 2 × pair + 0 for the better answer's tokens, + 1 for the worse one's, 2 × R for
            tokens without a loss.
        update, scale, chunk_logits: as for `head_pass`.
    """
    trains_update = update is not None and update.is_trained
    trains_head = backward and (trains_update or (head is not None and head.requires_grad))
    each_alone = backward and not trains_head
    result = head_pass(hidden, head, _EACH, inputs, backward=each_alone, update=update, chunk_logits=chunk_logits)

    def sums(values: torch.Tensor) -> torch.Tensor:
        """[R, 2], in float64, which not every device has: rewards are small differences of large sums."""
        flat = torch.zeros(num_pairs * NUM_ANSWERS + 1, dtype=torch.float64)
        return flat.index_add_(0, answers, values.cpu().double())[:-1].view(num_pairs, NUM_ANSWERS)

    num_tokens = sums(torch.ones_like(result.logprobs))
    weights = (sums(inputs["weights"]) / num_tokens)[:, 0]
    wholes = {"num_tokens": num_tokens} | {name: sums(inputs[name]) for name in ("logprobs",) if name in loss.inputs}
    with torch.enable_grad():
        logps = sums(result.logprobs).requires_grad_()
        terms = loss.terms(logps, wholes, loss.settings)
        value = (weights * terms).sum()
        (slopes,) = torch.autograd.grad(value, logps)
    result.loss = float(value.detach())
    if not backward:
        return result
    slope = functional.pad(slopes.view(-1), (0, 1))[answers].float().to(hidden.device)
    if trains_head:
        sloped = head_pass(
            hidden, head, _SLOPED, {**inputs, "slopes": slope}, backward=True, update=update, scale=scale,
            chunk_logits=chunk_logits,
        )  # fmt: skip
        return replace(result, d_hidden=sloped.d_hidden)
    if result.d_hidden is not None:
        # In float32: a slope by the loss scale of float16 need not be a float16 itself.
        result.d_hidden.mul_(slope.mul_(scale)[:, None])
    return result
