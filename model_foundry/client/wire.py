"""Rows and results of a training service, as bytes: the protocol's protobuf messages.

Rows may be ours (`model_foundry.Datum`) or any with the tinker SDK's attributes, so that a program can keep its types.

Shapes: T tokens of a row, K targets of a token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from model_foundry.client.results import PassOutput, SampleOutput
from model_foundry.errors import DataError
from model_foundry.service.messages import DTYPES, MESSAGES, STOP_REASONS
from model_foundry.types import AdamParams, Datum, MuonParams, SampledSequence, SamplingParams

PROTOBUF = "application/x-protobuf"
_MOST_ROWS, _MOST_BYTES = 1024, 5_000_000
"""Of one request; the SDK's own, so that both split a batch alike."""
_NUMPY = {DTYPES["float32"]: "<f4", DTYPES["int64"]: "<i8", DTYPES["int32"]: "<i4"}


def tokens_of(given: Any) -> np.ndarray:
    """Token ids int32 [T] of an array, a list, or the SDK's `ModelInput`.

    Raises:
        DataError: they are no whole numbers.
    """
    values = np.asarray(given.to_ints() if hasattr(given, "to_ints") else given)
    if values.ndim != 1 or (values.size and not np.issubdtype(values.dtype, np.integer)):
        raise DataError(f"tokens are {values.dtype} of shape {values.shape}; they must be a row of whole numbers")
    if values.size and (values.min() < -(2**31) or values.max() >= 2**31):
        raise DataError("a token is beyond every vocabulary")
    return np.ascontiguousarray(values, dtype="<i4")


def row_of(datum: Any) -> Datum:
    """A row in our form, whichever it has. `target_tokens` are integers, everything else float32.

    Raises:
        DataError: it holds what no row may.
    """
    inputs: Mapping[str, Any]
    if isinstance(datum, Datum):
        tokens, inputs = datum.tokens, datum.loss_inputs
    else:
        tokens, inputs = datum.model_input, datum.loss_fn_inputs
    arrays: dict[str, np.ndarray] = {}
    for name, value in inputs.items():
        array = value.to_numpy() if hasattr(value, "to_numpy") else np.asarray(value)
        arrays[name] = array.astype("<i8" if name == "target_tokens" else "<f4")
    return Datum(tokens_of(tokens), arrays)


def split(rows: Sequence[Datum]) -> list[list[Datum]]:
    """Rows as requests hold them, in order."""
    parts: list[list[Datum]] = []
    size = 0
    for row in rows:
        num_bytes = row.tokens.nbytes + sum(array.nbytes for array in row.loss_inputs.values())
        if not parts or len(parts[-1]) == _MOST_ROWS or size + num_bytes > _MOST_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(row)
        size += num_bytes
    return parts


def pass_body(
    model_id: str, seq_id: int, rows: Sequence[Datum], *, loss_fn: str, config: Mapping[str, Any], forward_only: bool
) -> bytes:
    """A serialised `ForwardBackwardRequest`."""
    message = MESSAGES["ForwardBackwardRequest"](
        model_id=model_id, seq_id=seq_id, loss_fn=loss_fn, forward_only=forward_only
    )
    for name, value in config.items():
        if isinstance(value, str):
            message.loss_fn_config_v2[name].text = value
        else:
            message.loss_fn_config_v2[name].number = float(value)
    for row in rows:
        datum = message.data.add()
        datum.model_input.add().encoded_text.tokens = row.tokens.tobytes()
        for name, array in row.loss_inputs.items():
            tensor = datum.loss_fn_inputs[name]
            tensor.dense = np.ascontiguousarray(array).tobytes()
            tensor.dtype = DTYPES["int64" if name == "target_tokens" else "float32"]
            tensor.shape.extend(array.shape)
    return message.SerializeToString(deterministic=True)


def pass_output(reply: bytes) -> PassOutput:
    """From a serialised `ForwardBackwardOutput`."""
    message = MESSAGES["ForwardBackwardOutput"].FromString(reply)
    rows: list[Mapping[str, np.ndarray]] = []
    for record in message.loss_fn_outputs:
        fields = {name: _arrays(field) for name, field in record.fields.items()}
        rows += [{name: arrays[row] for name, arrays in fields.items()} for row in range(record.num_datums)]
    return PassOutput(tuple(rows), dict(message.metrics))


