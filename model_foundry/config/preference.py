"""The schema of `foundry train` with `method: dpo`: of two answers to a prompt, one is to become likelier."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from model_foundry.config.schema import CriteriaSection, DataSection, TrainConfig, TrainingSection
from model_foundry.config.section import Fraction, PositiveInt, Section, broken_rule

SMOOTHED_LOSSES = ("sigmoid", "robust")
"""Those that read `label_smoothing`."""
LOSSES_ALONE = ("orpo",)
"""Those that have no reference."""


class DpoSection(Section):
    loss: Literal["sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "nca_pair", "apo_zero", "apo_down", "orpo"] = (
        "sigmoid"
    )
    """Loss of a pair, by TRL's names. sigmoid is DPO's own; with label_smoothing it is cDPO's. orpo has no reference:
    it imitates the better answer as fine-tuning does and sets its odds above the worse one's."""
    beta: Annotated[float, Field(gt=0, le=100)] = 0.1
    """How dearly each step away from the reference is paid for: the scale of the rewards, in rewards a nat. Of
    orpo: the weight of the odds beside the imitation."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of the pairs that are taken to be the wrong way round; read by the losses sigmoid and robust."""

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if self.label_smoothing and self.loss not in SMOOTHED_LOSSES:
            what = f"label_smoothing is read by the losses {' and '.join(SMOOTHED_LOSSES)}, and dpo.loss is {self.loss}"
            raise broken_rule("label_smoothing", what)
        return self


class PairsSection(DataSection):
    format: Literal["auto", "preference"] = "auto"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Rows are pairs: {"prompt", "chosen", "rejected"}, or two conversations that begin alike."""
    train_on: Literal["last_assistant"] = "last_assistant"  # pyright: ignore[reportIncompatibleVariableOverride]
    """What is compared: the answer that a pair ends with, its end-of-turn token included."""

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if self.packing:
            what = "data.packing fills bins with rows, and dpo's batches are batch_size pairs, none of which is padded"
            raise broken_rule("packing", what)
        return self


class DpoTrainingSection(TrainingSection):
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the training pairs; a max_steps beside it, or given later, goes before it."""
    batch_size: PositiveInt = 8
    """Pairs a forward and backward pass."""
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 2e-5
    """Peak learning rate; a tenth of what fine-tuning takes, or less."""


class DpoCriteriaSection(CriteriaSection):
    pairs_preferred: Fraction | None = 0.6
    """More than this share of the validation pairs (training pairs where there are none) must end with a higher reward
    for the better answer; null does not check."""


class DpoConfig(TrainConfig):
    """Everything `foundry train` reads with `method: dpo`."""

    method: Literal["dpo"] = "dpo"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Training method. dpo: direct preference optimisation on pairs of answers (Rafailov et al. 2023)."""
    dpo: DpoSection = DpoSection()
    """The loss of a pair."""
    data: PairsSection = PairsSection()
    """Training and validation pairs."""
    training: DpoTrainingSection = DpoTrainingSection()
    """Optimisation, schedule and checkpoints."""
    criteria: DpoCriteriaSection = DpoCriteriaSection()
    """What counts as success; a criterion that fails makes the exit code 1."""
