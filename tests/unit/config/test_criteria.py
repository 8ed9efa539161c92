"""Criteria that a run cannot measure are refused where somebody asked for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from model_foundry.config.load import dump_yaml, load_config
from model_foundry.config.schema import TrainConfig
from model_foundry.errors import ConfigError


@pytest.mark.parametrize("overrides, words", [
    (["criteria.answers_improved=0.9"], "criteria.answers_improved needs evaluation.file"),
    (["criteria.answers_improved=0.3"], "criteria.answers_improved needs evaluation.file"),
    (["criteria.memory_saving=0.5", "lora.enabled=false"], "criteria.memory_saving needs lora.enabled"),
    (["criteria.parameters_changed=0.9", "lora.enabled=false"], "criteria.parameters_changed needs lora.enabled"),
])  # fmt: skip
def test_a_criterion_that_nothing_measures_is_refused(overrides: list[str], words: str) -> None:
    """90 % of answers and parameters were demanded of a run without questions and adapters, and it passed: SHIP."""
    with pytest.raises(ConfigError, match=words):
        load_config(TrainConfig, path=None, overrides=overrides)


def test_what_nobody_asked_for_is_no_error_and_is_named(tmp_path: Path) -> None:
    config = load_config(TrainConfig, path=None, overrides=["lora.enabled=false"]).config
    assert list(config.unmeasured_criteria()) == ["answers_improved", "memory_saving", "parameters_changed"]
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    assert load_config(TrainConfig, path=tmp_path / "config.yaml").config == config, "a run's own record can be read"
    off = ["criteria.answers_improved=null", "criteria.memory_saving=0.2"]
    assert load_config(TrainConfig, path=None, overrides=off).config.unmeasured_criteria() == {}
