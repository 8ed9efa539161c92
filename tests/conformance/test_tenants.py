"""Several tenants at once: what each gets is what it would get alone, and none waits for another's long work."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker
from tinker import types

from tests.service_rig import Service, datum

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def service(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    state = tmp_path_factory.mktemp("tenants") / "state"
    with Service(tiny_folder("llama-tied"), state, "dtype=float32", "micro_batch_tokens=64") as running:
        yield running


def client(service: Service, tenant: str) -> tinker.ServiceClient:
    return tinker.ServiceClient(base_url=service.url, api_key=f"tml-{tenant}")


LONG = types.SamplingParams(max_tokens=400, seed=4, stop=[])
PROMPT = types.ModelInput.from_ints([5, 6, 7, 8])


def long_samples(service: Service, tenant: str) -> list[list[int]]:
    sampler: Any = client(service, tenant).create_sampling_client(base_model=str(service.base)).result()
    return [each.tokens for each in sampler.sample(PROMPT, num_samples=8, sampling_params=LONG).result().sequences]


def train(service: Service, tenant: str, *, steps: int = 4) -> list[float]:
    model = client(service, tenant).create_lora_training_client(base_model=str(service.base), rank=4, seed=1).result()
    losses = []
    for _ in range(steps):
        done = model.forward_backward([datum(row, length=20) for row in range(8)], "cross_entropy")
        model.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        losses.append(done.result().metrics["loss:sum"])
    return losses


def test_training_goes_on_beside_a_long_sample_and_neither_changes(service: Service) -> None:
    """One sample of many tokens made every other client wait for its end."""
    alone, losses = long_samples(service, "alone"), train(service, "alone")
    ends: dict[str, float] = {}
    got: list[list[list[int]]] = []

    def sample() -> None:
        got.append(long_samples(service, "sampler"))
        ends["sample"] = time.monotonic()

    thread = threading.Thread(target=sample)
    thread.start()
    time.sleep(0.3)
    beside = train(service, "trainer")
    ends["train"] = time.monotonic()
    thread.join()
    assert got == [alone]
    assert beside == losses
    assert ends["train"] < ends["sample"]


def seconds_used(service: Service) -> dict[str, float]:
    found = httpx.get(f"{service.url}/page/state.json").json()["queues"]
    return {queue["tenant"]: queue["seconds"] for queue in found}


def test_tenants_of_different_sizes_and_ranks_get_the_same_time(service: Service) -> None:
    """Requests of 20 to 320 tokens, always some waiting: Jain's index of the time that each was given."""
    over = threading.Event()
    errors: list[BaseException] = []
    ready = threading.Barrier(5)

    def busy(number: int) -> None:
        try:
            model: Any = (
                client(service, f"fair-{number}")
                .create_lora_training_client(base_model=str(service.base), rank=2 << number)
                .result()
            )
            rows = [datum(row, length=20) for row in range(2 * number * number + 1)]
            waiting = [model.forward_backward(rows, "cross_entropy") for _ in range(6)]
            ready.wait(timeout=60)
            while not over.is_set():
                waiting.append(model.forward_backward(rows, "cross_entropy"))
                waiting.pop(0).result()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=busy, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    ready.wait(timeout=60)
    before = seconds_used(service)
    time.sleep(6)
    after = seconds_used(service)
    over.set()
    for thread in threads:
        thread.join()
    assert not errors, errors
    shares = [after[tenant] - before.get(tenant, 0.0) for tenant in after if after[tenant] > before.get(tenant, 0.0)]
    assert len(shares) == 4
    assert sum(shares) ** 2 / (len(shares) * sum(share**2 for share in shares)) >= 0.95, shares


