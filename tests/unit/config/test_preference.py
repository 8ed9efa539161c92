"""The section `dpo`: what means nothing is refused by its field, and what is printed can be read again."""

from __future__ import annotations

from pathlib import Path

import pytest

from model_foundry.config.commands import METHOD_SCHEMAS
from model_foundry.config.load import dump_yaml, load_config, schema_by_method
from model_foundry.config.preference import DpoConfig
from model_foundry.errors import ConfigError


@pytest.mark.parametrize(
    "given, said",
    [
        ("dpo.loss=likelihood", "expected one of sigmoid"),
        ("dpo.beta=-1", "a number above 0"),
        ("dpo.beta=0", "a number above 0"),
        ("dpo.label_smoothing=0.5", "below 0.5"),
        ("data.packing=true", "none of which is padded"),
        ("data.train_on=all", "expected last_assistant"),
        ("data.format=kto", "expected one of auto, preference"),
        ("dpo.reference=other", "unknown key"),
    ],
)
def test_what_means_nothing_is_refused(given: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(DpoConfig, path=None, overrides=["method=dpo", given])


def test_smoothing_is_refused_where_nothing_reads_it() -> None:
    """Prevents noise in the labels that was asked for and is not modelled."""
    with pytest.raises(ConfigError, match="sigmoid and robust"):
        load_config(DpoConfig, path=None, overrides=["dpo.loss=ipo", "dpo.label_smoothing=0.1"])
    assert (
        load_config(DpoConfig, path=None, overrides=["dpo.loss=robust", "dpo.label_smoothing=0.1"]).config.dpo.beta
        == 0.1
    )


def test_a_stored_configuration_is_read_again(tmp_path: Path) -> None:
    """Prevents a run that cannot be resumed, since its own file says `packing: false`."""
    path = tmp_path / "config.yaml"
    config = load_config(DpoConfig, path=None, overrides=["dpo.beta=0.3"]).config
    path.write_text(dump_yaml(config))
    assert load_config(schema_by_method(METHOD_SCHEMAS, path=path), path=path).config == config


def test_an_unknown_method_is_told_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="expected one of sft, dpo, pretrain"):
        schema_by_method(METHOD_SCHEMAS, path=None, overrides=["method=ppo"])
