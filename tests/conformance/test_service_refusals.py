"""Requests that the service took for something else, lost, or answered with its own failure."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from model_foundry.service import copying
from model_foundry.service.embedded import embedded
from model_foundry.service.front import Front
from tests.conformance.test_more_routes import new_sampler, sample_body
from tests.conformance.test_service_by_hand import one_step, pass_body, step_body
from tests.service_rig import KEY, Service, finish

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def api(service: Service) -> Iterator[httpx.Client]:
    with service.api("tml-refusals") as client:
        yield client


def new_session(api: httpx.Client) -> str:
    return api.post("create_session", json={}).json()["session_id"]


@pytest.fixture(scope="module")
def model(api: httpx.Client, service: Service) -> str:
    body = {"session_id": new_session(api), "model_seq_id": 0, "base_model": str(service.base),
            "lora_config": {"rank": 1}}  # fmt: skip
    return finish(api, api.post("create_model", json=body))["model_id"]


@pytest.fixture(scope="module")
def saved(api: httpx.Client, model: str) -> str:
    return finish(api, api.post("save_weights", json={"model_id": model, "path": "kept"}))["path"]


def test_samples_of_weights_that_are_no_numbers_fail_and_others_do_not(api: httpx.Client, service: Service) -> None:
    """They were answered with whatever token a comparison with NaN left."""
    base, lora = str(service.base), {"rank": 1}
    body = {"session_id": new_session(api), "model_seq_id": 0, "base_model": base, "lora_config": lora}
    broken = finish(api, api.post("create_model", json=body))["model_id"]
    one_step(api, broken, 1)
    finish(api, api.post("forward_backward", json=pass_body(broken, 3)))
    finish(api, api.post("optim_step", json={**step_body(broken, 4), "adam_params": {"learning_rate": 1e38}}))
    path = finish(api, api.post("save_weights_for_sampler", json={"model_id": broken, "path": "x"}))["path"]
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]}
    asked = {"prompt": prompt, "num_samples": 2, "sampling_params": {"max_tokens": 5, "stop": []}}
    waiting = [api.post("asample", json={**asked, **of}) for of in ({"model_path": path}, {"base_model": base})]
    failed, done = (finish(api, each) for each in waiting)
    assert "no numbers" in failed["error"], failed
    assert failed["category"] == "user"
    assert len(done["sequences"]) == 2


def test_a_number_that_a_copy_has_makes_no_model(api: httpx.Client, service: Service, saved: str) -> None:
    """It was said to be the disk's fault, and clients tried again for ever."""
    session = new_session(api)
    body = {"session_id": session, "model_seq_id": 3}
    assert api.post("copy_weights", json={**body, "source_path": saved}).status_code == 200
    made = {"base_model": str(service.base), "lora_config": {"rank": 1}}
    for path, more in (("create_model", made), ("load_weights", {"path": saved, "optimizer": True})):
        answer = api.post(path, json={**body, **more})
        assert (answer.status_code, answer.headers.get("x-should-retry")) == (409, "false"), answer.text
    # A number that a model has makes no copy, and an operation on a copy is not the one that would have made it.
    finish(api, api.post("create_model", json={**body, **made, "model_seq_id": 4}))
    assert api.post("copy_weights", json={**body, "source_path": saved, "model_seq_id": 4}).status_code == 409
    step = api.post("optim_step", json={"model_id": f"{session}:train:3", "adam_params": {}})
    assert step.json()["request_id"] == f"{session}:train:3:1"
    assert finish(api, step)["category"] == "user"


def test_where_a_copy_goes_is_said_once(api: httpx.Client, saved: str) -> None:
    session = new_session(api)
    for body in (
        {"session_id": session, "model_seq_id": 0, "destination_project_id": "p"},
        {"model_seq_id": 0, "destination_project_id": "p"},
        {"session_id": session},
    ):
        assert api.post("copy_weights", json={**body, "source_path": saved}).status_code == 422, body


def test_a_damaged_checkpoint_is_not_copied(api: httpx.Client, service: Service, model: str) -> None:
    path = finish(api, api.post("save_weights", json={"model_id": model, "path": "damaged"}))["path"]
    folder = service.state / "runs" / path.removeprefix("tinker://").replace(":", "-")
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"damaged")
    assert api.post("copy_weights", json={"source_path": path}).status_code == 410


WRONG_SEARCHES = {
    "a number of reasons": {"statuses": [{"type": "client_finished", "reasons": 5}]},
    "a text of reasons": {"statuses": [{"type": "client_finished", "reasons": "unsuccessful"}]},
    "reasons of what is not over": {"statuses": [{"type": "active", "reasons": ["success"]}]},
    "another status": {"statuses": [{"type": "over"}]},
}