def _arrays(field: Any) -> list[np.ndarray]:
    """A batched tensor's rows: offsets count bytes."""
    ends = np.frombuffer(field.offsets, dtype="<i8").tolist()
    trailing = list(field.trailing_shape)
    width, dtype = math.prod(trailing), np.dtype(_NUMPY[field.dtype])
    return [
        np.frombuffer(field.data[first:last], dtype=dtype).reshape(
            [(last - first) // dtype.itemsize // width, *trailing]
        )
        for first, last in pairwise(ends)
    ]


def together(parts: Sequence[PassOutput]) -> PassOutput:
    """The passes over the parts of one batch, as one.

    Raises:
        DataError: a metric that does not say how it is put together.
    """
    if len(parts) == 1:
        return parts[0]
    reductions = {"sum": math.fsum, "mean": lambda values: math.fsum(values) / len(values), "min": min, "max": max}
    metrics = {}
    for name in parts[0].metrics:
        reduce = reductions.get(name.rpartition(":")[2])
        if reduce is None:
            raise DataError(f"the metric {name} does not say how those of several requests are put together")
        metrics[name] = reduce([part.metrics[name] for part in parts])
    return PassOutput(tuple(row for part in parts for row in part.loss_fn_outputs), metrics)


def adam_body(params: Any) -> dict[str, float]:
    """AdamW's numbers of `model_foundry.AdamParams`, or of the SDK's.

    Raises:
        DataError: they are another optimizer's.
    """
    if isinstance(params, MuonParams) or not all(hasattr(params, name) for name in AdamParams.__dataclass_fields__):
        raise DataError(f"a service's models are trained by AdamW, and these are {type(params).__name__}")
    return {name: float(getattr(params, name)) for name in AdamParams.__dataclass_fields__}


def sampling_body(params: Any) -> dict[str, Any]:
    """A request's `sampling_params`, from `model_foundry.SamplingParams` or the SDK's."""
    body = {name: getattr(params, name) for name in ("max_tokens", "temperature", "top_p", "seed")}
    if isinstance(params, SamplingParams):
        return body | {"top_k": params.top_k or -1, "stop": list(params.stop_token_ids)}
    stop = params.stop
    return body | {"top_k": params.top_k, "stop": stop if stop is None or isinstance(stop, str) else list(stop)}


def sample_output(reply: bytes) -> SampleOutput:
    """From a serialised `SampleResponse`."""
    message = MESSAGES["SampleResponse"].FromString(reply)
    reasons = {number: name for name, number in STOP_REASONS.items()}
    sequences = tuple(
        SampledSequence(
            tokens=np.frombuffer(item.tokens, dtype="<i4"),
            logprobs=np.frombuffer(item.logprobs, dtype="<f4"),
            stop_reason=reasons[item.stop_reason],
        )
        for item in message.sequences
    )
    prompt = None
    if message.HasField("prompt_logprobs"):
        values = np.frombuffer(message.prompt_logprobs, dtype="<f4").tolist()
        prompt = tuple(None if math.isnan(value) else value for value in values)
    top = _likeliest(message.topk_prompt_logprobs) if message.HasField("topk_prompt_logprobs") else None
    sampled = None
    if message.sequences and message.sequences[0].HasField("topk_sampled_logprobs"):
        sampled = tuple(_likeliest(item.topk_sampled_logprobs) for item in message.sequences)
    return SampleOutput(sequences, prompt, top, sampled)


_FILLED_UP = -99999.0
"""The log-probability that stands where a position has fewer than k."""


def _likeliest(message: Any) -> tuple[list[tuple[int, float]] | None, ...]:
    tokens = np.frombuffer(message.token_ids, dtype="<i4").reshape(message.length, message.k).tolist()
    logprobs = np.frombuffer(message.logprobs, dtype="<f4").reshape(message.length, message.k).tolist()
    rows = [
        [(token, logprob) for token, logprob in zip(*pair, strict=True) if logprob > _FILLED_UP]
        for pair in zip(tokens, logprobs, strict=True)
    ]
    return tuple(row or None for row in rows)
