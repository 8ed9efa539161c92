"""Results as they are kept and sent: protobuf first, and JSON made from it for clients that ask for it.

Shapes: T tokens of a row or of a sample, K targets of a token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from model_foundry.service.messages import DTYPES, MESSAGES, STOP_REASONS
from model_foundry.types import SampledSequence

OUTPUT_TYPE = "ArrayRecord"


def pass_reply(logprobs: Sequence[np.ndarray], metrics: Mapping[str, float]) -> bytes:
    """A serialised `ForwardBackwardOutput`.

    Args:
        logprobs: float32 [T] or [T, K], one a row.
        metrics: by `name:reduction`, as clients that split a batch put the parts together.
    """
    message = MESSAGES["ForwardBackwardOutput"](loss_fn_output_type=OUTPUT_TYPE, metrics=dict(metrics))
    # Rows in order; a record holds a run of rows with the same K.
    for shape, run in _runs(logprobs):
        record = message.loss_fn_outputs.add(type_tag=OUTPUT_TYPE, num_datums=len(run))
        field = record.fields["logprobs"]
        field.data = b"".join(np.ascontiguousarray(row, dtype="<f4").tobytes() for row in run)
        field.offsets = np.cumsum([0, *(row.size * 4 for row in run)]).astype("<i8").tobytes()
        field.dtype = DTYPES["float32"]
        field.trailing_shape.extend(shape)
    return message.SerializeToString(deterministic=True)


def _runs(rows: Sequence[np.ndarray]) -> list[tuple[tuple[int, ...], list[np.ndarray]]]:
    runs: list[tuple[tuple[int, ...], list[np.ndarray]]] = []
    for row in rows:
        if not runs or runs[-1][0] != row.shape[1:]:
            runs.append((row.shape[1:], []))
        runs[-1][1].append(row)
    return runs


def pass_as_json(reply: bytes) -> dict[str, Any]:
    """The same as clients before protobuf read it."""
    message = MESSAGES["ForwardBackwardOutput"].FromString(reply)
    outputs = []
    for record in message.loss_fn_outputs:
        field = record.fields["logprobs"]
        ends = np.frombuffer(field.offsets, dtype="<i8") // 4
        values = np.frombuffer(field.data, dtype="<f4")
        trailing = list(field.trailing_shape)
        for first, last in pairwise(ends):
            row = values[first:last]
            shape = [row.size // math.prod(trailing), *trailing]
            outputs.append({"logprobs": {"data": row.tolist(), "dtype": "float32", "shape": shape}})
    return {
        "loss_fn_output_type": message.loss_fn_output_type,
        "loss_fn_outputs": outputs,
        "metrics": dict(message.metrics),
    }


def sample_reply(sequences: Sequence[SampledSequence], prompt_logprobs: np.ndarray | None) -> bytes:
    """A serialised `SampleResponse`. `prompt_logprobs`: float32 [T], NaN where there is none."""
    message = MESSAGES["SampleResponse"]()
    for sequence in sequences:
        message.sequences.add(
            stop_reason=STOP_REASONS[sequence.stop_reason],
            tokens=sequence.tokens.astype("<i4").tobytes(),
            logprobs=sequence.logprobs.astype("<f4").tobytes(),
        )
    if prompt_logprobs is not None:
        message.prompt_logprobs = prompt_logprobs.astype("<f4").tobytes()
    return message.SerializeToString(deterministic=True)


def sample_as_json(reply: bytes) -> dict[str, Any]:
    message = MESSAGES["SampleResponse"].FromString(reply)
    reasons = {number: name for name, number in STOP_REASONS.items()}
    out: dict[str, Any] = {
        "type": "sample",
        "sequences": [
            {
                "stop_reason": reasons[sequence.stop_reason],
                "tokens": np.frombuffer(sequence.tokens, dtype="<i4").tolist(),
                "logprobs": np.frombuffer(sequence.logprobs, dtype="<f4").tolist(),
            }
            for sequence in message.sequences
        ],
    }
    if message.HasField("prompt_logprobs"):
        values = np.frombuffer(message.prompt_logprobs, dtype="<f4").tolist()
        out["prompt_logprobs"] = [None if math.isnan(value) else value for value in values]
    return out


AS_JSON = {"pass": pass_as_json, "sample": sample_as_json}
"""Kinds of reply that are kept as protobuf -> how they read in JSON."""
