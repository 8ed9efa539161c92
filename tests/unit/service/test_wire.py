"""What goes over the wire, against the official client's own reading and writing of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from tinker import types
from tinker.proto import tinker_public_pb2 as official
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.proto.response_conv import deserialize_proto_response

from model_foundry.errors import DataError
from model_foundry.service import bodies
from model_foundry.service.messages import MESSAGES
from model_foundry.service.replies import pass_as_json, pass_reply, sample_as_json, sample_reply
from model_foundry.service.requests import read_request
from model_foundry.service.scoring import Scores, read_targets
from model_foundry.service.tensors import Pass, read_json_pass, read_pass
from model_foundry.types import SampledSequence


def fields(message: Any) -> list[tuple[Any, ...]]:
    return sorted(
        (f.name, f.number, f.type, f.is_repeated, f.has_presence, f.message_type and f.message_type.name,
         f.containing_oneof and f.containing_oneof.name)
        for f in message.DESCRIPTOR.fields
    )  # fmt: skip


@pytest.mark.parametrize("name", list(MESSAGES))
def test_messages_have_the_published_fields(name: str) -> None:
    """A number that is wrong by one reads another field, or silently none."""
    assert fields(MESSAGES[name]) == fields(getattr(official, name))


def as_sent(data: list[types.Datum], *, forward_only: bool = False, **config: Any) -> Pass:
    body = types.ForwardBackwardInput(data=data, loss_fn="cross_entropy", loss_fn_config=config or None)
    message = forward_backward_request_to_proto(
        types.ForwardBackwardRequest(forward_backward_input=body, model_id="m", seq_id=3)
    )
    message.forward_only = forward_only
    return read_pass(MESSAGES["ForwardBackwardRequest"].FromString(message.SerializeToString()))


def datum(tokens: list[int], **inputs: Any) -> types.Datum:
    return types.Datum(model_input=types.ModelInput.from_ints(tokens), loss_fn_inputs=inputs)


def test_rows_arrive_as_they_were_sent() -> None:
    row = datum([1, 2, 3], target_tokens=[2, 3, 4], weights=[0.5, 0.0, 1.0])
    got = as_sent([row], forward_only=True, clip_low_threshold=0.7)
    assert (got.model_id, got.seq_id, got.loss_fn, got.forward_only) == ("m", 3, "cross_entropy", True)
    assert got.loss_config == {"clip_low_threshold": 0.7}
    assert got.data[0].tokens.tolist() == [1, 2, 3]
    assert got.data[0].loss_inputs["target_tokens"].tolist() == [2, 3, 4]
    assert got.data[0].loss_inputs["weights"].tolist() == [0.5, 0.0, 1.0]


def test_several_targets_come_sparse_and_are_laid_out() -> None:
    """The client packs 2-D targets as CSR by itself: who reads `dense` alone sees a row without targets."""
    targets, weights = torch.zeros(4, 6, dtype=torch.int64), torch.zeros(4, 6)
    targets[1, 2], targets[3, 5], weights[1, 2], weights[3, 5] = 9, 11, 0.25, 0.5
    sparse, dense = (
        datum([1, 2, 3, 4], target_tokens=targets, weights=weights),
        datum([7], target_tokens=[8], weights=[1.0]),
    )
    assert sparse.loss_fn_inputs["target_tokens"].sparse_crow_indices is not None
    got = as_sent([sparse, dense])
    assert got.columns == (6, None)
    assert np.array_equal(got.data[0].loss_inputs["target_tokens"], targets)
    assert np.array_equal(got.data[0].loss_inputs["weights"], weights)
    assert got.data[1].loss_inputs["target_tokens"].tolist() == [[8, 0, 0, 0, 0, 0]]
    assert got.data[1].loss_inputs["weights"].tolist() == [[1, 0, 0, 0, 0, 0]]


JSON_ROW = {
    "model_input": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}, {"tokens": [3]}]},
    "loss_fn_inputs": {
        "target_tokens": {"data": [2, 3, 4], "dtype": "int64", "shape": [3]},
        "weights": {"data": [0.5, 0, 1], "dtype": "float32"},
    },
}


def json_pass(row: Any) -> Pass:
    body = {"model_id": "m", "seq_id": 1, "forward_input": {"data": [row], "loss_fn": "cross_entropy"}}
    return read_json_pass(body, field="forward_input", forward_only=True)


def test_json_rows_are_the_same_rows() -> None:
    got = json_pass(JSON_ROW)
    want = as_sent([datum([1, 2, 3], target_tokens=[2, 3, 4], weights=[0.5, 0.0, 1.0])])
    assert np.array_equal(got.data[0].tokens, want.data[0].tokens)
    for name, values in want.data[0].loss_inputs.items():
        assert np.array_equal(got.data[0].loss_inputs[name], values)


WRONG = {
    "another length": {"weights": {"data": [1.0], "dtype": "float32", "shape": [3]}},
    "a shape of text": {"weights": {"data": [1.0], "dtype": "float32", "shape": "3"}},
    "an endless shape": {"weights": {"data": [], "dtype": "float32", "shape": [2**40, 2**40],
                                     "sparse_crow_indices": [0], "sparse_col_indices": []}},
    "indices outside": {"weights": {"data": [1.0], "dtype": "float32", "shape": [3, 2],
                                    "sparse_crow_indices": [0, 1, 1, 1], "sparse_col_indices": [2]}},
    "words": {"weights": {"data": ["a", "b", "c"], "dtype": "float32"}},
    "an unknown input": {"mask": {"data": [1, 1, 1], "dtype": "float32"}},
    "a huge token": {"target_tokens": {"data": [2**40, 1, 1], "dtype": "int64"}},
    "float tokens": {"target_tokens": {"data": [1.5, 1, 1], "dtype": "float32"}},
    "float64": {"weights": {"data": [1, 1, 1], "dtype": "float64"}},
    "tokens with fractions": {"target_tokens": {"data": [6.7, 1, 1], "dtype": "int64"}},
    "tokens beyond 64 bits": {"target_tokens": {"data": [2**63, 1, 1], "dtype": "int64"}},
    "tokens without an end": {"target_tokens": {"data": [float("inf"), 1, 1], "dtype": "int64"}},
    "digits": {"target_tokens": {"data": ["1", "2", "3"], "dtype": "int64"}},
    "a table of row starts": {"weights": {"data": [1.0], "dtype": "float32", "shape": [1, 2],
                                          "sparse_crow_indices": [[[0], [1]]], "sparse_col_indices": [[5]]}},
    "starts with fractions": {"weights": {"data": [1.0], "dtype": "float32", "shape": [1, 2],
                                          "sparse_crow_indices": [0, 1.5], "sparse_col_indices": [0]}},
    "nothing 2**31 wide": {"target_tokens": {"data": [], "dtype": "int64", "shape": [0, 2**31]}},
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_rows_that_cannot_be_meant_are_refused_by_number(wrong: str) -> None:
    row = {**JSON_ROW, "loss_fn_inputs": {**JSON_ROW["loss_fn_inputs"], **WRONG[wrong]}}
    with pytest.raises(DataError, match="row 0"):
        json_pass(row)


def test_a_row_without_tokens_is_refused() -> None:
    """A pass over no tokens has no share of its group's time: dividing by it ended the thread that does all passes."""
    empty = {"loss_fn_inputs": {name: {"data": [], "dtype": kind} for name, kind in
                                (("target_tokens", "int64"), ("weights", "float32"))}}  # fmt: skip
    for chunks in ([], [{"tokens": []}]):
        with pytest.raises(DataError, match="row 0: it has no tokens"):
            json_pass({"model_input": {"chunks": chunks}, **empty})
    with pytest.raises(DataError, match="row 1: it has no tokens"):
        as_sent([datum([1], target_tokens=[2], weights=[1.0]), datum([], target_tokens=[], weights=[])])


