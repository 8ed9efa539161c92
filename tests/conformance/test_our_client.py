"""Our client in this process, our client over HTTP and the official SDK: one small program, the same bits.

The program is written for the SDK, with its types; ours takes them as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from tinker import types

from model_foundry import AdamParams, Datum, SamplingParams, ServiceClient
from model_foundry.errors import (
    ConfigError,
    DataError,
    RequestFailedError,
    ServiceError,
    ServiceUnreachableError,
    UsageError,
)
from tests.service_rig import KEY, Service, batch, datum, files_of, inputs

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:DEPRECATED:FutureWarning")]
STEP = types.AdamParams(learning_rate=1e-2)
OPTIONS = {"num_threads": 1, "dtype": "float32"}


def squared(data: Any, logprobs: Any) -> Any:
    total = torch.cat(logprobs).square().sum()
    return total, {"mine": total.item()}


def program(client: Any, base: str) -> dict[str, Any]:
    """Everything that trains, saves, loads and samples; what it returns is compared to the last bit."""
    model = client.create_lora_training_client(base_model=base, rank=4, seed=11, train_unembed=False).result()
    measured: dict[str, Any] = {"rank": model.get_info().lora_rank}
    out = model.forward(batch(9), "cross_entropy").result()
    measured["forward"] = [row["logprobs"].tolist() for row in out.loss_fn_outputs]
    for step in range(2):
        done, stepped = model.forward_backward(batch(step), "cross_entropy"), model.optim_step(STEP)
        measured[f"step {step}"] = (done.result().metrics, stepped.result().metrics)
    measured["custom"] = model.forward_backward_custom(batch(2), squared).result().metrics
    measured["custom step"] = model.optim_step(STEP).result().metrics
    rows = [types.Datum(model_input=row.model_input, loss_fn_inputs=inputs(
        target_tokens=row.loss_fn_inputs["target_tokens"], logprobs=[-3.0] * len(row.model_input.to_ints()),
        advantages=[0.5] * len(row.model_input.to_ints()))) for row in batch(3)]  # fmt: skip
    measured["ppo"] = model.forward_backward(rows, "ppo", {"clip_low_threshold": 0.7}).result().metrics
    model.optim_step(STEP).result()
    path = model.save_state("kept").result().path
    resumed = client.create_training_client_from_state_with_optimizer(path).result()
    measured["resumed"] = resumed.forward_backward(batch(4), "cross_entropy").result().metrics
    measured["resumed step"] = resumed.optim_step(STEP).result().metrics
    afresh = client.create_training_client_from_state(path).result()
    measured["afresh"] = afresh.forward_backward(batch(4), "cross_entropy").result().metrics
    prompt = types.ModelInput.from_ints([10, 11, 12])
    sampler = model.save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=5, temperature=1.0, seed=3, stop=[250])
    sequences = sampler.sample(prompt, 2, params).result().sequences
    measured["samples"] = [(list(item.tokens), list(item.logprobs), item.stop_reason) for item in sequences]
    measured["prompt"] = sampler.compute_logprobs(prompt).result()
    measured["path"] = path
    served = model.save_weights_for_sampler("served").result().path
    named = client.create_sampling_client(model_path=served).result()
    measured["named"] = [list(item.tokens) for item in named.sample(prompt, 1, params).result().sequences]
    return measured


def saved_files(state: Path, path: str) -> dict[str, bytes]:
    run, segment, name = path.removeprefix("tinker://").split("/")
    return files_of(state / "runs" / run.replace(":", "-") / segment / name)


@pytest.fixture
def here(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Iterator[ServiceClient]:
    base = str(tiny_folder("llama-tied"))
    with ServiceClient(base_model=base, state_dir=tmp_path / "here", options=OPTIONS) as client:
        yield client


def test_one_program_gives_the_same_bits_three_ways(here: ServiceClient, service: Service, tmp_path: Path) -> None:
    """Two clients, or two ways into the engine, that drift apart in rounding, defaults or order."""
    base = str(service.base)
    with ServiceClient(base_url=service.url, api_key=KEY) as over_http:
        runs = {
            "sdk": (program(tinker.ServiceClient(base_url=service.url, api_key=KEY), base), service.state),
            "http": (program(over_http, base), service.state),
            "here": (program(here, base), tmp_path / "here"),
        }
    files = {name: saved_files(state, measured.pop("path")) for name, (measured, state) in runs.items()}
    want = runs["sdk"][0]
    for name, (measured, _) in runs.items():
        assert measured == want, name
        assert files[name] == files["sdk"], name
    assert want["step 0"] != want["step 1"]
    assert want["resumed"] == want["afresh"]


def test_our_own_rows_are_taken_as_well(here: ServiceClient, service: Service) -> None:
    def own(row: types.Datum) -> Datum:
        given = row.loss_fn_inputs
        return Datum(
            np.array(row.model_input.to_ints(), np.int32),
            {"target_tokens": given["target_tokens"].to_numpy(), "weights": given["weights"].to_numpy()},
        )

    model = here.create_lora_training_client(str(service.base), rank=4, seed=1).result()
    theirs = model.forward(batch(0)).result()
    ours = model.forward([own(row) for row in batch(0)]).result()
    assert ours.loss_sum == theirs.loss_sum
    step = model.optim_step(AdamParams(learning_rate=1e-3)).result()
    assert (step.step, step.skipped) == (1, False)
    sampler = here.create_sampling_client(base_model=str(service.base)).result()
    output = sampler.sample(np.array([5, 6, 7]), 1, SamplingParams(max_tokens=3, temperature=1.0)).result()
    assert output.sequences[0].tokens.shape == (3,)


def test_a_split_batch_is_the_whole_batch(here: ServiceClient, service: Service) -> None:
    """Parts are put together in order, and their losses summed."""
    rows = [datum(seed, length=3) for seed in range(1030)]
    model = here.create_lora_training_client(str(service.base), rank=2, seed=1).result()
    out = model.forward(rows).result()
    assert len(out.logprobs) == 1030
    assert out.loss_sum == pytest.approx(-sum(float(row.sum()) for row in out.logprobs), rel=1e-5)
    last = model.forward(rows[-1:]).result()
    np.testing.assert_allclose(out.logprobs[-1], last.logprobs[0], atol=1e-5)


def test_what_fails_leaves_no_hole(here: ServiceClient, service: Service) -> None:
    """A refusal of one operation, or of a body, must not leave everything after it waiting for ever."""
    model = here.create_lora_training_client(str(service.base), rank=2, seed=1).result()
    bad = Datum(np.array([10**6]), {"target_tokens": np.array([5]), "weights": np.ones(1, np.float32)})
    with pytest.raises(RequestFailedError) as failed:
        model.forward_backward([bad]).result(timeout=60)
    assert failed.value.category == "user"
    with pytest.raises(ZeroDivisionError):
        model.forward_backward_custom(batch(0), lambda data, logprobs: (1 / 0, {})).result(timeout=60)
    with pytest.raises(DataError, match="does not depend"):
        model.forward_backward_custom(batch(0), lambda data, lp: (lp[0].sum(), {})).result(timeout=60)
    huge = Datum(np.full(9_000_000, 5), {"target_tokens": np.full(9_000_000, 5)})
    with pytest.raises(ServiceError) as refused:
        model.forward([huge]).result(timeout=60)
    assert refused.value.status == 413
    assert model.optim_step(STEP).result(timeout=60).step == 1
    with pytest.raises(DataError, match="no rows"):
        model.forward([])


def test_listing_and_tidying_up(here: ServiceClient, service: Service) -> None:
    model = here.create_lora_training_client(str(service.base), rank=2, user_metadata={"who": "me"}).result()
    path = model.save_state("first", user_metadata={"a": "b"}).result().path
    rest = here.create_rest_client()
    run = rest.get_training_run(model.model_id).result()
    assert (run.lora_rank, run.user_metadata, run.corrupted) == (2, {"who": "me"}, False)
    assert run.last_checkpoint is not None
    assert run.last_checkpoint.tinker_path == path
    assert [item.training_run_id for item in rest.list_training_runs().result().training_runs] == [model.model_id]
    rest.set_checkpoint_ttl_from_tinker_path(path, 7200).result()
    rest.publish_checkpoint_from_tinker_path(path).result()
    (found,) = rest.list_checkpoints(model.model_id).result().checkpoints
    assert found.public
    assert found.expires_at is not None
    assert found.user_metadata == {"a": "b"}
    assert rest.get_weights_info_by_tinker_path(path).result().lora_rank == 2
    rest.delete_checkpoint_from_tinker_path(path).result()
    assert rest.list_user_checkpoints().result().checkpoints == ()
    with pytest.raises(ServiceError) as gone:
        here.create_training_client_from_state(path).result()
    assert "no such checkpoint" in str(gone.value)


def test_a_client_that_comes_later_goes_on_from_a_checkpoint(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """It names a path and no base: the checkpoint knows its own."""
    base, state = str(tiny_folder("llama-tied")), tmp_path / "state"
    with ServiceClient(state_dir=state, options=OPTIONS) as first:
        model = first.create_lora_training_client(base, rank=2, seed=1).result()
        model.forward_backward(batch(0)).result()
        model.optim_step(STEP).result()
        path = model.save_state("kept").result().path
        want = model.forward_backward(batch(1)).result().loss_sum
    with pytest.raises(UsageError, match="closed"):
        first.create_rest_client()
    with ServiceClient(state_dir=state, options=OPTIONS) as second:
        resumed = second.create_training_client_from_state_with_optimizer(path).result()
        assert resumed.forward_backward(batch(1)).result().loss_sum == want


def test_the_same_folder_in_one_process_is_one_service(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    base = str(tiny_folder("llama-tied"))
    with ServiceClient(base_model=base, state_dir=tmp_path, options=OPTIONS) as first:
        model = first.create_lora_training_client(base, rank=2).result()
        with ServiceClient(base_model=base, state_dir=tmp_path, options=OPTIONS) as second:
            runs = second.create_rest_client().list_training_runs().result().training_runs
            assert [run.training_run_id for run in runs] == [model.model_id]
        model.forward(batch(0)).result()
        with pytest.raises(UsageError, match="has it open"):
            ServiceClient(base_model=base, state_dir=tmp_path, options={"num_threads": 2})


def test_asking_for_the_head_where_it_cannot_be_trained_is_refused_and_leaves_nothing(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Over a base that transformers runs the service can only warn, for the SDK's default asks for it. Ours takes what
    there is, and raises where the head was asked for by name."""
    base = str(tiny_folder("gpt2"))
    with ServiceClient(base_model=base, state_dir=tmp_path, options={"num_threads": 1}) as client:
        with pytest.raises(ServiceError, match="does not train the output head"):
            client.create_lora_training_client(base, rank=2, train_unembed=True).result()
        for unembed in (None, False):
            model = client.create_lora_training_client(base, rank=2, train_unembed=unembed).result()
            assert (model.get_info().lora_rank, model.get_info().train_unembed) == (2, False)


