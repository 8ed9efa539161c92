"""What changes a model, on the engine: passes and steps. Done again from the journal, they give the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from google.protobuf.message import DecodeError

from model_foundry.engine.shared_passes import PassRequest
from model_foundry.engine.torch_engine import TorchEngine
from model_foundry.errors import DataError
from model_foundry.service.books import Operation
from model_foundry.service.messages import MESSAGES
from model_foundry.service.replies import pass_reply
from model_foundry.service.requests import OptimStep, read_request
from model_foundry.service.tensors import Pass, read_json_pass, read_pass
from model_foundry.types import AdamParams, ForwardBackwardOutput

KINDS = ("forward_backward", "forward")
_FIELDS = {"forward_backward": "forward_backward_input", "forward": "forward_input"}
_KNOWN_KEYS = {"model_id", "seq_id", "type", "forward_only"}


def read_body(operation: Operation) -> Pass:
    """The rows of a `forward` or `forward_backward`.

    Raises:
        DataError: they cannot be meant.
    """
    if operation.encoding == "proto":
        try:
            return read_pass(MESSAGES["ForwardBackwardRequest"].FromString(operation.body))
        except DecodeError as error:
            raise DataError(f"the body is no ForwardBackwardRequest ({error})") from error
    body = orjson.loads(operation.body)
    field = _FIELDS[operation.kind]
    if unknown := sorted(body.keys() - _KNOWN_KEYS - {field}):
        raise DataError(f"{unknown[0]} is not known to this service, and nothing is ignored", where=operation.kind)
    forward_only = operation.kind == "forward" or body.get("forward_only", False)
    return read_json_pass(body, field=field, forward_only=bool(forward_only))


@dataclass(frozen=True, slots=True)
class PassDone:
    """A pass's reply, and what it was."""

    reply: bytes
    loss: float
    num_tokens: int
    adds_gradients: bool


def do_pass(engine: TorchEngine, model: str, asked: Pass) -> PassDone:
    """Do a pass.

    Raises:
        FoundryError: refused; the gradients are as they were.
    """
    run = engine.forward if asked.forward_only else engine.forward_backward
    out = run(model, asked.data, loss_fn=asked.loss_fn, loss_config=asked.loss_config, logprobs="all")
    return _done(asked, out)


def do_together(engine: TorchEngine, models: Sequence[str], asked: Sequence[Pass]) -> list[PassDone | Exception]:
    """`do_pass` of several models at once, all forward only or none: each one's reply, or why it was refused."""
    requests = [
        PassRequest(model, each.data, each.loss_fn, each.loss_config) for model, each in zip(models, asked, strict=True)
    ]
    outputs = engine.run_together(requests, backward=not asked[0].forward_only)
    return [out if isinstance(out, Exception) else _done(each, out) for each, out in zip(asked, outputs, strict=True)]


def _done(asked: Pass, out: ForwardBackwardOutput) -> PassDone:
    num_tokens = sum(datum.num_tokens for datum in asked.data)
    metrics = {"loss:sum": out.loss_sum, "num_tokens:sum": float(num_tokens)}
    if out.router_loss:
        metrics["router_loss:sum"] = out.router_loss
    rows = [_as_asked(row, columns) for row, columns in zip(out.logprobs, asked.columns, strict=True)]
    return PassDone(pass_reply(rows, metrics), out.loss_sum, num_tokens, not asked.forward_only)


def _as_asked(logprobs: np.ndarray, columns: int | None) -> np.ndarray:
    """Without the columns that only made rows alike."""
    if logprobs.ndim == 1:
        return logprobs
    return logprobs[:, 0] if columns is None else logprobs[:, :columns]


def do_step(engine: TorchEngine, model: str, operation: Operation) -> dict[str, Any]:
    """The reply of an `optim_step`.

    Raises:
        FoundryError: refused; nothing was changed.
    """
    body = orjson.loads(operation.body)
    if "optimizer_params" in body:
        raise DataError(f"{body['optimizer_params']} are not offered; every model here has AdamW", where="optim_step")
    request: OptimStep = read_request("optim_step", body)
    out = engine.optim_step(model, AdamParams(**request.adam_params.model_dump()))
    # JSON has no infinity: the norm is left out of a step that was skipped because of it, and the reason said.
    metrics = {"step": float(out.step), "skipped": float(out.skipped)}
    if not out.skipped:
        metrics["grad_norm"] = out.grad_norm
    return {"metrics": metrics, "type": "optim_step"}
