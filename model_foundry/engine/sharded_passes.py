"""A batch computed by several ranks: each takes its share of the rows, and all run the same number of passes.

Layers are put together from all ranks while they are computed, so a rank that has fewer pieces, or no rows at all, runs
passes over filling. It knows nothing of model ids, optimizer steps or files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from model_foundry.engine.base import LogprobScope
from model_foundry.engine.losses import Loss
from model_foundry.engine.pieces import Passes, split_by_tokens
from model_foundry.engine.platform import is_out_of_memory
from model_foundry.engine.side_by_side import even_shares
from model_foundry.errors import OutOfMemoryError
from model_foundry.models.sharding import ShardedModel
from model_foundry.types import Datum, ForwardBackwardOutput

T = TypeVar("T")


@dataclass(slots=True)
class ShardedPasses(Passes):
    """`Passes` on this rank's rows of each batch, which every rank is given whole; results are those of its rows alone.

    Attributes:
        rank, size: this rank, and how many there are.
        rows: the rows that the last pass computed here.
    """

    rank: int = 0
    size: int = 1
    rows: tuple[int, ...] = ()
    _filling: tuple[Datum, ...] = ()

    def forward(self, data: Sequence[Datum], loss: Loss, *, scope: LogprobScope) -> ForwardBackwardOutput:
        self._filling = _filling(data)
        try:
            # Not `super()`: a dataclass with slots is another class than the one that was written.
            return Passes.forward(self, data, loss, scope=scope)
        finally:
            if isinstance(self.model, ShardedModel):
                self.model.settle()

    def forward_backward(self, data: Sequence[Datum], loss: Loss, *, scope: LogprobScope) -> ForwardBackwardOutput:
        self._filling = _filling(data)
        return Passes.forward_backward(self, data, loss, scope=scope)

    def mend(self) -> None:
        """Nothing: what broke off half-way on one rank ends the run on all of them."""

    def _until_it_fits(self, attempt: Callable[[bool], T]) -> T:
        """Once: while one rank would try again, the others would wait in the middle of a layer.

        Raises:
            OutOfMemoryError: memory ran out on this rank.
        """
        try:
            return attempt(False)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            num_tokens = sum(self._piece_lengths)
            raise OutOfMemoryError(
                f"memory ran out on a piece of {num_tokens} tokens, and several processes do not try smaller ones",
                hint="Set training.micro_batch_tokens below that, lower data.max_length, set "
                "training.gradient_checkpointing=true, or use more processes.",
            ) from error

    def _pieces(self, lengths: Sequence[int]) -> list[list[int]]:
        """This rank's pieces, and empty ones up to the number that the busiest rank has."""
        every = []
        for share in even_shares(lengths, self.size):
            pieces = split_by_tokens([lengths[row] for row in share], self.planned_piece_tokens)
            every.append([[share[place] for place in piece] for piece in pieces])
        most = max(len(pieces) for pieces in every)
        mine = every[self.rank]
        return mine + [[] for _ in range(most - len(mine))]

    def _enter(self, piece: Sequence[int], data: Sequence[Datum], first_row: int) -> list[Datum]:
        if piece:
            return Passes._enter(self, piece, data, first_row)
        self.counter.rows = ((-1, 1),)
        self._piece_lengths, self._num_read = (), 0
        return list(self._filling)

    def _output(
        self, loss: float, logprobs: dict[int, np.ndarray], num_pieces: int, router_loss: float
    ) -> ForwardBackwardOutput:
        self.rows = tuple(sorted(logprobs))
        return Passes._output(self, loss, logprobs, num_pieces, router_loss)


def _filling(data: Sequence[Datum]) -> tuple[Datum, ...]:
    """One token that counts for nothing, with the inputs that the batch's rows have."""
    tokens, inputs = data[0].tokens, data[0].loss_inputs
    return (Datum(np.zeros_like(tokens[:1]), {name: np.zeros_like(value[:1]) for name, value in inputs.items()}),)
