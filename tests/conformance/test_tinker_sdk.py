"""The official SDK, unmodified, over a real socket: what it asks for is what happens."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from tinker import types

from model_foundry.checkpoint.tensors import read_tensors
from model_foundry.engine.torch_engine import TorchEngine
from model_foundry.types import AdamParams, Datum, LoraConfig
from tests.service_rig import KEY, Service, batch, datum, files_of, finish, inputs

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:DEPRECATED:FutureWarning")]
STEP = types.AdamParams(learning_rate=1e-2)


@pytest.fixture(scope="module")
def client(service: Service) -> tinker.ServiceClient:
    return tinker.ServiceClient(base_url=service.url, api_key=KEY)


def model_of(client: tinker.ServiceClient, service: Service, **options: Any) -> Any:
    return client.create_lora_training_client(
        base_model=str(service.base), **{"rank": 4, "seed": 7, **options}
    ).result()


def train(model: Any, *, steps: int, first: int = 0) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        done, _ = model.forward_backward(batch(step), "cross_entropy"), model.optim_step(STEP)
        losses.append(done.result().metrics["loss:sum"])
    return losses


def folder_of(service: Service, path: str) -> Path:
    run, segment, name = path.removeprefix("tinker://").split("/")
    return service.state / "runs" / run.replace(":", "-") / segment / name


def ours(data: list[types.Datum]) -> list[Datum]:
    return [
        Datum(
            np.array(row.model_input.to_ints(), np.int32),
            {"target_tokens": np.array(row.loss_fn_inputs["target_tokens"].data, np.int32),
             "weights": np.array(row.loss_fn_inputs["weights"].data, np.float32)},
        )
        for row in data
    ]  # fmt: skip


LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("targets, unembed", [("all-linear", False), ((*LINEAR, "lm_head"), True)])
def test_what_is_trained_over_the_wire_is_what_the_engine_trains(
    targets: Any, unembed: bool, client: tinker.ServiceClient, service: Service
) -> None:
    """Bit for bit: losses, log-probabilities and the adapter in the end."""
    model = model_of(client, service, train_unembed=unembed)
    losses = train(model, steps=3)
    path = model.save_state("end").result().path
    engine = TorchEngine(num_threads=1, device="cpu", dtype="float32")
    engine.share_base(engine.create_model(service.base, lora=None, trainable=False))
    alone = engine.create_model(service.base, lora=LoraConfig(r=4, lora_alpha=32.0, target_modules=targets), seed=7)
    adam = AdamParams(learning_rate=1e-2, beta1=0.9, beta2=0.95, eps=1e-12)
    want = []
    for step in range(3):
        want.append(engine.forward_backward(alone, ours(batch(step)), logprobs="all").loss_sum)
        engine.optim_step(alone, adam)
    assert losses == want
    stored = read_tensors(folder_of(service, path) / "adapter" / "adapter_model.safetensors")
    assert stored.keys() == engine.trained_tensors(alone).keys()
    for name, tensor in engine.trained_tensors(alone).items():
        assert torch.equal(stored[name], tensor)


def test_weights_alone_and_weights_with_optimizer_differ_in_the_right_way(
    client: tinker.ServiceClient, service: Service
) -> None:
    """Uninterrupted = with optimizer, bit for bit, in both addressings; and neither is weights alone."""
    model = model_of(client, service)
    train(model, steps=3)
    path = model.save_state("here").result().path
    straight = train(model, steps=3, first=3)
    resumed = client.create_training_client_from_state_with_optimizer(path).result()
    assert resumed.get_info().lora_rank == 4
    assert train(resumed, steps=3, first=3) == straight
    in_place = model_of(client, service, seed=99)
    in_place.load_state_with_optimizer(path).result()
    assert train(in_place, steps=3, first=3) == straight
    afresh = train(client.create_training_client_from_state(path).result(), steps=3, first=3)
    assert afresh[0] == straight[0]
    assert afresh[1:] != straight[1:]


def test_forward_leaves_no_gradient(client: tinker.ServiceClient, service: Service) -> None:
    """A server that does not know `forward_only` accumulates the gradients of every evaluation."""
    plain, watched = model_of(client, service), model_of(client, service)
    losses = train(plain, steps=2)
    for step in range(2):
        watched.forward(batch(50), "cross_entropy").result()
        done, _ = watched.forward_backward(batch(step), "cross_entropy"), watched.optim_step(STEP)
        watched.forward(batch(51), "cross_entropy").result()
        assert done.result().metrics["loss:sum"] == losses[step]


def test_a_split_batch_gives_the_gradients_of_the_whole(client: tinker.ServiceClient, service: Service) -> None:
    """The client posts the first part last, and puts the parts' metrics together by the end of their names."""
    whole, split = model_of(client, service), model_of(client, service)
    rows = [datum(seed) for seed in range(7)]
    assert client.holder._client_config.parallel_fwdbwd_chunks
    want = whole.forward_backward(rows, "cross_entropy").result()
    split.holder._client_config = split.holder._client_config.model_copy(update={"fwdbwd_max_chunk_len": 2})
    try:
        got = split.forward_backward(rows, "cross_entropy").result()
    finally:
        split.holder._client_config = split.holder._client_config.model_copy(update={"fwdbwd_max_chunk_len": 1024})
    assert got.metrics["loss:sum"] == pytest.approx(want.metrics["loss:sum"], rel=1e-6)
    for mine, theirs in zip(got.loss_fn_outputs, want.loss_fn_outputs, strict=True):
        assert mine["logprobs"].data == pytest.approx(theirs["logprobs"].data, abs=1e-4)
    norms = [model.optim_step(STEP).result().metrics["grad_norm"] for model in (whole, split)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_a_custom_loss_is_the_loss_it_says(client: tinker.ServiceClient, service: Service) -> None:
    """-logprob as a custom loss is cross entropy: the same gradient, hence the same step."""
    plain, custom = model_of(client, service), model_of(client, service)

    def negative(data: list[types.Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        loss = -torch.cat(logprobs).sum()
        return loss, {"mine": float(loss.detach())}

    want = plain.forward_backward(batch(0), "cross_entropy").result().metrics["loss:sum"]
    got = custom.forward_backward_custom(batch(0), negative).result().metrics
    assert got["loss:sum"] == pytest.approx(want, rel=1e-5)
    norms = [model.optim_step(STEP).result().metrics["grad_norm"] for model in (plain, custom)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize("loss", ["importance_sampling", "ppo", "cispo", "dro"])
def test_losses_on_samples(loss: str, client: tinker.ServiceClient, service: Service) -> None:
    """At the sampling policy itself r is 1: the sums are known without the engine."""
    model = model_of(client, service)
    rows = batch(0)
    now = [out["logprobs"].to_torch() for out in model.forward(rows, "cross_entropy").result().loss_fn_outputs]
    advantages = [torch.linspace(-1, 2, len(row)) for row in now]
    data = [
        types.Datum(
            row.model_input, inputs(target_tokens=row.loss_fn_inputs["target_tokens"], logprobs=q, advantages=a)
        )
        for row, q, a in zip(rows, now, advantages, strict=True)
    ]
    got = model.forward_backward(data, loss).result()
    surrogate = -sum(float((lp * a).sum()) for lp, a in zip(now, advantages, strict=True))
    want = -sum(float(a.sum()) for a in advantages) if loss in ("importance_sampling", "ppo") else surrogate
    assert got.metrics["loss:sum"] == pytest.approx(want, rel=1e-4)
    assert model.optim_step(STEP).result().metrics["grad_norm"] > 0


def test_several_targets_a_token(client: tinker.ServiceClient, service: Service) -> None:
    """Top-k distillation, which the client sends as sparse matrices."""
    model = model_of(client, service)
    targets, weights = torch.zeros(5, 8, dtype=torch.int64), torch.zeros(5, 8)
    targets[:, 1], weights[:, 1] = torch.arange(10, 15), 0.5
    tokens = types.ModelInput.from_ints([4, 5, 6, 7, 8])
    got = model.forward([types.Datum(tokens, inputs(target_tokens=targets, weights=weights))], "cross_entropy").result()
    plain = types.Datum(tokens, inputs(target_tokens=list(range(10, 15)), weights=[0.5] * 5))
    want = model.forward([plain], "cross_entropy").result()
    assert got.metrics["loss:sum"] == pytest.approx(want.metrics["loss:sum"], rel=1e-5)
    assert got.loss_fn_outputs[0]["logprobs"].shape == [5, 8]


def test_samples(client: tinker.ServiceClient, service: Service) -> None:
    model = model_of(client, service)
    train(model, steps=2)
    sampler = model.save_weights_and_get_sampling_client().result()
    prompt = types.ModelInput.from_ints([10, 11, 12])
    params = types.SamplingParams(max_tokens=6, temperature=1.0, seed=5, stop=[])
    first = sampler.sample(prompt, 3, params).result()
    assert [seq.tokens for seq in sampler.sample(prompt, 3, params).result().sequences] == [
        s.tokens for s in first.sequences
    ]
    assert len({tuple(seq.tokens) for seq in first.sequences}) == 3, "copies of a prompt are other draws"
    assert len({seq.sequence_id for seq in first.sequences}) == 3
    # The logprobs of a sample are those of its tokens as a prompt.
    text = types.ModelInput.from_ints([10, 11, 12, *first.sequences[0].tokens])
    assert sampler.compute_logprobs(text).result()[3:] == pytest.approx(first.sequences[0].logprobs, abs=1e-3)
    free = sampler.sample(prompt, 1, types.SamplingParams(max_tokens=6, temperature=1.0, stop=[])).result()
    other = sampler.sample(prompt, 1, types.SamplingParams(max_tokens=6, temperature=1.0, stop=[])).result()
    assert free.sequences[0].tokens != other.sequences[0].tokens, "without a seed every request draws afresh"
    train(model, steps=2, first=9)
    assert sampler.sample(prompt, 3, params).result().sequences[0].tokens == first.sequences[0].tokens, "a snapshot"


def test_sampling_stops_where_it_is_told(client: tinker.ServiceClient, service: Service) -> None:
    """Tokens of this model are bytes, 3 and up in the order of the alphabet; a stop may be text or tokens."""
    sampler = client.create_sampling_client(base_model=str(service.base)).result()
    prompt = types.ModelInput.from_ints([10, 11, 12])
    whole = (
        sampler.sample(prompt, 1, types.SamplingParams(max_tokens=40, temperature=0.0, stop=[])).result().sequences[0]
    )
    assert (len(whole.tokens), whole.stop_reason) == (40, "length")
    token = whole.tokens[7]
    at = whole.tokens.index(token)
    cut = (
        sampler.sample(prompt, 1, types.SamplingParams(max_tokens=40, temperature=0.0, stop=[token]))
        .result()
        .sequences[0]
    )
    assert (cut.tokens, cut.stop_reason) == (whole.tokens[: at + 1], "stop")


REFUSED: dict[str, Any] = {
    "gspo": lambda model: model.forward_backward(batch(0), "gspo"),
    "and forward_backward_custom": lambda model: model.forward_backward(batch(0), "dpo_orpo"),
    "clip takes no settings": lambda model: model.forward_backward(batch(0), "cross_entropy", {"clip": 1.0}),
    "not in the vocabulary": lambda model: model.forward_backward(
        [types.Datum(types.ModelInput.from_ints([10**6]), inputs(target_tokens=[1], weights=[1.0]))], "cross_entropy"
    ),
    "weights of shape": lambda model: model.forward_backward(
        [types.Datum(types.ModelInput.from_ints([5, 6]), inputs(target_tokens=[1, 2], weights=[1.0]))], "cross_entropy"
    ),
    "not finite": lambda model: model.forward_backward(
        [types.Datum(types.ModelInput.from_ints([5]), inputs(target_tokens=[1], weights=[float("nan")]))],
        "cross_entropy",
    ),
    "there is no such checkpoint": lambda model: model.load_state("tinker://nobody:train:0/weights/x"),
    "path": lambda model: model.save_state("../outside"),
    "dimuon": lambda model: model.optim_step(types.DimuonParams(learning_rate=0.1)),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_refusal_comes_through_the_future_and_leaves_no_hole(
    why: str, client: tinker.ServiceClient, service: Service
) -> None:
    """It is the user's fault by category, it says why, and the model goes on as if it had not been asked."""
    plain, model = model_of(client, service), model_of(client, service)
    losses = train(plain, steps=3)
    assert train(model, steps=1) == losses[:1]
    with pytest.raises(tinker.RequestFailedError) as refused:
        REFUSED[why](model).result()
    assert refused.value.category == types.RequestErrorCategory.User
    assert why.split()[0] in str(refused.value)
    assert train(model, steps=2, first=1) == losses[1:]


def test_names_overwriting_and_listing(client: tinker.ServiceClient, service: Service) -> None:
    model = model_of(client, service)
    run = model.model_id
    first = model.save_state("same", user_metadata={"epoch": "1"}).result().path
    with pytest.raises(tinker.RequestFailedError, match="exists"):
        model.save_state("same").result()
    before = files_of(folder_of(service, first))
    train(model, steps=1)
    assert model.save_state("same", overwrite=True, ttl_seconds=7200).result().path == first
    assert files_of(folder_of(service, first)) != before
    model.save_weights_for_sampler("served").result()
    rest = client.create_rest_client()
    listed = {item.checkpoint_id: item for item in rest.list_checkpoints(run).result().checkpoints}
    assert listed.keys() == {"weights/same", "sampler_weights/served"}
    assert listed["weights/same"].expires_at is not None
    assert (listed["weights/same"].size_bytes or 0) > 1000
    found = rest.get_training_run(run).result()
    assert found.last_checkpoint is not None
    assert (found.lora_rank, found.corrupted, found.last_checkpoint.tinker_path) == (4, False, first)
    rest.set_checkpoint_ttl_from_tinker_path(first, None).result()
    rest.delete_checkpoint_from_tinker_path(first).result()
    assert [item.checkpoint_id for item in rest.list_checkpoints(run).result().checkpoints] == [
        "sampler_weights/served"
    ]
    with pytest.raises(tinker.NotFoundError):
        rest.delete_checkpoint_from_tinker_path(first).result()


def test_a_creation_that_fails_leaves_nothing_behind(client: tinker.ServiceClient, service: Service) -> None:
    before = len(client.create_rest_client().list_training_runs(limit=1000).result().training_runs)
    with pytest.raises(tinker.RequestFailedError, match="there is no such checkpoint"):
        client.create_training_client_from_state("tinker://nobody:train:0/weights/x").result()
    with pytest.raises(tinker.RequestFailedError, match="not elsewhere"):
        client.create_lora_training_client(base_model="elsewhere", rank=4).result()
    with pytest.raises(tinker.RequestFailedError, match="rank"):
        client.create_lora_training_client(base_model=str(service.base), rank=0).result()
    assert len(client.create_rest_client().list_training_runs(limit=1000).result().training_runs) == before


def test_parts_of_the_model_are_trained_as_asked(client: tinker.ServiceClient, service: Service) -> None:
    """train_mlp, train_attn and train_unembed taken and ignored train something else than was meant."""
    for part in ("self_attn", "mlp", "lm_head"):
        flags = {"train_attn": part == "self_attn", "train_mlp": part == "mlp", "train_unembed": part == "lm_head"}
        model = model_of(client, service, **flags)
        path = model.save_state(part).result().path
        stored = read_tensors(folder_of(service, path) / "adapter" / "adapter_model.safetensors")
        assert stored
        assert all(f".{part}." in name for name in stored)
    with service.api() as api:
        lora = {"rank": 2, "train_mlp": False, "train_attn": False, "train_unembed": False}
        body = {"session_id": client.holder.get_session_id(), "model_seq_id": 99, "base_model": str(service.base)}
        done = finish(api, api.post("create_model", json={**body, "lora_config": lora}))
        assert done["category"] == "user"
        assert "no layer would be trained" in done["error"]


def test_a_trained_head_is_sampled_from_and_kept(client: tinker.ServiceClient, service: Service) -> None:
    """Trained and not used in sampling, an adapter on the head would be seen in the losses alone."""
    model = model_of(client, service, train_mlp=False, train_attn=False)
    losses = train(model, steps=6)
    sampler = model.save_weights_and_get_sampling_client("head").result()
    prompt = types.ModelInput.from_ints([5, 6, 7])
    params = types.SamplingParams(max_tokens=12, temperature=0.0, stop=[])
    (answer,) = sampler.sample(prompt, num_samples=1, sampling_params=params).result().sequences
    whole = types.ModelInput.from_ints([5, 6, 7, *answer.tokens])
    scored = sampler.compute_logprobs(whole).result()[3:]
    assert np.allclose(np.array(answer.logprobs), np.array(scored, float), atol=1e-4)
    of_base = client.create_sampling_client(base_model=str(service.base)).result().compute_logprobs(whole).result()[3:]
    assert not np.allclose(np.array(scored, float), np.array(of_base, float), atol=1e-2)
    path = model.save_state("with-head").result().path
    resumed = client.create_training_client_from_state_with_optimizer(path).result()
    again = resumed.forward(batch(0), "cross_entropy").result().metrics["loss:sum"]
    assert again == model.forward(batch(0), "cross_entropy").result().metrics["loss:sum"]
    assert again < losses[0]


def test_tenants_do_not_see_each_other(client: tinker.ServiceClient, service: Service) -> None:
    """Another key's run, checkpoint and sampler are 404s, a published checkpoint excepted."""
    model = model_of(client, service)
    path = model.save_state("mine").result().path
    other = tinker.ServiceClient(base_url=service.url, api_key="tml-another")
    rest = other.create_rest_client()
    assert rest.list_training_runs().result().training_runs == []
    with pytest.raises(tinker.NotFoundError):
        rest.get_training_run(model.model_id).result()
    with pytest.raises(tinker.NotFoundError):
        rest.delete_checkpoint_from_tinker_path(path).result()
    with pytest.raises(tinker.RequestFailedError, match="there is no such checkpoint"):
        other.create_training_client_from_state(path).result()
    with service.api("tml-another") as api:
        for name, body in (("get_info", {"model_id": model.model_id}), ("optim_step", {"model_id": model.model_id}),
                           ("retrieve_future", {"request_id": f"{model.model_id}:0"})):  # fmt: skip
            assert api.post(name, json=body).status_code == 404
    client.create_rest_client().publish_checkpoint_from_tinker_path(path).result()
    assert other.create_training_client_from_state(path).result().get_info().lora_rank == 4
    with pytest.raises(tinker.NotFoundError):
        rest.delete_checkpoint_from_tinker_path(path).result()


def test_many_models_at_once_train_as_alone(client: tinker.ServiceClient, service: Service) -> None:
    """More than fit in memory: they are put away and brought back, and each ends as if it had been alone."""
    ranks = [1 + index % 5 for index in range(20)]
    models = [model_of(client, service, rank=rank, seed=rank) for rank in ranks]
    with ThreadPoolExecutor(20) as pool:
        losses = list(pool.map(lambda model: train(model, steps=2), models))
    for rank, mine in zip(ranks, losses, strict=True):
        assert mine == losses[rank - 1]


def test_a_finished_session_is_over(service: Service) -> None:
    client = tinker.ServiceClient(base_url=service.url, api_key=KEY)
    session = client.holder.get_session_id()
    model_of(client, service)
    client.close("errored", detail="the data ran out").result()
    with service.api() as api:
        (found,) = api.post("sessions/search", json={"session_id": session}).json()["sessions"]
        status = {"type": "client_finished", "reason": {"type": "errored"}, "detail": "the data ran out"}
        assert found["status"] == status
        assert api.post("session_heartbeat", json={"session_id": session}).status_code == 410
        body = {"session_id": session, "model_seq_id": 9, "base_model": str(service.base), "lora_config": {"rank": 2}}
        assert api.post("create_model", json=body).status_code == 410
