"""Preference training (DPO) as a `Work`: pairs instead of rows, a reference that the model itself is asked for once.

The reference is the model as training finds it: the base under a fresh adapter, which changes nothing yet; a fine-tuned
model where `model.name` names a run; the weights themselves where every one is trained. So no second model is held.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Self

import numpy as np

from model_foundry.client.local import TrainingClient
from model_foundry.config.preference import LOSSES_ALONE, SMOOTHED_LOSSES, DpoConfig
from model_foundry.config.schema import TrainConfig
from model_foundry.data.gate.reading import Reading
from model_foundry.data.pairs import tokenise_pairs
from model_foundry.data.tokenise import TokenisedSet
from model_foundry.models.hashes import file_sha256
from model_foundry.recipes.preparation import Prepared, Tokenised, prepare_as, say_what_became
from model_foundry.recipes.reference import reference_batches, reference_folder, reference_key, reference_logprobs
from model_foundry.recipes.work import Objective
from model_foundry.rendering import Renderer
from model_foundry.types import Datum

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedPairs(Prepared):
    """What preference training is made of; a `Work`. The datums of `train` and `validation` are pairs.

    Until `begun` the reference's log-probabilities are zeros, which is enough for plans and trials.
    """

    @property
    def dpo_config(self) -> DpoConfig:
        assert isinstance(self.config, DpoConfig)
        return self.config

    @property
    def has_reference(self) -> bool:
        return self.dpo_config.dpo.loss not in LOSSES_ALONE

    @property
    def objective(self) -> Objective:
        dpo = self.dpo_config.dpo
        settings = {"beta": dpo.beta}
        if dpo.loss in SMOOTHED_LOSSES:
            settings["label_smoothing"] = dpo.label_smoothing
        return Objective(f"dpo_{dpo.loss}", settings)

    @property
    def batches_read_before(self) -> Sequence[Sequence[Datum]]:
        if not self.has_reference:
            return ()
        both = (self.train, self.validation)
        return [batch for data in both if data is not None for batch in reference_batches(data.datums)]

    def weight_of(self, data: Sequence[Datum]) -> float:
        """A step's loss is the mean over its pairs."""
        return float(len(data))

    def begun(self, client: TrainingClient, facts: Mapping[str, Any]) -> Self:
        """The same with the reference's log-probabilities, read from the disk where they are there and whole."""
        if not self.has_reference:
            return self
        validation = None if self.validation is None else self._with_reference(self.validation, client, facts)
        return replace(self, train=self._with_reference(self.train, client, facts), validation=validation)

    def _with_reference(self, data: TokenisedSet, client: TrainingClient, facts: Mapping[str, Any]) -> TokenisedSet:
        key = reference_key(data.datums, model=self.starting_weights(), facts=facts)
        logprobs = reference_logprobs(client, data.datums, folder=reference_folder(self.config.run_dir), key=key)
        datums = tuple(with_logprobs(*each) for each in zip(data.datums, logprobs, strict=True))
        return replace(data, datums=datums)

    def starting_weights(self) -> dict[str, Any]:
        """What decides the reference, as JSON values."""
        model, adapter = self.config.model, self.source.adapter
        files = () if adapter is None else ("adapter_config.json", "adapter_model.safetensors")
        # A fresh adapter adds exact zeros; DoRA's also divides by a norm, which rounds.
        dora = self.config.lora.model_dump(mode="json") if self.config.lora.use_dora else None
        return {
            "model": self.model_fingerprint,
            "adapter": [file_sha256(adapter / name) for name in files] if adapter else None,
            "implementation": model.implementation,
            "attention": model.attention,
            "quantization": model.quantization,
            "dora": dora,
        }

    def measures(self, data: Sequence[Datum], logprobs: Sequence[np.ndarray]) -> dict[str, float]:
        """By TRL's names: rewards are beta times how much likelier an answer is than under the reference.

        Without a reference an answer's reward is beta times its mean log-probability.
        """
        if not data:
            return {}
        beta = self.dpo_config.dpo.beta
        policy = np.array([sums_of_answers(datum, each) for datum, each in zip(data, logprobs, strict=True)])
        if self.has_reference:
            reference = np.array([sums_of_answers(datum, datum.loss_inputs["logprobs"]) for datum in data])
            rewards = beta * (policy - reference)
        else:
            sizes = [sums_of_answers(datum, np.ones(datum.num_tokens)) for datum in data]
            rewards = beta * policy / np.array(sizes)
        margins = rewards[:, 0] - rewards[:, 1]
        return {
            "rewards/chosen": float(rewards[:, 0].mean()),
            "rewards/rejected": float(rewards[:, 1].mean()),
            "rewards/margins": float(margins.mean()),
            "rewards/accuracies": float((margins > 0).mean()),
            "logps/chosen": float(policy[:, 0].mean()),
            "logps/rejected": float(policy[:, 1].mean()),
        }

    def data_summary(self) -> dict[str, Any]:
        summary = super().data_summary()
        for role, data in (("train", self.train), ("validation", self.validation)):
            if data is not None:
                summary[role]["shared_tokens"] = sum(datum.num_shared for datum in data.datums)
        return summary


def prepare_pairs(config: DpoConfig, *, now: datetime) -> PreparedPairs:
    """Everything that preference training needs before its first step; errors as for `preparation.prepare_as`."""
    return prepare_as(PreparedPairs, config, now=now, tokenise=_tokenised_pairs)


def _tokenised_pairs(config: TrainConfig, reading: Reading, renderer: Renderer) -> Tokenised:
    rows, data = reading.require(), config.data
    made = tokenise_pairs(rows, renderer, max_length=data.max_length, overlength=data.overlength)
    say_what_became(rows, made.pairs, max_length=data.max_length, noun="pairs")
    if made.pairs.datums:
        logger.info("%s: %s tokens of prompts are read once for two answers", rows.path, f"{made.num_shared:,}")
    datums = tuple(with_logprobs(datum, np.zeros(datum.num_tokens, dtype=np.float32)) for datum in made.pairs.datums)
    return Tokenised(replace(made.pairs, datums=datums), rendered=made.answers)


def with_logprobs(datum: Datum, logprobs: np.ndarray) -> Datum:
    """The pair beside a reference, float32 [T]; zero where no loss is due."""
    return replace(datum, loss_inputs={**datum.loss_inputs, "logprobs": logprobs})


def sums_of_answers(datum: Datum, logprobs: np.ndarray) -> list[float]:
    """How likely each answer of a pair is, in nats: the sum over its tokens."""
    due = np.where(datum.loss_inputs["weights"] != 0, logprobs, 0.0).astype(np.float64)
    return [float(part.sum()) for part in np.split(due[datum.num_shared :], np.cumsum(datum.branches)[:-1])]
