"""Adapters on the head in a pass that several share: each segment's own, in blocks of rows that never change.

Logits exist for some rows of a pass at a time, and which they are depends on who else is in it. So what an adapter adds
is computed for `SEGMENT_ROWS` rows at a time, which a segment always begins and ends with: a BLAS's order of summation
depends on the number of rows.

Shapes: n rows of a unit within a piece of logits, D width, V vocabulary, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from model_foundry.models.head import HeadUpdate

SEGMENT_ROWS = 16
"""A segment is filled up to a multiple of this, by tokens after its last row's end."""


@dataclass(frozen=True, slots=True)
class HeadPart:
    """One unit's adapter on the head, and what its gradients have come to.

    Attributes:
        down: A, [r, D], up: B with the scale in it, [V, r]; in the compute type.
        d_down, d_up: float32, of `update`'s parameters; empty in a pass without gradients.
    """

    update: HeadUpdate
    down: torch.Tensor
    up: torch.Tensor
    d_down: torch.Tensor
    d_up: torch.Tensor

    @classmethod
    def of(cls, update: HeadUpdate, factors: tuple[torch.Tensor, torch.Tensor], *, backward: bool) -> HeadPart:
        kept = (update.down, update.up) if backward else (update.down[:0], update.up[:0])
        return cls(update, *factors, *(torch.zeros_like(part, requires_grad=False) for part in kept))

    def add(self, logits: torch.Tensor, hidden: torch.Tensor) -> None:
        """To logits [n, V] of hidden states [n, D], in place."""
        for rows in _blocks(logits.shape[0]):
            logits[rows].addmm_(hidden[rows] @ self.down.t(), self.up.t())

    def back(self, d_logits: torch.Tensor, hidden: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add to the gradient [n, D] of the hidden states, in place, and to those of A and B."""
        for rows in _blocks(d_logits.shape[0]):
            d_low = d_logits[rows] @ self.up
            gradient[rows].addmm_(d_low, self.down)
            self.d_down.add_(d_low.t() @ hidden[rows])
            self.d_up.add_(d_logits[rows].t() @ (hidden[rows] @ self.down.t()))

    def settle(self, add: Callable[[torch.Tensor, torch.Tensor, float], None]) -> None:
        """Hand over what the gradients have come to: `add(parameter, gradient, scale)`."""
        add(self.update.down, self.d_down, 1.0)
        add(self.update.up, self.d_up.mul_(self.update.scaling), 1.0)


def _blocks(num_rows: int) -> Iterator[slice]:
    return (slice(first, first + SEGMENT_ROWS) for first in range(0, num_rows, SEGMENT_ROWS))
