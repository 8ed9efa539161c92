"""A batch through an MLX decoder: the pieces, the replays and the books of `pieces.Passes`, with MLX's arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from model_foundry.engine.base import LogprobScope
from model_foundry.engine.branches import lay_out
from model_foundry.engine.losses import Loss
from model_foundry.engine.mlx_losses import target_logprobs
from model_foundry.engine.pieces import Passes
from model_foundry.types import Datum


@dataclass(slots=True)
class MlxPasses(Passes):
    """`Passes` whose model is an `MlxDecoder` and whose optimizer is an `MlxAdamW`."""

    def _piece(
        self, data: Sequence[Datum], loss: Loss, *, scope: LogprobScope, backward: bool
    ) -> tuple[float, list[np.ndarray], float]:
        inputs = {name: np.concatenate([datum.loss_inputs[name] for datum in data]) for name in loss.inputs}
        shape = inputs["target_tokens"].shape
        due = np.ones(shape[0], dtype=bool)
        if scope == "due" and loss.due is not None:
            due = (inputs[loss.due] != 0).reshape(shape[0], -1).any(axis=1)
        logprobs, total = np.full(shape, np.nan, dtype=np.float32), 0.0
        if due.any():
            total, logprobs[due] = self._compute(data, loss, inputs, due, backward=backward)
        return total, np.split(logprobs, np.cumsum([datum.num_tokens for datum in data])[:-1]), 0.0

    def _compute(
        self, data: Sequence[Datum], loss: Loss, inputs: dict[str, np.ndarray], due: np.ndarray, *, backward: bool
    ) -> tuple[float, np.ndarray]:
        """The summed loss, and the log-probability of each target where it is due."""
        decoder: Any = self.model
        optimizer: Any = self.optimizer
        laid = lay_out(data, reads_branches=self.model.reads_branches)
        tokens = mx.array(np.concatenate(laid.rows).astype(np.int32))
        places = np.flatnonzero(due) if laid.places is None else laid.places[due]
        lengths, chosen = [len(row) for row in laid.rows], mx.array(places.astype(np.int32))
        dtypes = dict.fromkeys(inputs, np.float32) | {"target_tokens": np.int32}
        wanted: Any = {name: mx.array(value[due].astype(dtypes[name])) for name, value in inputs.items()}

        def summed(trained: dict[str, mx.array]) -> tuple[mx.array, mx.array, mx.array]:
            hidden = decoder.hidden(tokens, lengths, trained)[chosen]
            head = decoder.head({**decoder.weights, **trained})
            logprobs = target_logprobs(hidden, head, wanted["target_tokens"])
            terms: Any = loss.terms(logprobs, wanted, loss.settings)  # pyright: ignore[reportArgumentType]
            return terms.sum(), terms, logprobs

        if backward:
            (_, terms, logprobs), gradients = mx.value_and_grad(summed)(optimizer.trained)
            optimizer.add(gradients)
        else:
            _, terms, logprobs = summed({})
        mx.eval(terms, logprobs)
        return float(np.array(terms, copy=False).astype(np.float64).sum()), np.array(logprobs)
