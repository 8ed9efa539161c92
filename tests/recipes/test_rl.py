"""Reinforcement learning on a tiny model: the reward rises, the same here and over HTTP, and a killed run goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model_foundry import ServiceClient
from model_foundry.config.rl import PolicyTrainingSection, RLConfig
from model_foundry.recipes import rl
from model_foundry.recipes.arithmetic import Problem
from model_foundry.types import SampledSequence
from tests.service_rig import KEY, Service

OPTIONS = {"num_threads": 1, "dtype": "float32"}
CONFIG = RLConfig(
    seed=1,
    training=PolicyTrainingSection(
        num_steps=12, problems_per_step=2, samples_per_problem=16, max_tokens=4, learning_rate=3e-2, save_steps=5
    ),
)


class SmallTokens:
    """Worth is the share of tokens in the lower half of the vocabulary: a random model starts near a half."""

    stop_token_ids: tuple[int, ...] = ()
    held_out: Sequence[Problem] = ()

    def __init__(self) -> None:
        self.held_out = self.problems(0)

    def problems(self, step: int) -> Sequence[Problem]:
        return [Problem("", np.array([5 + step, 9, 40 + number], np.int32), "") for number in range(2)]

    def reply(self, tokens: np.ndarray) -> str:
        return " ".join(map(str, tokens))

    def reward(self, problem: Problem, tokens: np.ndarray) -> float:
        return float(np.mean(tokens < 150))


class Records:
    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.saved: list[tuple[int, str]] = []

    def append(self, record: dict[str, Any]) -> None:
        self.steps.append({name: value for name, value in record.items() if name != "clock"})

    def save(self, step: int, path: str) -> None:
        self.saved.append((step, path))


def trained(client: ServiceClient, base: Path, *, stop_after: int | None = None) -> Records:
    records = Records()
    model = client.create_lora_training_client(str(base), rank=8, seed=3).result()
    steps = records.steps
    rl.train(model, SmallTokens(), CONFIG, records,
             stop=lambda: stop_after is not None and steps[-1]["step"] >= stop_after)  # fmt: skip
    return records


@pytest.mark.slow
def test_the_reward_rises_the_same_everywhere_and_a_stopped_run_goes_on(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """An advantage of the wrong sign, a loss on the prompt, samples of stale weights, or a seed that time decides."""
    base = tiny_folder("llama-tied")
    with ServiceClient(base_model=str(base), state_dir=tmp_path / "here", options=OPTIONS) as client:
        here = trained(client, base)
        stopped = trained(client, base, stop_after=7)
        ((at, path),) = stopped.saved[-1:]
        assert at == 7
        resumed = Records()
        model = client.create_training_client_from_state_with_optimizer(path).result()
        rl.train(model, SmallTokens(), CONFIG, resumed, first_step=8)
    assert stopped.steps + resumed.steps == here.steps
    rewards = [record["reward"] for record in here.steps if record["kind"] == "step"]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.2
    service = Service(base, tmp_path / "there", "dtype=float32")
    with service, ServiceClient(base_url=service.url, api_key=KEY) as client:
        there = trained(client, base)
    assert there.steps == here.steps


def test_advantages_are_centred_in_each_group_and_on_the_answer_alone() -> None:
    def answer(*tokens: int) -> SampledSequence:
        return SampledSequence(np.array(tokens, np.int32), np.full(len(tokens), -1.0, np.float32), "stop")

    problem = Problem("", np.array([1, 2, 3], np.int32), "")
    groups: list[rl.Group] = [(problem, [answer(7, 8), answer(9)]), (problem, [answer(4), answer(5)])]
    rows = rl.learnable(groups, [[1.0, 0.0], [1.0, 1.0]])
    assert len(rows) == 2  # a group of one mind teaches nothing
    np.testing.assert_array_equal(rows[0].tokens, [1, 2, 3, 7])
    np.testing.assert_array_equal(rows[0].loss_inputs["target_tokens"], [2, 3, 7, 8])
    np.testing.assert_array_equal(rows[0].loss_inputs["advantages"], np.array([0, 0, 0.125, 0.125], np.float32))
    np.testing.assert_array_equal(rows[0].loss_inputs["logprobs"], [0, 0, -1, -1])
    np.testing.assert_array_equal(rows[1].loss_inputs["advantages"], np.array([0, 0, -0.125], np.float32))
