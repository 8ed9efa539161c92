"""One model of a training service, by the method names of the tinker SDK's TrainingClient.

Calls return at once; what they ask for is done in the order of the calls. An operation that fails leaves the model as
it was, and those after it go on from there.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from model_foundry.client.futures import Pending
from model_foundry.client.results import ModelInfo, PassOutput, SavedPath, StepOutput
from model_foundry.client.sampling import SamplingClient
from model_foundry.client.session import Session, load_tokenizer
from model_foundry.client.wire import PROTOBUF, adam_body, pass_body, pass_output, row_of, split, together
from model_foundry.errors import DataError, ServiceError
from model_foundry.tokenizer import Tokenizer
from model_foundry.types import Datum

CustomLoss = Callable[[Sequence[Any], list[Any]], tuple[Any, Mapping[str, float]]]
"""(rows as they were given, log-probabilities of each as a float32 tensor [T]) -> (scalar tensor, metrics)."""
logger = logging.getLogger(__name__)


class ServiceTrainingClient:
    """Drives one model. May be used from several threads; the order is then that of their calls."""

    def __init__(self, session: Session, info: ModelInfo) -> None:
        self.model_id = info.model_id
        self._session, self._info = session, info
        self._lock = threading.Lock()
        self._next_seq = 1
        self._broken: ServiceError | None = None

    def get_info(self) -> ModelInfo:
        return self._info

    def get_tokenizer(self) -> Tokenizer:
        data = self._info.model_data
        return load_tokenizer(data.tokenizer_id, data.model_name or "")

    # -- passes and steps ------------------------------------------------------------------------------------------

    def forward(
        self, data: Sequence[Any], loss_fn: str = "cross_entropy", loss_fn_config: Mapping[str, Any] | None = None
    ) -> Pending[PassOutput]:
        """The loss and log-probabilities, without gradients.

        Raises:
            DataError: no rows, or rows that cannot be meant. What the service finds wrong comes through the result.
        """
        return self._pass(data, loss_fn, loss_fn_config, forward_only=True)

    def forward_backward(
        self, data: Sequence[Any], loss_fn: str = "cross_entropy", loss_fn_config: Mapping[str, Any] | None = None
    ) -> Pending[PassOutput]:
        """Add the gradients of the summed loss to what is pending. Raises as `forward`."""
        return self._pass(data, loss_fn, loss_fn_config, forward_only=False)

    def forward_backward_custom(self, data: Sequence[Any], loss_fn: CustomLoss) -> Pending[PassOutput]:
        """A loss of one's own on the log-probabilities of `target_tokens`, differentiated here with torch.

        The model gets the gradient as the weights of a cross entropy, so this is exact. Metrics: the loss's own,
        `loss:sum`, and `surrogate_loss:sum` of that cross entropy.

        Raises:
            DataError: as `forward`, or rows without `target_tokens`.
        """
        rows = [_without_weight(row_of(datum), number) for number, datum in enumerate(data)]
        parts = _parts(rows)
        seqs = self._take(2 * len(parts))
        return self._session.loop.start(self._custom(list(data), parts, loss_fn, seqs))

    def optim_step(self, adam_params: Any) -> Pending[StepOutput]:
        """One step of AdamW, with `model_foundry.AdamParams` or the SDK's; the gradients are cleared."""
        values = {"adam_params": adam_body(adam_params), "type": "optim_step"}

        async def step(seq: int) -> StepOutput:
            return StepOutput((await self._operate("optim_step", seq, values))["metrics"])

        return self._session.loop.start(step(self._take(1)[0]))

    def _pass(
        self, data: Sequence[Any], loss_fn: str, config: Mapping[str, Any] | None, *, forward_only: bool
    ) -> Pending[PassOutput]:
        parts = _parts([row_of(datum) for datum in data])
        seqs = self._take(len(parts))
        return self._session.loop.start(self._run(parts, seqs, loss_fn, config or {}, forward_only=forward_only))

    async def _run(
        self,
        parts: Sequence[Sequence[Datum]],
        seqs: Sequence[int],
        loss_fn: str,
        config: Mapping[str, Any],
        *,
        forward_only: bool,
    ) -> PassOutput:
        """The parts of a batch, all submitted before the first is waited for."""

        async def one(rows: Sequence[Datum], seq: int) -> PassOutput:
            body = pass_body(self.model_id, seq, rows, loss_fn=loss_fn, config=config, forward_only=forward_only)
            headers = {"Content-Type": PROTOBUF}
            return pass_output((await self._accepted("forward_backward", seq, content=body, headers=headers)).content)

        done = await asyncio.gather(*map(one, parts, seqs), return_exceptions=True)
        for item in done:
            if isinstance(item, BaseException):
                raise item
        return together([item for item in done if isinstance(item, PassOutput)])

    async def _custom(
        self, data: list[Any], parts: list[list[Datum]], loss_fn: CustomLoss, seqs: Sequence[int]
    ) -> PassOutput:
        forward_seqs, backward_seqs = seqs[: len(parts)], seqs[len(parts) :]
        try:
            out = await self._run(parts, forward_seqs, "cross_entropy", {}, forward_only=True)
            loss, metrics, gradients = await asyncio.to_thread(_differentiate, data, out.logprobs, loss_fn)
        except BaseException as error:
            # Their numbers are taken, and what comes after would wait for them for ever.
            await asyncio.gather(*(self._fill(seq, error) for seq in backward_seqs))
            raise
        left = iter(gradients)
        weighted = [[Datum(r.tokens, {**r.loss_inputs, "weights": -next(left)}) for r in part] for part in parts]
        done = await self._run(weighted, backward_seqs, "cross_entropy", {}, forward_only=False)
        surrogate = done.metrics.pop("loss:sum")
        return PassOutput(
            done.loss_fn_outputs, {**done.metrics, **metrics, "loss:sum": loss, "surrogate_loss:sum": surrogate}
        )

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def save_state(
        self,
        name: str,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
        user_metadata: Mapping[str, str] | None = None,
    ) -> Pending[SavedPath]:
        """Weights and optimizer, as `tinker://RUN/weights/NAME`."""
        values = {"path": name, "ttl_seconds": ttl_seconds, "overwrite": overwrite, "user_metadata": user_metadata,
                  "type": "save_weights"}  # fmt: skip
        return self._path_of("save_weights", values)

    def load_state(self, path: str) -> Pending[SavedPath]:
        """Weights alone; the optimizer starts afresh."""
        return self._path_of("load_weights", {"path": path, "optimizer": False, "type": "load_weights"})

    def load_state_with_optimizer(self, path: str) -> Pending[SavedPath]:
        return self._path_of("load_weights", {"path": path, "optimizer": True, "type": "load_weights"})

    def save_weights_for_sampler(self, name: str, ttl_seconds: int | None = None) -> Pending[SavedPath]:
        """Weights alone, as `tinker://RUN/sampler_weights/NAME`, to sample from and to export."""
        values = {"path": name, "ttl_seconds": ttl_seconds, "type": "save_weights_for_sampler"}
        return self._path_of("save_weights_for_sampler", values)

    def save_weights_and_get_sampling_client(self, name: str | None = None) -> Pending[SamplingClient]:
        """A sampler of the weights as they are now. `name` is taken as the SDK takes it: it has no effect."""
        values = {"sampling_session_seq_id": next(self._session.sampler_numbers), "type": "save_weights_for_sampler"}

        async def save(seq: int) -> SamplingClient:
            reply = await self._operate("save_weights_for_sampler", seq, values)
            return SamplingClient(self._session, reply["sampling_session_id"])

        return self._session.loop.start(save(self._take(1)[0]))

    def unload(self) -> Pending[None]:
        """Give the model back to the service; it cannot be used afterwards, its checkpoints can."""

        async def unload(seq: int) -> None:
            await self._operate("unload_model", seq, {"type": "unload_model"})

        return self._session.loop.start(unload(self._take(1)[0]))

    def _path_of(self, kind: str, values: Mapping[str, Any]) -> Pending[SavedPath]:
        async def operate(seq: int) -> SavedPath:
            return SavedPath((await self._operate(kind, seq, values))["path"])

        return self._session.loop.start(operate(self._take(1)[0]))

    # -- the line of operations ------------------------------------------------------------------------------------

    def _take(self, count: int) -> range:
        """The next numbers in line.

        Raises:
            ServiceError: an earlier number was lost, so nothing after it would ever be done.
        """
        with self._lock:
            if self._broken is not None:
                raise ServiceError("an earlier operation did not reach the service", where=self.model_id,
                                   hint="Go on from a checkpoint.") from self._broken  # fmt: skip
            first, self._next_seq = self._next_seq, self._next_seq + count
            return range(first, first + count)

    async def _operate(self, kind: str, seq: int, values: Mapping[str, Any]) -> dict[str, Any]:
        body = {"model_id": self.model_id, "seq_id": seq, **values}
        return (await self._accepted(kind, seq, json=body)).json()

    async def _accepted(self, kind: str, seq: int, **request: Any) -> Any:
        """The answer of an operation; where the service does not take it, its place in line is filled."""
        try:
            accepted = await self._session.connection.call("POST", kind, **request)
        except ServiceError as error:
            await self._fill(seq, error)
            raise
        return await self._session.connection.result(accepted.json()["request_id"])

    async def _fill(self, seq: int, error: BaseException) -> None:
        """Put something that fails, and changes nothing, where an operation would have stood."""
        nothing = {"data": [], "loss_fn": "cross_entropy"}
        body = {"model_id": self.model_id, "seq_id": seq, "forward_backward_input": nothing}
        try:
            await self._session.connection.post("forward_backward", body)
        except ServiceError as lost:
            logger.warning("%s: operation %s was lost (%s; %s)", self.model_id, seq, error, lost)
            self._broken = lost


