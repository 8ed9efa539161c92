"""`kill -9` at any instant changes nothing but the time it takes: the official client goes on, the bits are the same.

The service is killed while two unmodified clients train and sample, and started again; what they end with is compared,
byte by byte, with what they end with when nobody is killed. Passes of both share the base's products as it happens, and
are done again alone: another bit in a shared one would be seen here.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import tinker
from tinker import types

from tests.service_rig import KEY, Service, batch, files_of

STEPS = 8


def train(url: str, base: Path, *, seed: int, begun: threading.Barrier) -> list[list[int]]:
    """Passes sent ahead of their results, steps whose betas change, a save, a load with optimizer, a last save.

    Returns:
        Tokens sampled half-way, while the other client trains.
    """
    sampled: list[list[int]] = []
    client = tinker.ServiceClient(base_url=url, api_key=KEY)
    model = client.create_lora_training_client(base_model=str(base), rank=4 + seed, seed=seed).result()
    # The SDK gives a creation up after a minute without a connection; whatever comes later, after five or never.
    begun.wait(timeout=120)
    for step in range(STEPS):
        passes = [model.forward_backward(batch(seed * 1000 + step), "cross_entropy") for _ in range(2)]
        done = model.optim_step(types.AdamParams(learning_rate=1e-2, beta1=0.8 + 0.01 * step, grad_clip_norm=5.0))
        for future in (*passes, done):
            future.result()
        if step == STEPS // 2:
            path = model.save_state(f"middle-{seed}").result().path
            sampler = model.save_weights_and_get_sampling_client(f"sampler-{seed}")
            params = types.SamplingParams(max_tokens=60, seed=seed, stop=[])
            answer = sampler.sample(types.ModelInput.from_ints([5, 6, 7]), num_samples=3, sampling_params=params)
            sampled = [sequence.tokens for sequence in answer.result().sequences]
            model = client.create_training_client_from_state_with_optimizer(path).result()
    model.save_state(f"end-{seed}").result()
    return sampled


def run(base: Path, state: Path, kills: Iterable[float]) -> tuple[dict[str, Any], list[float]]:
    """Train two clients at once; kill the service after each of so many seconds, and start it again.

    Returns:
        What they end with, and the kills that hit a client at work: there may be more seconds than they need.
    """
    with Service(base, state, "snapshot_seconds=0.05") as service:
        errors: list[BaseException] = []
        sampled: dict[str, list[list[int]]] = {}
        begun = threading.Barrier(3)

        def client(seed: int) -> None:
            try:
                sampled[f"samples-{seed}"] = train(service.url, base, seed=seed, begun=begun)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=client, args=(seed,)) for seed in (1, 2)]
        for thread in threads:
            thread.start()
        begun.wait(timeout=120)
        hits: list[float] = []
        for seconds in kills:
            time.sleep(seconds)
            if not any(thread.is_alive() for thread in threads):
                break
            hits.append(seconds)
            service.kill()
            service.start()
        for thread in threads:
            thread.join()
        assert not errors, errors
    ends = {f"end-{seed}": files_of(next(state.glob(f"runs/*/weights/end-{seed}"))) for seed in (1, 2)}
    return {**ends, **sampled}, hits


@pytest.fixture(scope="module")
def undisturbed(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tiny_folder("llama-tied"), tmp_path_factory.mktemp("straight") / "state", [])[0]


def check(seed: int, at_most: int, base: Path, folder: Path, want: dict[str, Any]) -> int:
    """Kill at random instants until both clients are done, or so often; returns how often that was."""
    draw = random.Random(seed)
    found, kills = run(base, folder / f"state-{seed}", [draw.uniform(0.0, 1.0) for _ in range(at_most)])
    assert found == want, f"killed after {kills}"
    return len(kills)


@pytest.mark.slow
def test_a_service_killed_three_times_ends_with_the_same_bits(
    undisturbed: dict[str, Any], tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """An operation that is lost, done twice, or done again from another state changes the last bit at least."""
    assert {"adapter_model.safetensors", "optimizer.safetensors"} == undisturbed["end-1"].keys()
    # After so short a time a client is at work whatever the machine.
    base, draw = tiny_folder("llama-tied"), random.Random(0)
    found, kills = run(base, tmp_path / "state", [draw.uniform(0.0, 0.6) for _ in range(3)])
    assert found == undisturbed, f"killed after {kills}"
    assert len(kills) == 3


@pytest.mark.prove
@pytest.mark.timeout(7200)
def test_two_hundred_kills(undisturbed: dict[str, Any], tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Two hundred that hit a client at work, over as many runs as that takes."""
    num_kills = 0
    for seed in itertools.count(1):
        num_kills += check(seed, min(8, 200 - num_kills), tiny_folder("llama-tied"), tmp_path, undisturbed)
        if num_kills == 200:
            return
