"""The routes beside training, with the official SDK where it has a call for them, else by hand."""

from __future__ import annotations

import io
import json
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker
from tinker import types

from model_foundry import ServiceClient
from model_foundry.errors import DataError, RunError
from model_foundry.service.importing import import_checkpoint, service_shape
from model_foundry.types import LoraConfig
from tests.service_rig import KEY, Service, batch, files_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:DEPRECATED:FutureWarning"),
    pytest.mark.filterwarnings("ignore:RestClient.search_sessions is experimental"),
]
STEP = types.AdamParams(learning_rate=1e-2)


@pytest.fixture(scope="module")
def client(service: Service) -> tinker.ServiceClient:
    return tinker.ServiceClient(base_url=service.url, api_key=KEY)


@pytest.fixture(scope="module")
def api(service: Service) -> Iterator[httpx.Client]:
    with service.api() as client:
        yield client


@pytest.fixture(scope="module")
def model(client: tinker.ServiceClient, service: Service) -> Any:
    model = client.create_lora_training_client(base_model=str(service.base), rank=4, seed=7).result()
    model.forward_backward(batch(0), "cross_entropy").result()
    model.optim_step(STEP).result()
    return model


def folder_of(service: Service, path: str) -> Path:
    run, segment, name = path.removeprefix("tinker://").split("/")
    return service.state / "runs" / run.replace(":", "-") / segment / name


def test_external_weights_are_peft_files_behind_signed_addresses(
    client: tinker.ServiceClient, model: Any, service: Service
) -> None:
    """A file behind an address that anybody can make up, or that is good for ever, is everybody's."""
    path = model.save_weights_external("out").result().path
    assert path.split("/")[3:] == ["external_weights", "out"]
    answer = client.create_rest_client().get_external_weights_urls(path).result()
    stored = folder_of(service, path) / "adapter"
    assert set(answer.urls) == {"adapter_config.json", "adapter_model.safetensors"}
    for name, url in answer.urls.items():
        assert httpx.get(url).content == (stored / name).read_bytes()
    url = answer.urls["adapter_config.json"]
    assert httpx.get(url.replace("adapter_config.json", "adapter_model.safetensors")).status_code == 403
    assert httpx.get(url.split("?")[0]).status_code == 403
    with pytest.raises(tinker.RequestFailedError, match="age_encryption_recipients"):
        model.save_weights_external("secret", age_encryption_recipients=["age1abc"]).result()


def test_an_archive_is_a_tar_of_the_checkpoint(api: httpx.Client, model: Any, service: Service) -> None:
    path = model.save_state("packed").result().path
    run, segment, name = path.removeprefix("tinker://").split("/")
    answer = api.get(f"training_runs/{run}/checkpoints/{segment}/{name}/archive")
    assert answer.status_code == 302
    with tarfile.open(fileobj=io.BytesIO(httpx.get(answer.headers["location"]).content)) as tar:
        found = {item.name: tar.extractfile(item).read() for item in tar.getmembers()}  # type: ignore[union-attr]
    stored = folder_of(service, path)
    assert found["adapter_model.safetensors"] == (stored / "adapter" / "adapter_model.safetensors").read_bytes()
    assert found["state/optimizer.safetensors"] == (stored / "state" / "optimizer.safetensors").read_bytes()
    with service.api("tml-somebody") as other:
        assert other.get(f"training_runs/{run}/checkpoints/{segment}/{name}/archive").status_code == 404


def test_a_copy_is_the_checkpoint_and_outlives_it(client: tinker.ServiceClient, model: Any, service: Service) -> None:
    path = model.save_state("original").result().path
    rest = client.create_rest_client()
    copy = rest.copy_weights(path, destination_project_id="archive").result()
    assert copy != path
    assert files_of(folder_of(service, copy)) == files_of(folder_of(service, path))
    rest.delete_checkpoint_from_tinker_path(path).result()
    straight = model.forward_backward(batch(1), "cross_entropy").result().metrics
    resumed = client.create_training_client_from_state_with_optimizer(copy).result()
    assert resumed.forward_backward(batch(1), "cross_entropy").result().metrics == straight
    with pytest.raises(tinker.NotFoundError):
        rest.copy_weights(path, destination_project_id="archive").result()