@pytest.mark.parametrize("config", [5, True, False, [1], "weights", ""])
def test_settings_of_a_loss_are_an_object(config: Any) -> None:
    """Where they were something else, all passes of a group failed with the one."""
    body = {"model_id": "m", "forward_input": {"data": [JSON_ROW], "loss_fn": "ppo", "loss_fn_config": config}}
    with pytest.raises(DataError, match="loss_fn_config is"):
        read_json_pass(body, field="forward_input", forward_only=True)


def json_rows(*targets: Any) -> Pass:
    """A row of one token for each of these tensors of targets."""
    rows = [{"model_input": {"chunks": [{"tokens": [1] * length}]}, "loss_fn_inputs": {"target_tokens": each}}
            for length, each in targets]  # fmt: skip
    body = {"model_id": "m", "forward_input": {"data": rows, "loss_fn": "cross_entropy"}}
    return read_json_pass(body, field="forward_input", forward_only=True)


def test_a_small_body_is_not_laid_out_over_all_memory() -> None:
    """A row of a token and 100,000 targets makes every other row as wide: this one would take 40 GB."""
    plain = (100_000, {"data": [2] * 100_000, "dtype": "int64"})
    wide = (1, {"data": [2] * 100_000, "dtype": "int64", "shape": [1, 100_000]})
    with pytest.raises(DataError, match="100,001 tokens with 100,000 targets each"):
        json_rows(wide, plain)
    with pytest.raises(DataError, match="2,147,483,647 targets each"):
        json_rows((1, {"data": [], "dtype": "int64", "shape": [0, 2**31 - 1]}), (3, {**plain[1], "data": [2, 2, 2]}))


