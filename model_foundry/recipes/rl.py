"""Reinforcement learning through a training service: sample groups of answers, reward them, learn from the difference.

The loss is importance sampling (a policy gradient that corrects for the numbers the samples were drawn with), the
advantage of an answer how much its reward is above the mean of its group (as GRPO, Shao et al. 2024, without dividing
by the deviation: Liu et al. 2025). Everything random is a function of the seed and the step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from model_foundry.client.sampling import SamplingClient
from model_foundry.client.training import ServiceTrainingClient
from model_foundry.config.rl import RLConfig
from model_foundry.recipes.arithmetic import Problem
from model_foundry.types import AdamParams, Datum, SampledSequence, SamplingParams

logger = logging.getLogger(__name__)


class Environment(Protocol):
    """Problems, and what an answer to one is worth."""

    @property
    def stop_token_ids(self) -> tuple[int, ...]: ...

    @property
    def held_out(self) -> Sequence[Problem]: ...

    def problems(self, step: int) -> Sequence[Problem]: ...

    def reply(self, tokens: np.ndarray) -> str: ...

    def reward(self, problem: Problem, tokens: np.ndarray) -> float: ...


class Recorder(Protocol):
    """Where records and checkpoints go."""

    def append(self, record: dict[str, Any]) -> None: ...

    def save(self, step: int, path: str) -> None: ...


def train(
    model: ServiceTrainingClient,
    environment: Environment,
    config: RLConfig,
    recorder: Recorder,
    *,
    first_step: int = 1,
    stop: Callable[[], bool] = lambda: False,
) -> int:
    """Train from `first_step` to the end, or until `stop`; what was done until then is saved. Returns the last step."""
    if first_step == 1:
        measure(model, environment, config, recorder, step=0)
    adam = AdamParams(learning_rate=config.training.learning_rate, beta1=0.9, beta2=0.95, eps=1e-8)
    for step in range(first_step, config.training.num_steps + 1):
        started = time.perf_counter()
        sampler = model.save_weights_and_get_sampling_client().result()
        groups = sample_groups(sampler, environment, config, step=step)
        sampled = time.perf_counter()
        rewards = [[environment.reward(problem, item.tokens) for item in group] for problem, group in groups]
        rows = learnable(groups, rewards)
        record: dict[str, Any] = {
            "kind": "step",
            "step": step,
            "reward": float(np.mean(rewards)),
            "solved": float(np.mean([max(group) > 0 for group in rewards])),
            "tokens": sum(row.num_tokens for row in rows),
            "rows": len(rows),
            "sample_nats": -float(np.mean(np.concatenate([item.logprobs for _, group in groups for item in group]))),
        }
        if rows:
            done, stepped = model.forward_backward(rows, "importance_sampling"), model.optim_step(adam)
            record |= {"loss": done.result().loss_sum, "grad_norm": stepped.result().grad_norm}
        else:
            logger.warning("step %s: every group is of one mind, so there is nothing to learn from", step)
        clock = {"sampling_seconds": sampled - started, "seconds": time.perf_counter() - started}
        recorder.append(record | {"clock": {name: round(value, 3) for name, value in clock.items()}})
        logger.info("step %s of %s: reward %.3f", step, config.training.num_steps, record["reward"])
        is_last = step == config.training.num_steps
        if is_last:
            measure(model, environment, config, recorder, step=step)
        interrupted = stop() and not is_last
        if is_last or interrupted or step % config.training.save_steps == 0:
            name = "final" if is_last else f"step-{step:08d}"
            recorder.save(step, model.save_state(name, overwrite=True).result().path)
        if interrupted:
            logger.warning("interrupted: saved at step %s of %s", step, config.training.num_steps)
            return step
    return config.training.num_steps


Group = tuple[Problem, Sequence[SampledSequence]]


def sample_groups(sampler: SamplingClient, environment: Environment, config: RLConfig, *, step: int) -> list[Group]:
    """Answers to a step's problems; all requests are under way at once."""
    problems = environment.problems(step)
    pending = [
        sampler.sample(
            problem.prompt,
            config.training.samples_per_problem,
            SamplingParams(
                max_tokens=config.training.max_tokens,
                temperature=config.training.temperature,
                seed=int(np.random.default_rng([config.seed, 2, step, number]).integers(2**31)),
                stop_token_ids=environment.stop_token_ids,
            ),
        )
        for number, problem in enumerate(problems)
    ]
    return [(problem, item.result().sequences) for problem, item in zip(problems, pending, strict=True)]


def learnable(groups: Sequence[Group], rewards: Sequence[Sequence[float]]) -> list[Datum]:
    """Rows for importance sampling: advantages on the answers' tokens, over the number of answers; groups whose
    rewards are all the same teach nothing and are left out."""
    num_answers = sum(len(group) for _, group in groups)
    rows = []
    for (problem, group), worth in zip(groups, rewards, strict=True):
        mean = float(np.mean(worth))
        if all(value == worth[0] for value in worth):
            continue
        for item, value in zip(group, worth, strict=True):
            rows.append(_row(problem.prompt, item, (value - mean) / num_answers))
    return rows


def _row(prompt: np.ndarray, answer: SampledSequence, advantage: float) -> Datum:
    tokens = np.concatenate([prompt, answer.tokens]).astype(np.int32)
    ahead = np.zeros(len(prompt) - 1, np.float32)
    return Datum(
        tokens[:-1],
        {
            "target_tokens": tokens[1:],
            "logprobs": np.concatenate([ahead, answer.logprobs]).astype(np.float32),
            "advantages": np.concatenate([ahead, np.full(len(answer.tokens), advantage)]).astype(np.float32),
        },
    )


def measure(
    model: ServiceTrainingClient,
    environment: Environment,
    config: RLConfig,
    recorder: Recorder,
    *,
    step: int,
) -> None:
    """The likeliest answer to each problem that is never trained on."""
    sampler = model.save_weights_and_get_sampling_client().result()
    params = SamplingParams(max_tokens=config.training.max_tokens, stop_token_ids=environment.stop_token_ids)
    pending = [sampler.sample(problem.prompt, 1, params) for problem in environment.held_out]
    answers = []
    for problem, item in zip(environment.held_out, pending, strict=True):
        tokens = item.result().sequences[0].tokens
        answers.append({"problem": problem.text, "answer": problem.answer, "reply": environment.reply(tokens),
                        "reward": environment.reward(problem, tokens)})  # fmt: skip
    reward = float(np.mean([answer["reward"] for answer in answers]))
    recorder.append({"kind": "held_out", "step": step, "reward": reward, "answers": answers})
    logger.info("step %s: held-out reward %.3f", step, reward)