def _parts(rows: Sequence[Datum]) -> list[list[Datum]]:
    if not rows:
        raise DataError("there are no rows in the data")
    return split(rows)


def _without_weight(row: Datum, number: int) -> Datum:
    """A row whose log-probabilities are wanted and whose loss is nobody's."""
    targets = row.loss_inputs.get("target_tokens")
    if targets is None:
        raise DataError("it has no target_tokens, and a custom loss is about their log-probabilities",
                        where=f"row {number}")  # fmt: skip
    weights = row.loss_inputs.get("weights", np.zeros(targets.shape, dtype="<f4"))
    return Datum(row.tokens, {"target_tokens": targets, "weights": weights})


def _differentiate(
    data: Sequence[Any], logprobs: Sequence[np.ndarray], loss_fn: CustomLoss
) -> tuple[float, dict[str, float], list[np.ndarray]]:
    """The loss, its metrics, and dC/dlogprob of every target.

    Raises:
        DataError: the loss does not depend on a row's log-probabilities.
    """
    import torch

    leaves = [torch.tensor(row).requires_grad_(True) for row in logprobs]
    loss, metrics = loss_fn(data, leaves)
    loss.backward()
    gradients = []
    for number, leaf in enumerate(leaves):
        if leaf.grad is None:
            raise DataError("the loss does not depend on its log-probabilities", where=f"row {number}")
        gradients.append(leaf.grad.numpy())
    return float(loss.detach().sum()), dict(metrics), gradients