def test_what_is_wrong_is_said(service: Service, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no base yet"):
        ServiceClient(state_dir=tmp_path).create_rest_client()
    with pytest.raises(UsageError, match="in this process"):
        ServiceClient(base_url=service.url, state_dir=tmp_path)
    with pytest.raises(ConfigError, match="num_thread"):
        ServiceClient(base_model=str(service.base), state_dir=tmp_path, options={"num_thread": 1})
    with pytest.raises(ServiceError, match="not known here") as refused:
        ServiceClient(base_url=service.url, api_key="sk-wrong")
    assert refused.value.status == 401
    with pytest.raises(ServiceUnreachableError, match="foundry service"):
        ServiceClient(base_url="http://127.0.0.1:9", patience_seconds=0.1)


def test_a_killed_service_is_waited_for(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Two operations are pending when the service dies: our client goes on when it is back, with the same bits."""

    def losses(running: Service, *, kill: bool) -> list[float]:
        with ServiceClient(base_url=running.url, api_key=KEY, patience_seconds=60) as client:
            model = client.create_lora_training_client(str(running.base), rank=2, seed=5).result()
            found = []
            for step in range(4):
                done, stepped = model.forward_backward(batch(step)), model.optim_step(STEP)
                if kill and step in (1, 2):
                    running.kill()
                    running.start()
                found.append(done.result(timeout=90).loss_sum)
                stepped.result(timeout=90)
            return found

    with Service(tiny_folder("llama-tied"), tmp_path / "state", "dtype=float32") as running:
        assert losses(running, kill=True) == losses(running, kill=False)


def test_tokenizers_are_those_of_the_base(here: ServiceClient, service: Service) -> None:
    model = here.create_lora_training_client(str(service.base), rank=2).result()
    ids = model.get_tokenizer().encode("hello there")
    assert ids == here.create_sampling_client(base_model=str(service.base)).result().get_tokenizer().encode(
        "hello there"
    )
