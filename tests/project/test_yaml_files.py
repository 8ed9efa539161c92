"""Every YAML that ships loads, and how many there are is known: a file that nothing loads any more is found out."""

from __future__ import annotations

from pathlib import Path

import pytest

from model_foundry.config.commands import METHOD_SCHEMAS
from model_foundry.config.generate import GenerateConfig
from model_foundry.config.load import load_config, schema_by_method
from model_foundry.config.schema import TrainConfig
from model_foundry.config.section import Section
from model_foundry.evals.suite import load_suite

ROOT = Path(__file__).parents[2]
# How many configurations each folder holds, and what they configure. A new file changes a number here, on purpose.
EXPECTED: dict[str, tuple[int, type[Section]]] = {
    "configs/domains": (3, GenerateConfig),
    "examples/demo": (1, TrainConfig),
    "examples/lifecycle": (2, TrainConfig),
    "examples/preference": (2, TrainConfig),
    "model_foundry/config/profiles": (3, TrainConfig),
}
SUITES = [ROOT / "examples/preference/manner.yaml"]
"""Suites that examples bring along."""


def shipped() -> list[tuple[Path, type[Section]]]:
    return sorted(
        ((path, schema) for folder, (_, schema) in EXPECTED.items() for path in configurations(folder)),
        key=lambda found: found[0],
    )


def configurations(folder: str) -> list[Path]:
    return [path for path in (ROOT / folder).rglob("*.y*ml") if path not in SUITES]


def test_the_number_of_shipped_configurations_is_known() -> None:
    counts = {folder: len(configurations(folder)) for folder in EXPECTED}
    assert counts == {folder: number for folder, (number, _) in EXPECTED.items()}


def test_no_configuration_lies_where_nothing_looks() -> None:
    found = {path for folder in ("configs", "examples") for path in (ROOT / folder).rglob("*.y*ml")}
    assert not found - {path for path, _ in shipped()} - set(SUITES)


@pytest.mark.parametrize("path, schema", shipped(), ids=lambda value: str(getattr(value, "name", "")))
def test_every_shipped_configuration_loads(path: Path, schema: type[Section]) -> None:
    if schema is TrainConfig:
        schema = schema_by_method(METHOD_SCHEMAS, path=path)
    resolved = load_config(schema, path=path, overrides=(), environ={})
    assert not resolved.warnings
    for dotted in ("data.train_file", "data.validation_file", "corpus.roots"):
        value = resolved.value(dotted)
        for named in value if isinstance(value, tuple) else (value,):
            is_made = "runs" in Path(str(named)).parts  # by an earlier step of the example
            assert named is None or is_made or Path(str(named)).exists(), (
                f"{path}: {dotted} names {named}, which is not there"
            )


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.name)
def test_every_suite_of_an_example_loads(path: Path) -> None:
    suite = load_suite(str(path))
    assert len(suite.rows) >= 20
    assert suite.guard
