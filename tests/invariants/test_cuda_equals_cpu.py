"""On a CUDA device the engine computes what it does on a CPU, within stated bounds. Run where there is one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from model_foundry.engine.torch_engine import TorchEngine
from model_foundry.types import AdamParams, LoraConfig, SamplingParams
from tests.tiny_models import random_data

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="no NVIDIA driver")]
# With a driver and a torch that was built for CPUs these fail: skipped, nobody would see that a GPU is left untested.

TinyFolder = Callable[[str], Path]
DEVICE = "cuda"
LENGTHS = (30, 7, 61)
LORA = LoraConfig(r=4, lora_alpha=12.0)
PARAMS = AdamParams(learning_rate=3e-3, grad_clip_norm=1.0)
BOUND = 1e-4
"""Largest difference of log-probabilities in nats, float32."""
CURVE_BOUND = 1e-3
"""Largest relative difference of a loss within twenty steps, float32: straight, resumed, or on a CPU."""


def engine(device: str) -> TorchEngine:
    return TorchEngine(device=device, dtype="float32")


def curve(own: TorchEngine, model_id: str, steps: range) -> list[float]:
    losses = []
    for step in steps:
        losses.append(own.forward_backward(model_id, random_data((24, 17, 9), seed=step % 4)).loss_sum)
        own.optim_step(model_id, PARAMS)
    return losses


@pytest.mark.parametrize("kind", ["llama-tied", "qwen3-sliding", "qwen3-moe"])
def test_log_probabilities_are_the_cpus(kind: str, tiny_folder: TinyFolder) -> None:
    """An attention kernel that ignores the rows' borders, or the window, shows here and nowhere on a CPU."""
    data = random_data(LENGTHS)
    rows = []
    for device in ("cpu", DEVICE):
        own = engine(device)
        rows.append(own.forward(own.create_model(tiny_folder(kind), lora=LORA), data, logprobs="all").logprobs)
    for cpu, device in zip(*rows, strict=True):
        assert np.abs(cpu - device).max() < BOUND


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_twenty_steps_are_the_cpus(lora: LoraConfig | None, tiny_folder: TinyFolder) -> None:
    losses = []
    for device in ("cpu", DEVICE):
        own = engine(device)
        losses.append(curve(own, own.create_model(tiny_folder("llama-tied"), lora=lora), range(20)))
    assert losses[0][-1] < losses[0][0]
    assert np.allclose(*losses, rtol=CURVE_BOUND)


def test_stopped_and_gone_on_stays_within_the_bound(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    """Sums on a GPU may come in another order, so the same bits are not promised; the same run is."""
    straight = engine(DEVICE)
    losses = curve(straight, straight.create_model(tiny_folder("qwen2"), lora=LORA), range(10))
    first, second = engine(DEVICE), engine(DEVICE)
    stopped = first.create_model(tiny_folder("qwen2"), lora=LORA)
    curve(first, stopped, range(6))
    first.save_state(stopped, tmp_path)
    resumed = second.create_model(tiny_folder("qwen2"), lora=LORA)
    assert second.load_state(resumed, tmp_path, optimizer=True) == ()
    assert np.allclose(curve(second, resumed, range(6, 10)), losses[6:], rtol=CURVE_BOUND)


def test_greedy_answers_are_the_cpus(tiny_folder: TinyFolder) -> None:
    prompts = [datum.tokens for datum in random_data((23, 5))]
    answers = []
    for device in ("cpu", DEVICE):
        own = engine(device)
        found = own.sample(
            own.create_model(tiny_folder("llama"), lora=None, trainable=False), prompts, SamplingParams(max_tokens=12)
        )
        answers.append([row.tokens.tolist() for row in found])
    assert answers[0] == answers[1]
