"""Which schema a command's configuration has, and which of several its `method` chooses."""

from __future__ import annotations

from model_foundry.config.data import PackConfig
from model_foundry.config.generate import GenerateConfig
from model_foundry.config.preference import DpoConfig
from model_foundry.config.pretrain import ExperimentConfig
from model_foundry.config.rl import RLConfig
from model_foundry.config.schema import ChatConfig, EvaluateConfig, TrainConfig
from model_foundry.config.section import Section
from model_foundry.config.serve import ServeConfig
from model_foundry.config.service import ServiceConfig

METHOD_SCHEMAS: dict[str, type[TrainConfig] | type[ExperimentConfig]] = {
    "sft": TrainConfig,
    "dpo": DpoConfig,
    "pretrain": ExperimentConfig,
}
"""What `foundry train` reads, by `method`; the first is the default."""
ROWS_SCHEMAS: dict[str, type[TrainConfig]] = {"sft": TrainConfig, "dpo": DpoConfig}
"""Those that train on rows, which `foundry data check` and `foundry data inspect` judge."""
RunConfig = TrainConfig | ExperimentConfig

COMMAND_SCHEMAS: dict[str, type[Section]] = {
    "train": TrainConfig,
    "train method=dpo": DpoConfig,
    "train method=pretrain": ExperimentConfig,
    "rl": RLConfig,
    "evaluate": EvaluateConfig,
    "chat": ChatConfig,
    "generate": GenerateConfig,
    "serve": ServeConfig,
    "service": ServiceConfig,
    "data pack": PackConfig,
}
"""The schema of each command that takes a configuration."""