@pytest.mark.parametrize("wrong", WRONG_SEARCHES)
def test_searches_that_mean_nothing_are_refused(wrong: str, api: httpx.Client) -> None:
    assert api.post("sessions/search", json=WRONG_SEARCHES[wrong]).status_code == 422


def nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


def test_a_session_holds_what_can_be_listed(service: Service) -> None:
    """One that could not made every listing and search of its key a failure, until the end of days."""
    with service.api("tml-listing") as api:
        session = new_session(api)
        for facts in ({"user_metadata": ["a"]}, {"tags": [nested(400)]},
                      {"display_name": nested(400)}, {"project_id": nested(400)}):  # fmt: skip
            assert api.post("create_session", json=facts).status_code == 422, facts
        assert api.put(f"sessions/{session}/project", json={"project_id": nested(400)}).status_code == 422
        reason = {"reason": {"type": "success", "more": nested(400)}}
        assert api.post(f"sessions/{session}/finish", json=reason).status_code == 422
        # The SDK lets any JSON be a value; what is no text is kept as the text that it is written as.
        body = {"session_id": session, "model_seq_id": 0, "base_model": str(service.base), "lora_config": {"rank": 1}}
        facts = {"a": "b", "lr": 1e-4, "deep": nested(400)}
        open_session = api.post("create_session", json={"user_metadata": facts}).json()["session_id"]
        found = api.get(f"sessions/{open_session}").json()["user_metadata"]
        assert found == {"a": "b", "lr": "0.0001", "deep": json.dumps(nested(400))}
        body["session_id"] = open_session
        done = finish(api, api.post("create_model", json={**body, "user_metadata": facts}))
        assert done["type"] == "create_model"
        assert len(api.post("sessions/search", json={"user_metadata": {"a": "b"}}).json()["sessions"]) == 1
        assert len(api.post("sessions/search", json={}).json()["sessions"]) == 2
        for path in ("sessions", f"sessions/{session}", "training_runs"):
            assert api.get(path).status_code == 200


def test_targets_beyond_every_vocabulary_are_refused(api: httpx.Client, service: Service) -> None:
    """4294967301 was scored as 5."""
    body = sample_body(new_sampler(api, service), 1) | {"prompt": {"chunks": [{"tokens": [5, 6]}]}}
    targets = {"data": [2**32 + 5], "dtype": "int64", "shape": [1, 1]}
    done = finish(api, api.post("asample", json={**body, "target_prompt_logprobs": targets}))
    assert done["category"] == "user", done


def test_a_sample_names_no_other_model_than_its_session(api: httpx.Client, service: Service, saved: str) -> None:
    base = new_sampler(api, service)
    body = {"session_id": new_session(api), "sampling_session_seq_id": 0, "model_path": saved}
    trained = api.post("create_sampling_session", json=body).json()["sampling_session_id"]
    same = ((base, {"base_model": str(service.base)}), (trained, {"model_path": saved}))
    other = ((base, {"model_path": saved}), (trained, {"base_model": str(service.base)}),
             (base, {"base_model": "another"}))  # fmt: skip
    for seq, (sampler, more) in enumerate(same):
        assert "sequences" in finish(api, api.post("asample", json={**sample_body(sampler, seq), **more}))
    for seq, (sampler, more) in enumerate(other):
        done = finish(api, api.post("asample", json={**sample_body(sampler, 7 + seq), **more}))
        assert done.get("category") == "user", more


def test_a_clone_beyond_all_numbers_is_refused(api: httpx.Client, service: Service) -> None:
    target = {"sampling_session_id": new_sampler(api, service), "cloned_sampler_id": 10_000_000_000}
    assert api.post("retrieve_futures", json={"target": target, "timeout": 0}).status_code == 422


def in_process(base: Path, state: Path) -> Any:
    return embedded(str(base), state_dir=state, options={"num_threads": 1, "dtype": "float32"})


def talking(transport: httpx.AsyncBaseTransport) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=transport, base_url="http://service/api/v1/", headers={"X-API-Key": KEY},
                             timeout=60)  # fmt: skip


