"""Bodies that no client would send, in JSON and protobuf: refused, or failed as the user's fault; never a 5xx."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from model_foundry.client.wire import pass_body
from model_foundry.types import Datum
from tests.service_rig import Service, finish

pytestmark = pytest.mark.slow
PROTOBUF = {"Content-Type": "application/x-protobuf"}
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20)
    | st.sampled_from(["tinker://a/weights/b", "../..", "weights", "MODEL", "SESSION", 2**31, 2**63, -1, 1e308]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
EMPTY = {
    "model_input": {"chunks": []},
    "loss_fn_inputs": {
        "target_tokens": {"data": [], "dtype": "int64"}, "weights": {"data": [], "dtype": "float32"},
    },
}  # fmt: skip
LENGTHY = settings(
    max_examples=3000,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    database=None,
    phases=[Phase.generate],  # an example may wait for an operation: making it smaller took longer than all tests
)
SHORT = settings(LENGTHY, max_examples=120)


@pytest.fixture(scope="module")
def api(service: Service) -> Iterator[httpx.Client]:
    with service.api("tml-fuzz") as client:
        yield client


@pytest.fixture(scope="module")
def model(api: httpx.Client, service: Service) -> str:
    session = api.post("create_session", json={}).json()["session_id"]
    body = {"session_id": session, "model_seq_id": 0, "base_model": str(service.base), "lora_config": {"rank": 1}}
    return finish(api, api.post("create_model", json=body))["model_id"]


def seeds(model: str, base: str) -> dict[str, dict[str, Any]]:
    """A body that is right, of every route that takes one."""
    session = model.split(":")[0]
    row = {
        "model_input": {"chunks": [{"type": "encoded_text", "tokens": [5, 6]}]},
        "loss_fn_inputs": {"target_tokens": {"data": [6, 7], "dtype": "int64", "shape": [2]},
                           "weights": {"data": [1.0, 1.0], "dtype": "float32", "shape": [2]}},
    }  # fmt: skip
    params = {"max_tokens": 2, "seed": 1, "stop": ["a"], "temperature": 1.0, "top_k": 3, "top_p": 0.5}
    sample = {"prompt": {"chunks": [{"type": "encoded_text", "tokens": [5]}]}, "num_samples": 1, "base_model": base,
              "sampling_params": params, "prompt_logprobs": True}  # fmt: skip
    forward = {"data": [row], "loss_fn": "cross_entropy", "loss_fn_config": {"beta": 0.1}}
    return {
        "create_session": {"tags": ["x"], "user_metadata": {"a": "b"}, "sdk_version": "0.38.0"},
        "session_heartbeat": {"session_id": session},
        "create_model": {"session_id": session, "model_seq_id": 0, "base_model": base, "lora_config": {"rank": 1}},
        "get_info": {"model_id": model},
        "forward_backward": {"model_id": model, "forward_backward_input": forward},
        "forward": {"model_id": model, "forward_input": forward},
        "optim_step": {"model_id": model, "adam_params": {"learning_rate": 0.0, "beta1": 0.9, "eps": 1e-8}},
        "save_weights": {"model_id": model, "path": "x", "ttl_seconds": 3600, "overwrite": True},
        "save_weights_for_sampler": {"model_id": model, "path": "x"},
        "save_weights_external": {"model_id": model, "path": "x"},
        "load_weights": {"model_id": model, "path": f"tinker://{model}/weights/x", "optimizer": True},
        "weights_info": {"tinker_path": f"tinker://{model}/weights/x"},
        "create_sampling_session": {"session_id": session, "sampling_session_seq_id": 0, "base_model": base},
        "join_sampling_session": {"sampling_session_id": f"{session}:sample:0"},
        "asample": sample,
        "retrieve_futures": {"target": {"type": "sampling_session", "sampling_session_id": f"{session}:sample:0"},
                             "prev_cursor": 0, "timeout": 0},
        "cancel_future": {"request_id": f"{model}:0"},
        "copy_weights": {"session_id": session, "model_seq_id": 9, "source_path": f"tinker://{model}/weights/x"},
        "sessions/search": {"display_name": "x", "limit": 3, "statuses": [{"type": "active"}]},
        "telemetry": {"events": []},
        "client/config": {"sdk_version": "0.38.0"},
        "auth/token": {},
        f"sessions/{session}x/finish": {"reason": {"type": "success"}},
    }  # fmt: skip


def mutated(body: Any, value: Any, where: random.Random) -> Any:
    """The body with one place replaced, dropped, or given a key that nobody knows."""
    copy = json.loads(json.dumps(body))
    places = list(_places(copy))
    if not places:
        return {"key": value}
    holder, key = where.choice(places)
    action = where.choice(["replace", "replace", "drop", "add"])
    if action == "replace":
        holder[key] = value
    elif action == "drop":
        del holder[key]
    elif isinstance(holder, dict):
        holder["nobody_knows"] = value
    else:
        holder.append(value)
    return copy


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict | list):
        for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield value, key
            yield from _places(inner)


def check_answer(api: httpx.Client, answer: httpx.Response) -> None:
    assert answer.status_code < 500, (answer.request.url, answer.request.content[:500], answer.text)
    if answer.status_code == 200 and "request_id" in (values := answer.json()) and '"seq_id"' not in _sent(answer):
        result = api.post("retrieve_future", json={"request_id": values["request_id"]})
        assert result.status_code in (200, 408), result.text
        assert result.json().get("category", "user") == "user", (answer.request.content[:500], result.json())


def _sent(answer: httpx.Response) -> str:
    return answer.request.content.decode(errors="replace")


def fuzz_json(api: httpx.Client, service: Service, model: str, level: settings) -> None:
    bodies = seeds(model, str(service.base))

    @level
    @given(path=st.sampled_from(sorted(bodies)), value=JSON_VALUES, seed=st.integers(0, 2**32))
    def fuzz(path: str, value: Any, seed: int) -> None:
        text = json.dumps(mutated(bodies[path], value, random.Random(seed)))
        answer = api.post(path, content=text.encode(), headers={"Content-Type": "application/json"})
        check_answer(api, answer)

    for path, body in bodies.items():
        answer = api.post(path, json=body)
        # The two that name nothing: a session that is not there, and an operation that is no sample.
        assert answer.status_code < 300 or "x/finish" in path or path == "cancel_future", (path, answer.text)
        if answer.status_code == 200 and "request_id" in answer.json():
            # What comes after it may want what it makes.
            finish(api, answer)
    # What no chance finds: rows of nothing, which ended the thread that does all operations.
    for kind in ("forward_backward", "forward"):
        nothing = {"data": [EMPTY], "loss_fn": "cross_entropy"}
        check_answer(api, api.post(kind, json={"model_id": model, f"{kind}_input": nothing}))
    fuzz()
    check_alive(api, str(service.base))


def check_alive(api: httpx.Client, base: str) -> None:
    """Operations are still done: where nobody is left who does them, a question after one is only held, as a 408."""
    assert api.get("healthz").status_code == 200
    done = finish(api, api.post("asample", json=seeds("", base)["asample"]))
    assert len(done["sequences"]) == 1


def fuzz_protobuf(api: httpx.Client, base: str, model: str, level: settings) -> None:
    import numpy as np

    rows = [Datum(np.array([5, 6], np.int32), {"target_tokens": np.array([6, 7]), "weights": np.ones(2, np.float32)})]
    right = pass_body(model, 0, rows, loss_fn="cross_entropy", config={"beta": 0.1}, forward_only=True)

    @level
    @given(
        cut=st.integers(0, len(right)),
        junk=st.binary(max_size=30),
        flips=st.lists(st.tuples(st.integers(0, len(right) - 1), st.integers(1, 255)), max_size=4),
    )
    def fuzz(cut: int, junk: bytes, flips: list[tuple[int, int]]) -> None:
        body = bytearray(right)
        for place, bits in flips:
            body[place] ^= bits
        answer = api.post("forward_backward", content=bytes(body[:cut]) + junk + bytes(body[cut:]), headers=PROTOBUF)
        assert answer.status_code < 500, (bytes(body), answer.text)

    fuzz()
    check_alive(api, base)


def test_json(api: httpx.Client, service: Service, model: str) -> None:
    fuzz_json(api, service, model, SHORT)


def test_protobuf(api: httpx.Client, service: Service, model: str) -> None:
    fuzz_protobuf(api, str(service.base), model, SHORT)


@pytest.mark.prove
@pytest.mark.timeout(3600)
def test_json_at_length(api: httpx.Client, service: Service, model: str) -> None:
    fuzz_json(api, service, model, LENGTHY)


@pytest.mark.prove
@pytest.mark.timeout(3600)
def test_protobuf_at_length(api: httpx.Client, service: Service, model: str) -> None:
    fuzz_protobuf(api, str(service.base), model, LENGTHY)
