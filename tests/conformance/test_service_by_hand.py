"""The service over plain HTTP, as another language's client or nobody's client at all would use it."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import zstandard

from tests.service_rig import Service, finish

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def api(service: Service) -> Iterator[httpx.Client]:
    with service.api() as client:
        yield client


def new_session(api: httpx.Client) -> str:
    body = {"tags": [], "user_metadata": None, "sdk_version": "0.15.0", "type": "create_session"}
    return api.post("create_session", json=body).json()["session_id"]


def new_model(api: httpx.Client, service: Service, *, number: int = 0, session: str | None = None) -> str:
    session = session or new_session(api)
    lora = {"rank": 3, "seed": 5}
    body = {"session_id": session, "model_seq_id": number, "base_model": str(service.base), "lora_config": lora}
    return finish(api, api.post("create_model", json=body))["model_id"]


def pass_body(model: str, seq: int | None, *, weight: float = 1.0, **more: Any) -> dict[str, Any]:
    row = {
        "model_input": {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]},
        "loss_fn_inputs": {
            "target_tokens": {"data": [6, 7, 8], "dtype": "int64", "shape": [3]},
            "weights": {"data": [weight] * 3, "dtype": "float32", "shape": [3]},
        },
    }
    return {
        "model_id": model,
        "seq_id": seq,
        "forward_backward_input": {"data": [row], "loss_fn": "cross_entropy"},
        **more,
    }


def step_body(model: str, seq: int | None) -> dict[str, Any]:
    return {"model_id": model, "seq_id": seq, "adam_params": {"learning_rate": 0.01}, "type": "optim_step"}


def test_operations_sent_in_any_order_are_done_in_theirs(api: httpx.Client, service: Service) -> None:
    straight, mixed = new_model(api, service), new_model(api, service)
    sent: dict[str, dict[int, httpx.Response]] = {straight: {}, mixed: {}}
    for model, order in ((straight, (1, 2, 3, 4)), (mixed, (4, 2, 3, 1))):
        for seq in order:
            kind, body = ("forward_backward", pass_body) if seq % 2 else ("optim_step", step_body)
            sent[model][seq] = api.post(kind, json=body(model, seq))
    results = [[finish(api, sent[model][seq]) for seq in (1, 2, 3, 4)] for model in (straight, mixed)]
    assert results[0] == results[1]
    assert results[0][0] != results[0][2]


def test_a_repeat_gets_the_first_answer_and_does_nothing(api: httpx.Client, service: Service) -> None:
    """Clients repeat with another idempotency key; a step that is done twice is another model."""
    model = new_model(api, service)
    session = model.split(":")[0]
    finish(api, api.post("forward_backward", json=pass_body(model, 1)))
    answers = [
        api.post("optim_step", json=step_body(model, 2), headers={"X-Idempotency-Key": str(i)}) for i in range(3)
    ]
    assert len({answer.json()["request_id"] for answer in answers}) == 1
    results = [finish(api, answer)["metrics"] for answer in answers]
    assert results[0] == results[1] == results[2]
    assert results[0]["step"] == 1
    assert new_model(api, service, session=session) == model
    assert api.post("save_weights", json={"model_id": model, "path": "x", "seq_id": 2}).status_code == 409
    finish(api, api.post("forward_backward", json=pass_body(model, 3)))
    assert finish(api, api.post("optim_step", json=step_body(model, 4)))["metrics"]["step"] == 2


def test_results_are_held_not_polled_for(api: httpx.Client, service: Service) -> None:
    """A question after something that waits is answered when it has come: the client never sleeps between questions."""
    model = new_model(api, service)
    late = api.post("forward_backward", json=pass_body(model, 2)).json()["request_id"]
    threading.Timer(1.0, lambda: api.post("forward_backward", json=pass_body(model, 1))).start()
    began = time.monotonic()
    answer = api.post("retrieve_future", json={"request_id": late})
    assert answer.status_code == 200
    assert 0.9 < time.monotonic() - began < 20


def test_operations_without_a_sequence_id_stand_at_the_end(api: httpx.Client, service: Service) -> None:
    model = new_model(api, service)
    finish(api, api.post("forward_backward", json=pass_body(model, None)))
    assert finish(api, api.post("optim_step", json=step_body(model, None)))["metrics"]["grad_norm"] > 0
    assert finish(api, api.post("unload_model", json={"model_id": model, "type": "unload_model"}))["model_id"] == model
    assert finish(api, api.post("optim_step", json=step_body(model, None)))["category"] == "user"


def test_accepted_at_once_what_is_wrong_fails_later(api: httpx.Client, service: Service) -> None:
    model = new_model(api, service)
    bad = pass_body(model, 1, colour="red")
    answer = finish(api, api.post("forward_backward", json=bad))
    assert answer["category"] == "user"
    assert "colour" in answer["error"]
    assert "metrics" in finish(api, api.post("forward_backward", json=pass_body(model, 2)))


BROKEN: dict[str, tuple[dict[str, str], bytes, int]] = {
    "no JSON": ({"content-type": "application/json"}, b"{", 400),
    "a list": ({"content-type": "application/json"}, b"[]", 400),
    "no model": ({"content-type": "application/json"}, b"{}", 422),
    "a model that is not there": ({"content-type": "application/json"}, b'{"model_id": "x:train:0", "seq_id": 1}', 404),
    "a negative id": ({"content-type": "application/json"}, b'{"model_id": "MODEL", "seq_id": -1}', 422),
    "no protobuf": ({"content-type": "application/x-protobuf"}, b"\xff\xff\xff\xff", 400),
    "no zstd": ({"content-encoding": "zstd"}, b"{}", 400),
    "half a zstd": ({"content-encoding": "zstd"}, zstandard.compress(b'{"model_id": "MODEL"}' * 20)[:-4], 400),
    "gzip": ({"content-encoding": "gzip"}, b"{}", 415),
    "a zstd of a gigabyte": ({"content-encoding": "zstd"}, zstandard.compress(bytes(10**9)), 413),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_broken_bodies_are_refused_and_leave_no_hole(what: str, api: httpx.Client, service: Service) -> None:
    model = new_model(api, service)
    headers, body, status = BROKEN[what]
    answer = api.post("forward_backward", content=body.replace(b"MODEL", model.encode()), headers=headers)
    assert answer.status_code == status, answer.text
    assert answer.json()["detail"]
    assert "metrics" in finish(api, api.post("forward_backward", json=pass_body(model, 1)))


def test_a_body_of_a_gigabyte_is_refused_while_it_comes(api: httpx.Client) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(1000):
            yield bytes(10**6)

    # The connection is closed on the rest of it, which some platforms tell first.
    with contextlib.suppress(httpx.TransportError):
        assert api.post("forward_backward", content=endless()).status_code == 413
    assert api.get("healthz").status_code == 200


@pytest.mark.parametrize("key", ["", "sk-abc", "eyJhbGciOi"])
def test_keys_of_another_kind_are_refused(key: str, service: Service) -> None:
    with service.api(key) as api:
        assert api.post("client/config", json={"sdk_version": "0.38.0"}).status_code == 401
        assert api.get("sessions").status_code == 401
        assert api.get("healthz").status_code == 200


def test_packed_bodies_are_read(api: httpx.Client, service: Service) -> None:
    import orjson

    model = new_model(api, service)
    body = zstandard.compress(orjson.dumps(pass_body(model, 1)))
    headers = {"content-encoding": "zstd", "content-type": "application/json"}
    assert "metrics" in finish(api, api.post("forward_backward", content=body, headers=headers))


def one_step(api: httpx.Client, model: str, seq: int) -> dict[str, Any]:
    finish(api, api.post("forward_backward", json=pass_body(model, seq)))
    return finish(api, api.post("optim_step", json=step_body(model, seq + 1)))


def test_steps_that_wait_together_are_each_their_models_own(api: httpx.Client, service: Service) -> None:
    """They are written down together: one that is refused must not take the others with it, nor change its model."""

    def step_of(model: str, rate: float) -> httpx.Response:
        return api.post("optim_step", json={**step_body(model, 2), "adam_params": {"learning_rate": rate}})

    def loss_of(model: str, seq: int) -> float:
        return finish(api, api.post("forward_backward", json=pass_body(model, seq, forward_only=True)))["metrics"][
            "loss:sum"
        ]

    models = [new_model(api, service) for _ in range(4)]
    alone, rates = new_model(api, service), (0.01, 0.02, -1.0, 0.03)
    for model in (alone, *models):
        finish(api, api.post("forward_backward", json=pass_body(model, 1)))
    want = finish(api, step_of(alone, 0.02))["metrics"]
    # Sent while something is done that takes longer than to send them.
    long = pass_body(alone, 3)
    row = long["forward_backward_input"]["data"][0]
    row["model_input"]["chunks"][0]["tokens"] = [5] * 2000
    for name, value in (("target_tokens", 6), ("weights", 1.0)):
        row["loss_fn_inputs"][name] |= {"data": [value] * 2000, "shape": [2000]}
    first = api.post("forward_backward", json=long)
    sent = [step_of(model, rate) for model, rate in zip(models, rates, strict=True)]
    finish(api, first)
    answers = [finish(api, each) for each in sent]
    assert answers[2]["category"] == "user"
    assert [answers[place]["metrics"] for place in (0, 1, 3)] == [want] * 3
    losses = [loss_of(model, 3) for model in models]
    assert len(set(losses)) == 4
    assert losses[1] == loss_of(alone, 4)


def test_a_damaged_snapshot_costs_time_alone_and_a_copied_folder_goes_on(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """The newest snapshot is cut in half, the folder copied elsewhere: the next steps are the same."""
    first = Service(tiny_folder("llama-tied"), tmp_path / "here", "snapshot_seconds=0.001")
    with first, first.api() as api:
        model = new_model(api, first)
        for seq in (1, 3, 5, 7):
            one_step(api, model, seq)
        first.kill()
        shutil.copytree(first.state, tmp_path / "there")
        first.start()
        want = [one_step(api, model, seq) for seq in (9, 11)]
        saved = finish(api, api.post("save_weights", json={"model_id": model, "path": "end", "seq_id": 13}))["path"]
    snapshots = sorted((tmp_path / "there" / "snapshots").glob("*/kept/seq-*"))
    assert len(snapshots) == 2
    adapter = snapshots[-1] / "adapter" / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[: adapter.stat().st_size // 2])
    second = Service(tiny_folder("llama-tied"), tmp_path / "there")
    with second, second.api() as api:
        assert [one_step(api, model, seq) for seq in (9, 11)] == want
        finish(api, api.post("save_weights", json={"model_id": model, "path": "end", "seq_id": 13}))
    name = saved.removeprefix("tinker://").replace(":", "-")
    for file in ("adapter/adapter_model.safetensors", "state/optimizer.safetensors"):
        mine, theirs = ((root / "runs" / name / file).read_bytes() for root in (first.state, second.state))
        assert mine == theirs


def test_another_base_is_refused_by_a_state_folder(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    with Service(tiny_folder("llama-tied"), tmp_path / "state"):
        pass
    with pytest.raises(AssertionError, match="another base"):
        Service(tiny_folder("llama"), tmp_path / "state").start()


def test_a_key_has_its_number_of_models(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """One tenant's loop must not fill the memory and the disk of all; what is unloaded makes room."""
    with Service(tiny_folder("llama-tied"), tmp_path / "state", "max_models_per_key=2") as own, own.api() as client:
        session = new_session(client)
        models = [new_model(client, own, number=number, session=session) for number in range(2)]
        body = {"session_id": session, "model_seq_id": 2, "base_model": str(own.base), "lora_config": {"rank": 3}}
        refused = client.post("create_model", json=body)
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) > 0
        finish(client, client.post("unload_model", json={"model_id": models[0], "type": "unload_model"}))
        assert new_model(client, own, number=2, session=session)
