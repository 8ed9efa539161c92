"""Several tenants at once: what each gets is what it would get alone, and none waits for another's long work."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
