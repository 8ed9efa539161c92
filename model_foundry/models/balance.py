"""The load-balancing loss of a mixture of experts, as a sum over tokens that a batch may be split over.

The loss (Fedus et al. 2021, equations 4 to 6; as transformers computes it) is

    coefficient · W · E · Σ_e f_e P_e

f_e: choices that fell on expert e, P_e: sum of its probabilities, each divided by the number of (token, layer) pairs of
the batch, over all its sparse layers at once. W is the sum of the batch's token weights: the loss scales with the
weights like the token losses beside it, and with weights that add up to one it is transformers' own.

f has no gradient. Once it is known the loss is linear in each token's probabilities, so its gradient is one number an
expert, E f_e / pairs, that is added where the probabilities are computed: nothing of it is kept between layers, and
a batch in several pieces gives the gradients of the batch in one, if its choices are counted before. It knows nothing
of rows, pieces or experts' weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class _AddSlope(torch.autograd.Function):
    """The identity, whose gradient gains the loss's own."""

    @staticmethod
    def forward(ctx: Any, probabilities: torch.Tensor, balance: RouterBalance) -> Any:
        ctx.balance = balance
        return probabilities.view_as(probabilities)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        slope, num_tokens = ctx.balance.slope, ctx.balance.num_tokens
        if slope is None:
            return grad, None
        grad = grad.clone()
        grad[:num_tokens] += slope.to(grad.dtype)
        return grad, None


class RouterBalance:
    """Follows the routers of one model through a batch.

    A batch: `open`; with several pieces, `listen` and a pass without gradients for each, then `counted`; then for each
    piece `listen`, a forward pass, `settle`, its backward pass; at the end `close`.

    Attributes:
        slope: [E], what each token's probabilities gain as gradient; None outside a batch.
        num_tokens: of the piece at hand; what a pass computes beyond is filling, and does not count.
        total: choices counted here to those of the whole batch, where other processes compute parts of it.
    """

    def __init__(self, coefficient: float, *, num_experts: int, num_layers: int) -> None:
        self.coefficient, self.num_experts, self.num_layers = coefficient, num_experts, num_layers
        self.slope: torch.Tensor | None = None
        self.num_tokens = 0
        self.total: Callable[[torch.Tensor], torch.Tensor] = lambda choices: choices
        self._weight, self._num_pairs = 0.0, 0
        self._choices: torch.Tensor | None = None
        self._probabilities: torch.Tensor | None = None
        self._listening = self._counts = False

    def open(self, *, weight: float, num_tokens: int) -> None:
        """A batch of so many tokens, whose weights add up to `weight`."""
        self._weight, self._num_pairs = weight, num_tokens * self.num_layers
        self._choices = self._probabilities = self.slope = None
        self._listening, self._counts = False, True

    def listen(self, num_tokens: int) -> None:
        """The next pass has so many tokens that count."""
        self.num_tokens, self._listening, self._probabilities = num_tokens, True, None

    def counted(self) -> None:
        """Every choice of the batch has been seen; passes from here on don't count again."""
        if self._counts and self._choices is not None:
            self._choices = self.total(self._choices)
        self._listening = self._counts = False

    def attach(self, probabilities: torch.Tensor) -> torch.Tensor:
        """probabilities [N, E] of one layer, through which the gradient will come."""
        return _AddSlope.apply(probabilities, self)  # pyright: ignore[reportReturnType]

    @torch.no_grad()
    def record(self, probabilities: torch.Tensor, chosen: torch.Tensor) -> None:
        """One layer's probabilities [N, E] and choices int64 [N, k]; ignored while a layer is computed again."""
        if not self._listening:
            return
        seen = probabilities[: self.num_tokens].sum(0)
        self._probabilities = seen if self._probabilities is None else self._probabilities + seen
        if self._counts:
            choices = torch.bincount(chosen[: self.num_tokens].flatten(), minlength=self.num_experts).to(seen.dtype)
            self._choices = choices if self._choices is None else self._choices + choices

    def settle(self, scale: float = 1.0) -> float:
        """Set the slope, times `scale`, for the backward pass of the piece just computed; its share of the loss."""
        self.counted()
        if self._choices is None or self._probabilities is None:
            return 0.0
        factor = self.coefficient * self._weight * self.num_experts / self._num_pairs**2
        slope = self._choices * factor
        self.slope = slope * scale
        return float((slope.double() * self._probabilities.double()).sum())

    def close(self) -> None:
        """The batch is done."""
        self._choices = self._probabilities = self.slope = None
        self._listening = self._counts = False