@pytest.mark.slow
def test_sparse_tensors_are_bounded_together() -> None:
    """Each may be as large as is allowed, and cost a body of a hundred of them nothing."""
    empty = {"data": [], "dtype": "int64", "shape": [1, 30_000_000],
             "sparse_crow_indices": [0, 0], "sparse_col_indices": []}  # fmt: skip
    with pytest.raises(DataError, match="row 2, target_tokens: a sparse tensor"):
        json_rows(*[(1, empty)] * 3)


def test_indices_may_be_nested() -> None:
    """A list in a list had no length to compare, and was the service's own failure."""
    nested = {"data": [5], "dtype": "int64", "shape": [1, 2], "sparse_crow_indices": [[0, 1]],
              "sparse_col_indices": [[1]]}  # fmt: skip
    assert json_rows((1, nested)).data[0].loss_inputs["target_tokens"].tolist() == [[0, 5]]
    asked = read_targets(nested, 2)
    assert asked.crow is not None
    assert asked.crow.tolist() == [0, 1]
    assert asked.ids.tolist() == [[5]]


def test_values_that_are_not_finite_are_refused() -> None:
    """One NaN weight makes every gradient of the step NaN."""
    with pytest.raises(DataError, match="weights holds values that are not finite"):
        as_sent([datum([1], target_tokens=[2], weights=[float("nan")])])


def test_pictures_are_refused_by_name() -> None:
    chunk = {"type": "image", "data": "", "format": "png"}
    with pytest.raises(DataError, match="image"):
        json_pass({**JSON_ROW, "model_input": {"chunks": [chunk]}})


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.sampled_from([None, 2, 3])), min_size=1, max_size=6))
def test_results_read_back_as_they_were(shapes: list[tuple[int, int | None]]) -> None:
    """Offsets count bytes, and rows of other shapes stand in other records; their order must not change."""
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=(n,) if k is None else (n, k)).astype(np.float32) for n, k in shapes]
    reply = pass_reply(rows, {"loss:sum": 1.5})
    got: Any = deserialize_proto_response(reply, types.ForwardBackwardOutput)
    as_json = pass_as_json(reply)
    assert got.metrics == as_json["metrics"] == {"loss:sum": 1.5}
    for row, output, plain in zip(rows, got.loss_fn_outputs, as_json["loss_fn_outputs"], strict=True):
        assert output["logprobs"].shape == plain["logprobs"]["shape"] == list(row.shape)
        assert output["logprobs"].data == plain["logprobs"]["data"] == row.reshape(-1).tolist()


