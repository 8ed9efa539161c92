"""The schema of `foundry rl`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from model_foundry.config.section import NonNegativeInt, PositiveInt, Section, broken_rule


class PolicySection(Section):
    """What is trained."""

    name: str = "smollm2-135m-instruct"
    """The base that gets an adapter; over a URL, as that service names it."""
    rank: Annotated[int, Field(ge=1, le=512)] = 16
    """Rank of the adapter; alpha is 32."""


class WhereSection(Section):
    """Where it is trained: a training service, here or elsewhere."""

    url: str | None = None
    """Of a training service; default one in this process, with its state in the run's folder."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type of a service in this process."""
    num_threads: PositiveInt | None = None
    """CPU threads of a service in this process; default every core."""

    @model_validator(mode="after")
    def _are_of_this_process(self) -> Self:
        if self.url is not None and (self.dtype != "auto" or self.num_threads is not None):
            field = "num_threads" if self.dtype == "auto" else "dtype"
            raise broken_rule(field, "is of a service in this process, and service.url names one elsewhere")
        return self


class ProblemsSection(Section):
    """Arithmetic with a programmatic reward: 1 for the right number and nothing else, 0 otherwise."""

    operation: Literal["add", "subtract", "multiply"] = "add"
    """What is to be done with two numbers."""
    largest: Annotated[int, Field(ge=3, le=999)] = 9
    """Numbers are from 0 to this."""
    num_held_out: PositiveInt = 20
    """Problems that are never trained on, and asked before and after."""


class PolicyTrainingSection(Section):
    """How it is trained."""

    num_steps: PositiveInt = 30
    """Optimizer steps, each on samples of the policy as it is."""
    problems_per_step: PositiveInt = 8
    """Problems of a step."""
    samples_per_problem: Annotated[int, Field(ge=2, le=1024)] = 8
    """Answers to each; what counts is how much better than their mean one is."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of the samples."""
    max_tokens: PositiveInt = 4
    """Longest answer."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Of AdamW, constant."""
    save_steps: PositiveInt = 10
    """Steps between checkpoints."""


class ConsoleSection(Section):
    level: Literal["debug", "info", "warning", "error"] = "info"
    """Console level; the run's own log always holds everything."""


class RLConfig(Section):
    """Everything `foundry rl` reads."""

    run_dir: Path = Path("runs/rl")
    """Folder of the run."""
    seed: NonNegativeInt = 0
    """Of the adapter, the problems and the samples."""
    model: PolicySection = PolicySection()
    service: WhereSection = WhereSection()
    problems: ProblemsSection = ProblemsSection()
    training: PolicyTrainingSection = PolicyTrainingSection()
    logging: ConsoleSection = ConsoleSection()