def test_sessions_are_found(client: tinker.ServiceClient, service: Service) -> None:
    with service.api("tml-searcher") as api:
        made = [
            api.post("create_session", json={"display_name": name, "user_metadata": {"k": name[0]}}).json()[
                "session_id"
            ]
            for name in ("nightly one", "nightly two", "other")
        ]
        api.post(f"sessions/{made[0]}/finish", json={"reason": {"type": "errored"}})

        def search(**body: Any) -> list[str]:
            answer = api.post("sessions/search", json=body)
            assert answer.status_code == 200, answer.text
            return [item["session_id"] for item in answer.json()["sessions"]]

        assert search() == made[::-1]
        assert search(display_name="two nightly") == [made[1]]
        assert search(user_metadata={"k": "n"}) == [made[1], made[0]]
        assert search(statuses=[{"type": "client_finished", "reasons": ["errored"]}]) == [made[0]]
        assert search(statuses=[{"type": "active"}]) == made[:0:-1]
        first = api.post("sessions/search", json={"limit": 2}).json()
        rest = api.post("sessions/search", json={"limit": 2, "cursor": first["next_cursor"]}).json()
        assert [item["session_id"] for item in rest["sessions"]] == made[:1]
        assert rest["next_cursor"] is None
        assert api.post("sessions/search", json={"colour": "red"}).status_code == 422
    page = client.create_rest_client().search_sessions(types.SessionSearchRequest()).result()
    assert page.sessions
    assert not {item.session_id for item in page.sessions} & set(made)


def test_a_timeline_shows_every_operation(client: tinker.ServiceClient, model: Any) -> None:
    session = model.get_info().model_id.split(":")[0]
    url = client.create_rest_client().export_session_trace(session).result()
    events = json.loads(httpx.get(url).content)["traceEvents"]
    bars = [event["name"] for event in events if event["ph"] == "X"]
    assert bars[:3] == ["create_model", "forward_backward", "optim_step"]
    assert all(event["dur"] > 0 for event in events if event["ph"] == "X")


def test_a_token_stands_for_its_key(api: httpx.Client, service: Service) -> None:
    token = api.post("auth/token", json={}).json()["jwt"]
    mine = set(api.get("sessions?limit=1000").json()["sessions"])
    with service.api(token) as with_token:
        assert set(with_token.get("sessions?limit=1000").json()["sessions"]) == mine
    head, body, signature = token.split(".")
    for wrong in (f"{head}.{body}.{signature[::-1]}", f"{head}.{body[:-2]}.{signature}", "eyJ", "eyJ.eyJ.é"):
        with service.api(wrong.encode()) as stranger:  # type: ignore[arg-type]
            assert stranger.get("sessions").status_code == 401


def sample_body(sampler: str, seq: int, *, num: int = 1) -> dict[str, Any]:
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]}
    params = {"max_tokens": 3, "seed": seq}
    return {"sampling_session_id": sampler, "seq_id": seq, "prompt": prompt, "sampling_params": params,
            "num_samples": num, "type": "sample"}  # fmt: skip


def new_sampler(api: httpx.Client, service: Service) -> str:
    session = api.post("create_session", json={}).json()["session_id"]
    body = {"session_id": session, "sampling_session_seq_id": 0, "base_model": str(service.base)}
    return api.post("create_sampling_session", json=body).json()["sampling_session_id"]


def test_futures_are_told_of_together_and_once(api: httpx.Client, service: Service) -> None:
    """A poller that hears of the same ones again is a busy loop; one that misses one waits for ever."""
    sampler = new_sampler(api, service)
    target = {"type": "sampling_session", "sampling_session_id": sampler, "cloned_sampler_id": 0}
    began = time.monotonic()
    assert api.post("retrieve_futures", json={"target": target, "timeout": 0}).json()["completions"] == []
    assert time.monotonic() - began < 5
    ids = [api.post("asample", json=sample_body(sampler, seq)).json()["request_id"] for seq in (1, 2, 3)]
    bad = api.post("asample", json=sample_body(sampler, 4, num=2) | {"prompt": {"chunks": []}}).json()["request_id"]
    api.post("asample", json=sample_body(sampler, 1_000_000_001))
    seen: list[dict[str, Any]] = []
    cursor = 0
    while len(seen) < 4:
        answer = api.post("retrieve_futures", json={"target": target, "prev_cursor": cursor}).json()
        seen += answer["completions"]
        assert answer["cursor"] > cursor
        cursor = answer["cursor"]
    assert sorted(item["request_id"] for item in seen) == sorted([*ids, bad])
    assert {item["request_id"]: item["state"] for item in seen}[bad] == "failed"
    answer = api.post("retrieve_futures", json={"target": target, "prev_cursor": cursor, "timeout": 0.2}).json()
    assert answer == {"completions": [], "cursor": cursor}
    clone = {**target, "cloned_sampler_id": 1}
    assert len(api.post("retrieve_futures", json={"target": clone}).json()["completions"]) == 1


