"""Our reading of config.json against transformers' own, on what transformers itself writes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from model_foundry.models.config import SLIDING, ModelConfig

SMALL: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 1024, "rope_theta": 5e5}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, "original_max_position_embeddings": 2048}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}),
    ("llama", {"tie_word_embeddings": True, "head_dim": 16}),
    ("mistral", {"sliding_window": 4}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ("qwen2", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    ("qwen3", {"head_dim": 16, "attention_bias": True, "rope_parameters": YARN}),
]


@pytest.mark.parametrize("model_type, keys", CASES)
def test_shape_bias_windows_and_rope_are_read_as_transformers_reads_them(model_type: str, keys: dict[str, Any]) -> None:
    """A parameter miscounted or a window misplaced is a model that loads and is wrong."""
    theirs = AutoConfig.for_model(model_type, **SMALL, **keys)
    ours = ModelConfig.from_hf(json.loads(theirs.to_json_string()))
    model = AutoModelForCausalLM.from_config(theirs)
    assert ours.num_parameters == model.num_parameters()
    has_bias = {
        name: getattr(model.model.layers[0].get_submodule(name), "bias", None) is not None
        for name in ours.layer_linears(0)
    }
    assert has_bias == {name: ours.has_bias(name) for name in ours.layer_linears(0)}
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert (ours.rope_scaling is not None) == (theirs.rope_parameters["rope_type"] != "default")
    if model_type.startswith("qwen"):
        windows = [theirs.sliding_window if kind == SLIDING else None for kind in theirs.layer_types]
        assert [ours.window(layer) for layer in range(3)] == windows


@pytest.mark.parametrize("model_type, keys", CASES)
def test_transformers_reads_what_we_write(model_type: str, keys: dict[str, Any]) -> None:
    theirs = AutoConfig.for_model(model_type, **SMALL, **keys)
    ours = ModelConfig.from_hf(json.loads(theirs.to_json_string()))
    again = type(theirs).from_dict(ours.to_hf()).to_dict()
    expected = theirs.to_dict()
    differing = {key for key in expected if again.get(key) != expected[key]}
    assert differing <= {"architectures", "rope_parameters"}
    given = expected["rope_parameters"]
    assert {key: again["rope_parameters"][key] for key in given} == given
