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
from model_foundry.service.scoring import NOTHING, Pairs, Scores, Targets
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


def sample_reply(sequences: Sequence[SampledSequence], scores: Scores) -> bytes:
    """A serialised `SampleResponse`."""
    message = MESSAGES["SampleResponse"]()
    for number, sequence in enumerate(sequences):
        added = message.sequences.add(
            stop_reason=STOP_REASONS[sequence.stop_reason],
            tokens=sequence.tokens.astype("<i4").tobytes(),
            logprobs=sequence.logprobs.astype("<f4").tobytes(),
        )
        if scores.samples_likeliest:
            _put_pairs(added.topk_sampled_logprobs, scores.samples_likeliest[number])
    if scores.prompt is not None:
        message.prompt_logprobs = scores.prompt.astype("<f4").tobytes()
    if scores.prompt_likeliest is not None:
        _put_pairs(message.topk_prompt_logprobs, scores.prompt_likeliest)
    if scores.asked is not None and scores.targets is not None:
        _put_targets(message.target_prompt_logprobs, scores.asked, scores.targets)
    if scores.drawn is not None:
        ids, logprobs = scores.drawn
        for tensor, values, dtype in (
            (message.prompt_alt_tokens.tokens, ids.astype("<i8"), "int64"),
            (message.prompt_alt_tokens.logprobs, logprobs.astype("<f4"), "float32"),
        ):
            tensor.dense, tensor.dtype = values.tobytes(), DTYPES[dtype]
            tensor.shape.extend(values.shape)
    return message.SerializeToString(deterministic=True)


def _put_pairs(message: Any, pairs: Pairs) -> None:
    ids, logprobs = pairs
    message.token_ids, message.logprobs = ids.astype("<i4").tobytes(), logprobs.astype("<f4").tobytes()
    message.length, message.k = ids.shape


def _put_targets(message: Any, asked: Targets, values: np.ndarray) -> None:
    """In the layout that they were asked for in."""
    message.dtype = DTYPES["float32"]
    message.shape.extend(asked.shape)
    data = values.astype("<f4").tobytes()
    if asked.crow is None or asked.col is None:
        message.dense = data
        return
    message.sparse_csr.values = data
    message.sparse_csr.crow_indices = asked.crow.astype("<i8").tobytes()
    message.sparse_csr.col_indices = asked.col.astype("<i8").tobytes()


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
    if message.HasField("topk_prompt_logprobs"):
        out["topk_prompt_logprobs"] = _pairs_as_json(message.topk_prompt_logprobs)
    for sequence, told in zip(message.sequences, out["sequences"], strict=True):
        if sequence.HasField("topk_sampled_logprobs"):
            told["topk_logprobs"] = _pairs_as_json(sequence.topk_sampled_logprobs)
    return out


def _pairs_as_json(message: Any) -> list[list[tuple[int, float]] | None]:
    shape = (message.length, message.k)
    ids = np.frombuffer(message.token_ids, dtype="<i4").reshape(shape).tolist()
    logprobs = np.frombuffer(message.logprobs, dtype="<f4").reshape(shape).tolist()
    rows = [list(zip(*row, strict=True)) for row in zip(ids, logprobs, strict=True)]
    return [None if row and row[0] == (0, NOTHING) else row for row in rows]


AS_JSON = {"pass": pass_as_json, "sample": sample_as_json}
"""Kinds of reply that are kept as protobuf -> how they read in JSON."""
