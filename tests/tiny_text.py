"""A small corpus, and pretraining runs on it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import yaml

from model_foundry.config.load import load_config
from model_foundry.config.pretrain import ExperimentConfig
from tests.tiny_runs import write_jsonl

NAMES = ("the fox", "the sea", "a small owl", "my friend", "the old elm")
VERBS = ("sees", "follows", "forgets", "asks about", "remembers")


def documents(count: int, *, seed: int = 0) -> list[dict[str, str]]:
    """Sentences with a pattern that is soon learned."""
    chance = random.Random(seed)
    return [
        {"text": " ".join(f"{chance.choice(NAMES)} {chance.choice(VERBS)} {chance.choice(NAMES)}." for _ in range(6))}
        for _ in range(count)
    ]


def write_experiment(folder: Path, *, tokenizer: Path, **changes: Any) -> Path:
    """A configuration with its text in `folder`; `changes` are fields by dotted name with __ for the dot."""
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "text.jsonl", documents(120))
    config: dict[str, Any] = {
        "method": "pretrain",
        "run_dir": str(folder / "run"),
        "tokenizer": {"name": str(tokenizer)},
        "model": {
            "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "max_position_embeddings": 32,
            "dtype": "float32",
        },
        "data": {"train_file": str(folder / "text.jsonl"), "validation_share": 0.1},
        "training": {
            "max_steps": 12, "batch_size": 4, "learning_rate": 0.01, "num_threads": 1, "save_steps": 4, "eval_steps": 6
        },
        "criteria": {"below_unigram": None},
    }  # fmt: skip
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        (config.setdefault(section, {}) if section else config)[key] = value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config, allow_unicode=True))
    return path


def tiny_experiment(folder: Path, *, tokenizer: Path, **changes: Any) -> ExperimentConfig:
    return load_config(ExperimentConfig, path=write_experiment(folder, tokenizer=tokenizer, **changes)).config
