"""Every YAML that ships loads, and how many there are is known: a file that nothing loads any more is found out."""

from __future__ import annotations

from pathlib import Path

import pytest

from model_foundry.config.load import load_config
from model_foundry.config.schema import TrainConfig

ROOT = Path(__file__).parents[2]
# How many configurations each folder holds. A new file changes a number here, on purpose.
EXPECTED = {"configs": 0, "examples": 1, "model_foundry/config/profiles": 3}


def shipped() -> list[Path]:
    found = [path for folder in EXPECTED for path in (ROOT / folder).rglob("*.y*ml")]
    return sorted(found)


def test_the_number_of_shipped_configurations_is_known() -> None:
    counts = {folder: len(list((ROOT / folder).rglob("*.y*ml"))) for folder in EXPECTED}
    assert counts == EXPECTED


@pytest.mark.parametrize("path", shipped(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_configuration_loads(path: Path) -> None:
    resolved = load_config(TrainConfig, path=path, overrides=(), environ={})
    assert not resolved.warnings
    for field in ("train_file", "validation_file"):
        named = getattr(resolved.config.data, field)
        assert named is None or named.is_file(), f"{path}: data.{field} names {named}, which is not there"
