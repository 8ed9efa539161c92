"""From a configuration to its work, by its method."""

from __future__ import annotations

from datetime import datetime

from model_foundry.config.commands import RunConfig
from model_foundry.config.preference import DpoConfig
from model_foundry.config.pretrain import ExperimentConfig
from model_foundry.models.finder import resolve_model
from model_foundry.models.folder import fingerprint
from model_foundry.recipes.corpus import prepare_corpus
from model_foundry.recipes.fresh import fresh_source
from model_foundry.recipes.preference import prepare_pairs
from model_foundry.recipes.preparation import prepare
from model_foundry.recipes.work import Work


def prepare_work(config: RunConfig, *, now: datetime) -> Work:
    """Everything that a run needs before its first step.

    Raises:
        ConfigError, DataError, ModelError, TemplateError: what was asked for cannot be trained.
    """
    if isinstance(config, ExperimentConfig):
        return prepare_corpus(config, now=now)
    if isinstance(config, DpoConfig):
        return prepare_pairs(config, now=now)
    return prepare(config, now=now)


def start_fingerprint(config: RunConfig) -> str:
    """Of the model that a run starts from."""
    source = fresh_source(config) if isinstance(config, ExperimentConfig) else resolve_model(config.model.name)
    return fingerprint(source.folder)
