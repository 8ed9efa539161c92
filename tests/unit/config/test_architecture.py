"""The section that describes a model from nothing: what cannot be built is refused by the field that is wrong."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from pydantic import ValidationError

from model_foundry.config.architecture import ArchitectureSection
from model_foundry.config.load import load_config
from model_foundry.config.section import Section
from model_foundry.errors import ConfigError
from model_foundry.models.architecture import Architecture, to_config
from model_foundry.models.config import ModelConfig
from model_foundry.recipes.architecture import architecture_of

MIXTURE = {"architecture": "qwen3_moe", "num_experts": 4}
WRONG: list[tuple[str, dict[str, Any]]] = [
    ("num_attention_heads", {"hidden_size": 100, "num_attention_heads": 3}),
    ("num_attention_heads", {"hidden_size": 100, "num_attention_heads": 3, "head_dim": 8}),
    ("num_key_value_heads", {"num_attention_heads": 4, "num_key_value_heads": 3}),
    ("num_key_value_heads", {"num_attention_heads": 2, "num_key_value_heads": 4}),
    ("num_attention_heads", {"hidden_size": 12, "num_attention_heads": 4}),
    ("head_dim", {"head_dim": 7}),
    ("num_experts", {"architecture": "qwen3_moe"}),
    ("num_experts", {"architecture": "llama", "num_experts": 4}),
    ("num_experts_per_tok", {**MIXTURE, "num_experts_per_tok": 5}),
    ("mlp_only_layers", {**MIXTURE, "num_hidden_layers": 2, "mlp_only_layers": (0, 2)}),
    ("mlp_only_layers", {**MIXTURE, "num_hidden_layers": 2, "mlp_only_layers": (0, 1)}),
    ("mlp_only_layers", {**MIXTURE, "num_hidden_layers": 3, "decoder_sparse_step": 2, "mlp_only_layers": (1,)}),
    ("decoder_sparse_step", {**MIXTURE, "num_hidden_layers": 2, "decoder_sparse_step": 3}),
    ("num_key_value_heads", {"architecture": "gpt2", "num_key_value_heads": 2}),
    ("head_dim", {"architecture": "gpt2", "head_dim": 32}),
    ("dropout", {"architecture": "gpt2", "dropout": 0.1}),
    ("attention_dropout", {"architecture": "gpt2", "attention_dropout": 0.1}),
]


@pytest.mark.parametrize("field, values", WRONG)
def test_numbers_that_do_not_go_together_name_their_field(field: str, values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as error:
        ArchitectureSection.model_validate(values)
    (problem,) = error.value.errors()
    assert problem.get("ctx", {}).get("field") == field


@pytest.mark.parametrize(
    "values",
    [{"hidden_size": 0}, {"num_hidden_layers": 0}, {"dropout": 1.0}, {"rope_theta": 1.0}, {"architecture": "gpt3"},
     {"hidden_act": "swish"}, {"layers": 3}, {"initializer_range": 0.0}],
)  # fmt: skip
def test_impossible_values_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ArchitectureSection.model_validate(values)


class Probe(Section):
    architecture: ArchitectureSection = ArchitectureSection()


def test_a_person_reads_the_dotted_name_of_the_field() -> None:
    with pytest.raises(ConfigError) as error:
        load_config(Probe, path=None, overrides=["architecture.num_attention_heads=3"])
    assert "architecture.num_attention_heads" in str(error.value)
    assert "does not divide hidden_size 256" in str(error.value)


@pytest.mark.parametrize("values", [{}, {"architecture": "qwen3", "head_dim": 20}, MIXTURE, {"architecture": "gpt2"}])
def test_every_field_reaches_the_model(values: dict[str, Any]) -> None:
    """A field that is checked and then forgotten builds the default."""
    section = ArchitectureSection.model_validate(values)
    shape = architecture_of(section, tokenizer_size=77)
    assert shape.vocab_size == 77
    mapped = {field.name for field in fields(Architecture)} - {"bos_token_id", "eos_token_ids", "pad_token_id"}
    assert mapped == set(ArchitectureSection.model_fields)
    for name in mapped - {"vocab_size"}:
        assert getattr(shape, name) == getattr(section, name), name
    config = to_config(shape)
    if section.architecture != "gpt2":
        assert ModelConfig.from_hf(config).vocab_size == 77


def test_a_vocabulary_smaller_than_the_special_tokens_names_the_field() -> None:
    with pytest.raises(ConfigError, match="special tokens") as error:
        architecture_of(ArchitectureSection(vocab_size=4), tokenizer_size=300, special_token_ids=(0, 1, 299))
    assert error.value.where == "model.vocab_size"
