"""What is written reads back the same, under our reader and under one of YAML 1.1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from model_foundry.config.commands import COMMAND_SCHEMAS
from model_foundry.config.dump import config_digest, dump_yaml, format_value, json_schema
from model_foundry.config.load import load_config
from model_foundry.config.pretrain import ExperimentConfig
from model_foundry.config.schema import ChatConfig, EvaluateConfig, TrainConfig
from model_foundry.config.tree import Origin, to_plain
from model_foundry.config.yaml_text import read_yaml


def load(*overrides: str, path: Path | None = None) -> TrainConfig:
    return load_config(TrainConfig, path=path, overrides=overrides, environ={}).config


VALUES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()


@given(VALUES | st.lists(VALUES, max_size=4))
def test_every_value_reads_back(value: Any) -> None:
    text = f"key: {format_value(value)}  # default\n"
    assert to_plain(read_yaml(text, origin_at=lambda line: Origin("file", "x", line))) == {"key": value}


@given(VALUES)
def test_other_readers_of_yaml_agree(value: Any) -> None:
    """`5e-05` would be text to PyYAML, `no` false, `2024-01-01` a date."""
    assert yaml.safe_load(f"key: {format_value(value)}\n") == {"key": value}


@pytest.mark.parametrize("word", ["no", "on", "y", "1:30", "2024-01-01", "1_000", "~", "null", "0x1f", "1e5", "-", "="])
def test_words_that_some_reader_takes_for_more_are_quoted(word: str) -> None:
    assert yaml.safe_load(f"key: {format_value(word)}") == {"key": word}


CHANGES = (
    "training.learning_rate=5e-5",
    "model.name=no",
    "evaluation.system=Say: \"yes\" # or 'no'",
    "training.save_schedule=explicit",
    "training.save_at=[1,2]",
    "criteria.loss_fall=null",
    "training.max_steps=7",
)


@pytest.mark.parametrize("help", [False, True])
def test_a_dump_loads_to_the_same_configuration(tmp_path: Path, help: bool) -> None:
    config = load(*CHANGES)
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(config, header=["written by a test", ""], help=help), encoding="utf-8")
    assert load(path=path) == config
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["training"]["learning_rate"] == 5e-5


def test_a_dump_writes_out_every_field_and_shows_every_default() -> None:
    """A run's config.yaml must mean the same after a default changed in a later version."""
    resolved = load_config(TrainConfig, path=None, overrides=["training.learning_rate=5e-5"], environ={})
    lines = dump_yaml(resolved.config, provenance=resolved.provenance).splitlines()
    fields = [line for line in lines if not line.endswith(":")]
    assert len(fields) == len(resolved.provenance)
    assert all("default" in line for line in fields)
    assert "  learning_rate: 5.0e-05  # override; default 0.0002" in lines


@pytest.mark.parametrize("schema", [TrainConfig, EvaluateConfig, ChatConfig])
def test_every_schema_dumps(schema: type[TrainConfig]) -> None:
    text = dump_yaml(schema(), help=True)
    assert schema.model_validate(yaml.safe_load(text)) == schema()


def test_the_digest_sees_what_is_computed_and_nothing_else() -> None:
    digest = config_digest(load())
    assert config_digest(load("run_dir=elsewhere", "logging.level=debug")) == digest
    others = [config_digest(load(change)) for change in ("seed=1", "lora.r=8", "training.learning_rate=1e-4")]
    assert len({digest, *others}) == 4
    assert len(digest) == 64


def test_the_digest_does_not_depend_on_how_a_value_was_written(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("training: {learning_rate: 5.0e-05}\n", encoding="utf-8")
    assert config_digest(load(path=path)) == config_digest(load("training.learning_rate=5e-5"))


@pytest.mark.parametrize("command", list(COMMAND_SCHEMAS))
def test_the_json_schema_has_every_field_with_its_help(command: str) -> None:
    described = json_schema(COMMAND_SCHEMAS[command])
    assert json.loads(json.dumps(described)) == described
    assert described["additionalProperties"] is False
    assert "inherits" in described["properties"]
    for definition in described.get("$defs", {"all of a flat schema": described}).values():
        for name, field in definition["properties"].items():
            assert field.get("description"), f"{name} has no help"


def test_how_many_processes_read_and_where_they_keep_it_changes_no_digest() -> None:
    """A run could else not go on with another number of loader processes, though its bits would be the same."""
    common = ["method=pretrain", "tokenizer.name=x"]
    configs = [
        load_config(ExperimentConfig, path=None, overrides=[*common, *more], environ={}).config
        for more in ([], ["data.loader_processes=3", "data.processes=2", "work_dir=elsewhere"], ["data.shuffle=false"])
    ]
    digests = [config_digest(config) for config in configs]
    assert digests[0] == digests[1] != digests[2]