def test_joining_gives_every_client_a_number_of_its_own(api: httpx.Client, service: Service) -> None:
    sampler = new_sampler(api, service)
    counters = [
        api.post("join_sampling_session", json={"sampling_session_id": sampler}).json()["client_counter"] for _ in "abc"
    ]
    assert counters == [1, 2, 3]


def test_cancelling(api: httpx.Client, service: Service, model: Any) -> None:
    sampler = new_sampler(api, service)
    request = api.post("asample", json=sample_body(sampler, 1)).json()["request_id"]
    assert api.post("cancel_future", json={"request_id": request}).status_code == 204
    answer = api.post("retrieve_future", json={"request_id": request})
    assert answer.status_code == 200
    assert "sequences" in answer.json() or answer.json()["category"] == "user"
    assert api.post("cancel_future", json={"request_id": "none"}).status_code == 404
    training = f"{model.get_info().model_id}:1"
    assert api.post("cancel_future", json={"request_id": training}).status_code == 400


NOT_HERE = {"create_custom_loss": ("POST", 400, "by the client"), "audit": ("GET", 404, "audit log"),
            "billing/usage/events": ("GET", 404, "bills nothing")}  # fmt: skip


@pytest.mark.parametrize("path", NOT_HERE)
def test_what_is_not_here_says_so(path: str, api: httpx.Client) -> None:
    method, status, sentence = NOT_HERE[path]
    answer = api.request(method, path, json={} if method == "POST" else None)
    assert (answer.status_code, sentence in answer.json()["error"]) == (status, True)


def test_storage_is_counted(api: httpx.Client, model: Any) -> None:
    model.save_state("counted").result()
    (row,) = [row for row in api.get("billing/usage/checkpoints/current").json()["data"] if row["project_id"] is None]
    assert row["checkpoint_count"] > 0
    assert row["size_bytes"] == pytest.approx(row["size_gigabytes"] * 1e9)


