"""Passes of models over a shared base: one alone, or those of several models at once, to the same bits.

It knows what `pieces` knows, and that models may share a pass. It knows nothing of model ids or optimizer steps.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from model_foundry.engine.base import LogprobScope
from model_foundry.engine.losses import Loss
from model_foundry.engine.pieces import Passes
from model_foundry.engine.platform import is_out_of_memory, release_memory
from model_foundry.engine.shared_base import AdapterLayers, Segment, SegmentResult, SharedBase
from model_foundry.errors import EngineError, FoundryError
from model_foundry.types import Datum, ForwardBackwardOutput

logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class SharedPasses(Passes):
    """`Passes` of an adapter over a base that others share; it has no dropout. Every token goes through the head."""

    base: SharedBase
    adapter: AdapterLayers

    def forget(self) -> None:
        # Not `super()`: a dataclass with slots is another class than the one that was written.
        Passes.forget(self)
        self.adapter.changed()

    def fits_in_one(self, data: Sequence[Datum]) -> bool:
        """Whether a batch is one piece."""
        return len(self._pieces([datum.num_tokens for datum in data])) == 1

    def segment(self, data: Sequence[Datum], loss: Loss) -> Segment:
        """A batch as a part of a pass.

        Raises:
            EngineError: a row has branches, or the loss is of them.
        """
        if loss.num_branches or any(datum.branches for datum in data):
            raise EngineError("models over a shared base read plain rows, and these have branches")
        return Segment(self.adapter, data, loss)

    def _piece(
        self, data: Sequence[Datum], loss: Loss, *, scope: LogprobScope, backward: bool
    ) -> tuple[float, list[np.ndarray], float]:
        (result,) = self.base.run([self.segment(data, loss)], backward=backward)
        return result.loss, result.logprobs, 0.0


@dataclass(frozen=True, slots=True)
class PassRequest:
    """What a model is asked for, as in `forward_backward`."""

    model_id: str
    data: Sequence[Datum]
    loss_fn: str
    loss_config: Mapping[str, float] | None


@dataclass(frozen=True, slots=True)
class Share:
    """One model's part of a pass: a batch that is one piece."""

    passes: SharedPasses
    data: Sequence[Datum]
    loss: Loss


def run_together(shares: Sequence[Share], *, backward: bool) -> list[ForwardBackwardOutput | Exception]:
    """Run batches of different models in one pass, and one by one where that fails.

    Each ends as if it had been alone: with its output, or with an error and its gradients as they were.
    """
    results: list[SegmentResult] | None = None
    try:
        if backward:
            for share in shares:
                share.passes.mend()
                share.passes.torn = True
        segments = [share.passes.segment(share.data, share.loss) for share in shares]
        results = shares[0].passes.base.run(segments, backward=backward)
    except Exception as error:
        if not is_out_of_memory(error) and not isinstance(error, FoundryError):
            logger.error("a pass of %s models failed; each is done alone now", len(shares), exc_info=error)
    if results is None:
        # Only here are the tensors of the failed pass gone.
        release_memory(shares[0].passes.device)
        return [_alone(share, backward=backward) for share in shares]
    if backward:
        for share in shares:
            share.passes.pending.append((tuple(share.data), share.loss))
            share.passes.torn = False
    return [ForwardBackwardOutput(result.loss, tuple(result.logprobs), 1, 0.0) for result in results]


def _alone(share: Share, *, backward: bool) -> ForwardBackwardOutput | Exception:
    run = share.passes.forward_backward if backward else share.passes.forward
    try:
        return run(share.data, share.loss, scope="all")
    except Exception as error:  # whatever it is, it is not the others'
        return error