def test_samples_read_back_as_they_were() -> None:
    sequence = SampledSequence(np.array([4, 5], np.int32), np.array([-1.0, -2.0], np.float32), "stop")
    pairs = (np.array([[0, 0], [7, 9]], np.int32), np.array([[-99999, -99999], [-0.5, -1.5]], np.float32))
    scores = Scores(np.array([np.nan, -3.0], np.float32), prompt_likeliest=pairs, samples_likeliest=[pairs])
    reply = sample_reply([sequence], scores)
    got: Any = deserialize_proto_response(reply, types.SampleResponse)
    assert (got.sequences[0].tokens, got.sequences[0].logprobs, got.sequences[0].stop_reason) == (
        [4, 5],
        [-1, -2],
        "stop",
    )
    likeliest = [None, [(7, -0.5), (9, -1.5)]]
    assert got.prompt_logprobs == [None, -3.0]
    assert got.topk_prompt_logprobs == got.sequences[0].topk_logprobs == likeliest
    assert sample_as_json(reply) == {
        "type": "sample", "prompt_logprobs": [None, -3.0], "topk_prompt_logprobs": likeliest,
        "sequences": [{"stop_reason": "stop", "tokens": [4, 5], "logprobs": [-1.0, -2.0], "topk_logprobs": likeliest}],
    }  # fmt: skip


REFUSED = {
    "load_optimizer_state": ("load_weights", {"model_id": "m", "path": "p", "load_optimizer_state": True}),
    "rank": ("create_model", {"session_id": "s", "model_seq_id": 0, "base_model": "b", "lora_config": {"rank": 0}}),
    "10000": ("create_model", {"session_id": "s", "model_seq_id": 0, "base_model": "b",
                               "lora_config": {"rank": 10000}}),
    "optimizer_config": ("create_model", {"session_id": "s", "model_seq_id": 0, "base_model": "b",
                                          "optimizer_config": {"type": "dimuon", "version": 1}}),
    "path": ("save_weights", {"model_id": "m", "path": "../../x"}),
    "ttl_seconds": ("save_weights", {"model_id": "m", "path": "x", "ttl_seconds": 5}),
    "amsgrad": ("optim_step", {"model_id": "m", "adam_params": {"amsgrad": True}}),
    "beta1": ("optim_step", {"model_id": "m", "adam_params": {"beta1": 1.0}}),
}  # fmt: skip


@pytest.mark.parametrize("named", REFUSED)
def test_what_is_not_known_or_not_possible_is_refused_by_name(named: str) -> None:
    """Servers that ignored `load_optimizer_state` loaded weights without the optimizer, and nobody saw it."""
    kind, body = REFUSED[named]
    with pytest.raises(DataError, match=named):
        read_request(kind, orjson.loads(orjson.dumps(body)))


def test_packed_bodies_are_bounded_and_whole() -> None:
    """A few bytes may claim gigabytes, and half a body unpacks without an error."""
    packed = zstandard.ZstdCompressor().compress(b"a" * 100_000)
    assert bodies._unpack(packed, 100_000) == b"a" * 100_000
    for data, limit, status in ((packed, 99_999, 413), (packed[:-3], 10**6, 400), (b"no zstd", 10**6, 400)):
        with pytest.raises(bodies.Refusal) as refusal:
            bodies._unpack(data, limit)
        assert refusal.value.status == status
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(b"b" * 5000)
    assert bodies._unpack(unsized, 5000) == b"b" * 5000