async def finished(client: httpx.AsyncClient, answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    return (await client.post("retrieve_future", json={"request_id": answer.json()["request_id"]})).json()


async def made(client: httpx.AsyncClient, base: Path) -> str:
    session = (await client.post("create_session", json={})).json()["session_id"]
    body = {"session_id": session, "model_seq_id": 0, "base_model": str(base), "lora_config": {"rank": 1}}
    return (await finished(client, await client.post("create_model", json=body)))["model_id"]


def test_operations_at_once_have_numbers_of_their_own(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Two without a number had the same: the second was told of the first, and was lost."""
    base = tiny_folder("llama-tied")

    async def steps() -> None:
        async with in_process(base, tmp_path / "state") as transport, talking(transport) as client:
            body = {"model_id": await made(client, base), "adam_params": {"learning_rate": 0.0}}
            answers = await asyncio.gather(*(client.post("optim_step", json=body) for _ in range(6)))
            assert len({answer.json()["request_id"] for answer in answers}) == 6
            done = [await finished(client, answer) for answer in answers]
            assert all(each["type"] == "optim_step" for each in done), done

    asyncio.run(steps())


def test_a_session_that_ends_while_a_copy_is_made_is_over(
    tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session as it was before the copy was written back, and was active again."""
    base, real = tiny_folder("llama-tied"), copying._write

    async def copy() -> None:
        loop = asyncio.get_running_loop()
        async with in_process(base, tmp_path / "state") as transport, talking(transport) as client:
            model = await made(client, base)
            path = (await finished(client, await client.post("save_weights", json={"model_id": model, "path": "a"})))[
                "path"
            ]
            session = (await client.post("create_session", json={})).json()["session_id"]

            def write(*arguments: Any) -> None:
                end = client.post(f"sessions/{session}/finish", json={"reason": {"type": "success"}})
                assert asyncio.run_coroutine_threadsafe(end, loop).result(30).status_code == 204
                real(*arguments)

            monkeypatch.setattr(copying, "_write", write)
            body = {"source_path": path, "session_id": session, "model_seq_id": 0}
            assert (await client.post("copy_weights", json=body)).status_code == 200
            active = (await client.post("sessions/search", json={"statuses": [{"type": "active"}]})).json()["sessions"]
            assert [each["session_id"] for each in active] == [model.split(":")[0]]

    asyncio.run(copy())


def test_a_future_that_is_done_while_it_is_looked_up_is_told_of(
    tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was neither in the answer nor waited for: the question was held to its end."""
    base, real = tiny_folder("llama-tied"), Front.commit

    async def commit(self: Front, work: Any, *, durable: bool = True) -> Any:
        found = await real(self, work, durable=durable)
        if found == []:
            await asyncio.gather(*(each.done.wait() for each in list(self.open.values())))
        return found

    async def ask() -> None:
        async with in_process(base, tmp_path / "state") as transport, talking(transport) as client:
            session = (await client.post("create_session", json={})).json()["session_id"]
            body = {"session_id": session, "sampling_session_seq_id": 0, "base_model": str(base)}
            sampler = (await client.post("create_sampling_session", json=body)).json()["sampling_session_id"]
            sample = sample_body(sampler, 1)
            sample["sampling_params"] = {"max_tokens": 100, "stop": []}
            await client.post("asample", content=orjson.dumps(sample))
            monkeypatch.setattr(Front, "commit", commit)
            question = client.post("retrieve_futures", json={"target": {"sampling_session_id": sampler}})
            answer = await asyncio.wait_for(question, 15)
            assert len(answer.json()["completions"]) == 1

    asyncio.run(ask())


def test_options_that_would_be_ignored_are_refused(api: httpx.Client, service: Service, model: str, saved: str) -> None:
    session = new_session(api)
    sampler = {"session_id": session, "sampling_session_seq_id": 0, "base_model": str(service.base)}
    for wrong in ({"base_model": "another", "model_path": saved}, {"temperature": 0.5}):
        assert api.post("create_sampling_session", json={**sampler, **wrong}).status_code in (400, 422), wrong
    assert api.post("create_sampling_session", json=sampler).status_code == 200
    assert api.post("create_sampling_session", json=sampler).status_code == 200
    # The same number for another model answered with the first one's.
    other = {"session_id": session, "sampling_session_seq_id": 0, "model_path": saved}
    assert api.post("create_sampling_session", json=other).status_code == 409
    at = f"training_runs/{model}/checkpoints/weights/kept"
    assert api.put(f"{at}/ttl", json={"ttl_seconds": 3600, "from": "now"}).status_code == 422
    assert api.put(f"{at}/ttl", json={}).status_code == 422
    assert api.put(f"sessions/{session}/project", json={"project": "x"}).status_code == 422
    load = {"model_id": model, "path": saved, "optimizer": True}
    for wrong in ({"user_metadata": {"a": "b"}}, {"session_id": session}, {"base_model": "another"}):
        assert finish(api, api.post("load_weights", json={**load, **wrong}))["category"] == "user", wrong
    assert "path" in finish(api, api.post("load_weights", json={**load, "base_model": str(service.base)}))
