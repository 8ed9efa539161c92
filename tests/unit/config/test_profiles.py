"""Profiles load on their own and set only what they are about."""

from __future__ import annotations

import pytest

from model_foundry.config.load import load_config
from model_foundry.config.schema import TrainConfig
from model_foundry.config.sources import PROFILE_FOLDER, profile_names


def test_the_profiles_are_these() -> None:
    assert profile_names() == ["chat", "code", "instruction"]


@pytest.mark.parametrize("name", profile_names())
def test_a_profile_loads_and_names_itself(name: str) -> None:
    resolved = load_config(TrainConfig, path=PROFILE_FOLDER / f"{name}.yaml", overrides=(), environ={})
    origins = {dotted: origin for dotted, origin in resolved.provenance.items() if origin != "default"}
    assert set(origins.values()) == {f"profile {name}"}
    assert {dotted.split(".")[0] for dotted in origins} == {"data", "lora", "training"}
