"""What is demanded of held-out text where there is none."""

from __future__ import annotations

import pytest

from model_foundry.config.load import load_config
from model_foundry.config.pretrain import ExperimentConfig
from model_foundry.errors import ConfigError
from model_foundry.recipes.corpus import _require_unmeasured

FRESH = ["tokenizer.name=words", "data.train_file=text.txt"]


@pytest.mark.parametrize("name", ["bits_per_byte", "below_unigram"])
def test_a_bound_on_held_out_text_needs_some(name: str) -> None:
    """`below_unigram` was passed over without a word where nothing is held out, whoever had asked for it."""
    bound = load_config(ExperimentConfig, path=None, overrides=[*FRESH, f"criteria.{name}=0.05"]).config
    with pytest.raises(ConfigError, match="no held-out text to measure it on"):
        _require_unmeasured(bound, is_packed=False)
    _require_unmeasured(load_config(ExperimentConfig, path=None, overrides=FRESH).config, is_packed=False)