def test_what_foundry_trained_is_gone_on_with(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """An adapter folder goes in, and a client trains it further; a running service is not written behind its back."""
    base, options = str(tiny_folder("llama-tied")), {"num_threads": 1, "dtype": "float32"}
    with ServiceClient(base_model=base, state_dir=tmp_path / "first", options=options) as client:
        model = client.create_lora_training_client(base, rank=3, seed=2).result()
        model.forward_backward(batch(0)).result()
        model.optim_step(STEP).result()
        run, segment, name = model.save_state("kept").result().path.removeprefix("tinker://").split("/")
        want = model.forward_backward(batch(1)).result().loss_sum
        after = model.optim_step(STEP).result().metrics
        checkpoint = tmp_path / "first" / "runs" / run.replace(":", "-") / segment / name
        with pytest.raises(RunError, match="would not see it"):
            import_checkpoint(str(checkpoint), state_dir=tmp_path / "first", name="x", key=None)
    path = import_checkpoint(str(checkpoint), state_dir=tmp_path / "second", name="mine", key=None)
    with ServiceClient(base_model=base, state_dir=tmp_path / "second", options=options) as client:
        resumed = client.create_training_client_from_state_with_optimizer(path).result()
        assert resumed.get_info().lora_rank == 3
        assert resumed.forward_backward(batch(1)).result().loss_sum == want
        assert resumed.optim_step(STEP).result().metrics == after
        fresh = client.create_lora_training_client(base, rank=3).result()
        fresh.load_state(path).result()
        assert fresh.forward_backward(batch(1)).result().loss_sum == want


def test_shapes_that_clients_cannot_say_are_refused() -> None:
    assert service_shape(LoraConfig(r=8), where="x")["rank"] == 8
    some = service_shape(LoraConfig(target_modules=("q_proj", "k_proj", "v_proj", "o_proj")), where="x")
    assert (some["train_attn"], some["train_mlp"], some["train_unembed"]) == (True, False, False)
    head = service_shape(LoraConfig(target_modules=("down_proj", "gate_proj", "lm_head", "up_proj")), where="x")
    assert (head["train_attn"], head["train_mlp"], head["train_unembed"]) == (False, True, True)
    for wrong in (LoraConfig(lora_alpha=16), LoraConfig(use_dora=True), LoraConfig(target_modules=("q_proj",))):
        with pytest.raises(DataError, match="another shape"):
            service_shape(wrong, where="x")


def test_likeliest_tokens_targets_and_draws(client: tinker.ServiceClient, service: Service, model: Any) -> None:
    """Each says the same as another way to ask: a place off by one, or the base's numbers for the adapter's."""
    sampler = model.save_weights_and_get_sampling_client().result()
    tokens = [5, 9, 40, 12]
    prompt = types.ModelInput.from_ints(tokens)
    params = types.SamplingParams(max_tokens=4, seed=3, temperature=1.0, stop=[])
    got = sampler.sample(
        prompt, 2, params, include_prompt_logprobs=True, topk_prompt_logprobs=260, topk_sample_logprobs=2
    ).result()
    assert got.topk_prompt_logprobs[0] is None
    for place in range(1, len(tokens)):
        ranked = got.topk_prompt_logprobs[place]
        assert [value for _, value in ranked] == sorted((value for _, value in ranked), reverse=True)
        assert dict(ranked)[tokens[place]] == pytest.approx(got.prompt_logprobs[place], abs=1e-4)
    for sequence in got.sequences:
        assert [len(row) for row in sequence.topk_logprobs] == [2] * 4
        again = sampler.compute_logprobs(types.ModelInput.from_ints([*tokens, *sequence.tokens])).result()[4:]
        for ranked, token, logprob in zip(sequence.topk_logprobs, sequence.tokens, again, strict=True):
            assert dict(ranked).get(token, logprob) == pytest.approx(logprob, abs=1e-4)
            assert ranked[0][1] >= logprob - 1e-4

    dense = types.TensorData(data=[9, -1, 40, 7, 12, 12], dtype="int64", shape=[3, 2])
    answer = sampler.sample(prompt, 1, params, target_prompt_logprobs=dense).result().target_prompt_logprobs
    assert answer.shape == [3, 2]
    values = answer.to_numpy()
    assert values[:, 0] == pytest.approx(got.prompt_logprobs[1:], abs=1e-4)
    assert values[0, 1] == 0
    assert values[1, 1] == pytest.approx(dict(got.topk_prompt_logprobs[2])[7], abs=1e-4)
    sparse = types.TensorData(
        data=[9, 7, 12], dtype="int64", shape=[3, 250], sparse_crow_indices=[0, 1, 2, 3], sparse_col_indices=[3, 0, 9]
    )
    answer = sampler.sample(prompt, 1, params, target_prompt_logprobs=sparse).result().target_prompt_logprobs
    assert (answer.shape, answer.sparse_col_indices) == ([3, 250], [3, 0, 9])
    assert answer.data == pytest.approx([values[0, 0], values[1, 1], values[2, 0]], abs=1e-4)

    drawn = sampler.sample(prompt, 1, params, prompt_alt_tokens_k=5).result().prompt_alt_tokens
    assert drawn.tokens.shape == drawn.logprobs.shape == [3, 5]
    for place, (ids, logprobs) in enumerate(zip(drawn.tokens.tolist(), drawn.logprobs.tolist(), strict=True)):
        every = dict(got.topk_prompt_logprobs[place + 1])
        for token, logprob in zip(ids, logprobs, strict=True):
            assert every.get(token, logprob) == pytest.approx(logprob, abs=1e-4)
    wrong = types.TensorData(data=[1], dtype="int64", shape=[1, 1])
    with pytest.raises(tinker.RequestFailedError, match="a row for each token"):
        sampler.sample(prompt, 1, params, target_prompt_logprobs=wrong).result()
    recording = model.save_weights_and_get_sampling_client(record_stability_info=True).result()
    with pytest.raises(tinker.RequestFailedError, match="not published"):
        recording.sample(prompt, 1, params).result()