def test_more_models_than_fit_take_turns_and_come_back_as_they_were(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Two of five fit in memory: adapters of mixed ranks come back from the disk with the bits of those that stay."""

    def losses(place: str, *options: str) -> list[list[float]]:
        with Service(tiny_folder("llama-tied"), tmp_path / place, "dtype=float32", *options) as own:
            models: list[Any] = [
                client(own, f"tenant-{number}")
                .create_lora_training_client(base_model=str(own.base), rank=1 << number, seed=number)
                .result()
                for number in range(5)
            ]
            found: list[list[float]] = [[] for _ in models]
            for _ in range(3):
                done = [model.forward_backward([datum(7, length=20)], "cross_entropy") for model in models]
                for model in models:
                    model.optim_step(types.AdamParams(learning_rate=1e-2)).result()
                for number, future in enumerate(done):
                    found[number].append(future.result().metrics["loss:sum"])
            return found

    want = losses("all")
    assert losses("two", "max_resident_models=2") == want
    assert losses("small", "max_resident_mb=1") == want


def test_a_key_that_has_its_share_of_the_disk_saves_no_more(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    options = ("dtype=float32", "max_checkpoint_mb_per_key=1")
    with Service(tiny_folder("llama-tied"), tmp_path / "state", *options) as own:
        model: Any = client(own, "hog").create_lora_training_client(base_model=str(own.base), rank=256).result()
        model.forward_backward([datum(1)], "cross_entropy").result()
        model.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        path = model.save_state("first").result().path
        with pytest.raises(tinker.RequestFailedError, match="may take 1,000,000"):
            model.save_state("second").result()
        with pytest.raises(tinker.APIStatusError, match="may take 1,000,000"):
            client(own, "hog").create_rest_client().copy_weights(path, destination_project_id="more").result()
        guest: Any = client(own, "guest").create_lora_training_client(base_model=str(own.base), rank=1).result()
        assert guest.save_state("mine").result().path
        client(own, "hog").create_rest_client().delete_checkpoint_from_tinker_path(path).result()
        assert model.save_state("third").result().path


def test_hundreds_of_questions_are_held_and_none_is_answered_with_a_fault(service: Service) -> None:
    """A client retries at once after a 5xx: one fault under load makes more of it."""

    async def ask() -> list[int]:
        headers, limits = {"X-API-Key": "tml-many"}, httpx.Limits(max_connections=300)
        async with httpx.AsyncClient(
            base_url=f"{service.url}/api/v1/", headers=headers, timeout=60, limits=limits
        ) as api:
            prompt = {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]}
            body = {"prompt": prompt, "num_samples": 16, "sampling_params": {"max_tokens": 300, "stop": []}}
            asked = [(await api.post("asample", json=body)).json()["request_id"] for _ in range(3)]
            calls = [api.post("retrieve_future", json={"request_id": asked[number % 3]}) for number in range(300)]
            return [answer.status_code for answer in await asyncio.gather(*calls)]

    assert set(asyncio.run(ask())) <= {200, 408}


def test_a_base_that_transformers_runs_is_trained_and_sampled_one_by_one(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """It has no running batch and no shared passes, and must be answered all the same."""
    with Service(tiny_folder("gpt2"), tmp_path / "state", "dtype=float32") as own:
        losses = train(own, "one", steps=2)
        assert losses[1] < losses[0]
        sampler: Any = client(own, "one").create_sampling_client(base_model=str(own.base)).result()
        params = types.SamplingParams(max_tokens=5, seed=4, stop=[])
        answers = [sampler.sample(PROMPT, num_samples=2, sampling_params=params).result() for _ in range(2)]
        texts = [[sequence.tokens for sequence in answer.sequences] for answer in answers]
        assert texts[0] == texts[1]
        assert [len(tokens) for tokens in texts[0]] == [5, 5]


BROKEN = """
import asyncio, sys
from model_foundry.config.load import load_config
from model_foundry.config.service import ServiceConfig
from model_foundry.service.running import running

async def main():
    overrides = [f"base_model={sys.argv[1]}", f"state_dir={sys.argv[2]}", "num_threads=1"]
    async with running(load_config(ServiceConfig, path=None, overrides=overrides).config, every_key=True) as front:
        front.worker.call(lambda: 1 / 0)
        await asyncio.sleep(60)

asyncio.run(main())
"""


def test_a_service_whose_worker_fails_ends(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """It answered that it was well, took every operation, and did none of them."""
    arguments = [sys.executable, "-c", BROKEN, str(tiny_folder("llama-tied")), str(tmp_path / "state")]
    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=55)
    assert ended.returncode == -signal.SIGTERM
    assert "the worker failed" in ended.stderr
    assert "ZeroDivisionError" in ended.stderr
