"""The section `training` as values: how many steps, at which rate, by which update. The same for every method."""

from __future__ import annotations

import math

from model_foundry.config.schema import TrainingSection
from model_foundry.errors import ConfigError
from model_foundry.recipes.schedule import LearningRate
from model_foundry.types import AdamParams, MuonParams, OptimParams


def adam_params(training: TrainingSection, rate: float) -> OptimParams:
    """One update at this learning rate, by the optimizer that the section names."""
    if training.optimizer == "muon":
        return MuonParams(
            learning_rate=rate,
            momentum=training.muon_momentum,
            beta1=training.adam_beta1,
            beta2=training.adam_beta2,
            eps=training.adam_epsilon,
            weight_decay=training.weight_decay,
            grad_clip_norm=training.max_grad_norm,
        )
    return AdamParams(
        learning_rate=rate,
        beta1=training.adam_beta1,
        beta2=training.adam_beta2,
        eps=training.adam_epsilon,
        weight_decay=training.weight_decay,
        grad_clip_norm=training.max_grad_norm,
    )


def count_steps(training: TrainingSection, batches_per_epoch: int) -> tuple[int, int]:
    """(micro-batches, optimizer steps) of the whole run."""
    per_step = training.gradient_accumulation_steps
    if training.max_steps is not None:
        return training.max_steps * per_step, training.max_steps
    num_micro_batches = max(1, round(training.epochs * batches_per_epoch))
    return num_micro_batches, math.ceil(num_micro_batches / per_step)


def require_saves(training: TrainingSection, total_steps: int) -> None:
    """Refuse saves that will never come.

    Raises:
        ConfigError: a step of save_at lies beyond the last one.
    """
    beyond = [step for step in training.save_at if step > total_steps]
    if beyond:
        what = f"step {beyond[0]:,} is beyond the last of {total_steps:,} steps, so nothing would be saved there"
        raise ConfigError(
            what, where="training.save_at", hint="Leave it out, or train longer; the end is always saved."
        )


def learning_rate(training: TrainingSection, total_steps: int) -> LearningRate:
    """The schedule over so many steps.

    Raises:
        ConfigError: warm-up and decay leave no step between them.
    """
    warmup = training.warmup_steps
    if warmup is None:
        warmup = math.ceil(training.warmup_ratio * total_steps)
    if warmup >= total_steps and (total_steps > 1 or training.warmup_steps):
        raise ConfigError(
            f"{warmup} warm-up steps leave nothing of {total_steps} steps", where="training.warmup_steps",
            hint="Lower it, or train longer.",
        )  # fmt: skip
    decay = math.ceil(training.decay_ratio * total_steps)
    if training.lr_scheduler == "wsd" and warmup + decay > total_steps + 1:
        raise ConfigError(
            f"{warmup} steps of warm-up and {decay} of decay are more than all {total_steps} steps",
            where="training.decay_ratio", hint="Lower it or training.warmup_steps, or train longer.",
        )  # fmt: skip
    return LearningRate(
        peak=training.learning_rate,
        shape=training.lr_scheduler,
        warmup_steps=min(warmup, total_steps - 1),
        total_steps=total_steps,
        decay_steps=min(decay, total_steps - min(warmup, total_steps - 1)),
        min_ratio=training.min_lr_ratio,
    )
