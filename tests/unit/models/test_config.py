"""Reading config.json: each test names the silent misreading it prevents."""

from __future__ import annotations

from typing import Any

import pytest

from model_foundry.errors import ModelError
from model_foundry.models.config import FULL, SLIDING, ModelConfig, is_native, native_obstacle

SMALL: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip


def read(model_type: str, **keys: Any) -> ModelConfig:
    return ModelConfig.from_hf({"model_type": model_type, **SMALL, **keys})


@pytest.mark.parametrize(
    "keys",
    [{"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}],
    ids=["transformers 4", "transformers 5"],
)
def test_rope_theta_is_read_from_old_and_new_configs(keys: dict[str, Any]) -> None:
    """A reader of one place only takes 10,000 for the other kind and computes wrong logits without a word."""
    assert read("llama", **keys).rope_theta == 5e5


def test_rope_theta_inside_rope_parameters_wins_as_in_transformers() -> None:
    both = read("llama", rope_theta=1e4, rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    assert both.rope_theta == 5e5


def test_rope_scaling_of_older_configs_is_not_dropped() -> None:
    config = read("llama", rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})
    assert config.rope_scaling is not None
    assert (config.rope_scaling.rope_type, config.rope_scaling.factor) == ("linear", 2.0)


def test_llama3_scaling_takes_the_trained_length_from_max_positions_when_silent() -> None:
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling = read("llama", rope_scaling=rope).rope_scaling
    assert scaling is not None
    assert scaling.original_max_position_embeddings == 256


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope", "made-up"])
def test_a_rope_type_we_do_not_compute_is_refused_not_ignored(rope_type: str) -> None:
    config = {"model_type": "llama", **SMALL, "rope_scaling": {"rope_type": rope_type, "factor": 2.0}}
    assert not is_native(config)
    with pytest.raises(ModelError, match=rope_type):
        ModelConfig.from_hf(config)


@pytest.mark.parametrize(
    "keys, word",
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ({"hidden_act": "quick_gelu"}, "quick_gelu"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "by layer type"),
    ],
)
def test_what_the_decoder_does_not_compute_goes_to_the_fallback(keys: dict[str, Any], word: str) -> None:
    obstacle = native_obstacle({"model_type": "llama", **SMALL, **keys})
    assert obstacle is not None
    assert word in obstacle


def test_another_architecture_is_not_native() -> None:
    assert not is_native({"model_type": "gpt2"})
    assert not is_native({})


@pytest.mark.parametrize(
    "model_type, keys, qkv, output, mlp",
    [
        ("llama", {}, False, False, False),
        ("llama", {"attention_bias": True, "mlp_bias": True}, True, True, True),
        ("mistral", {"attention_bias": True}, False, False, False),
        ("qwen2", {}, True, False, False),
        ("qwen3", {"attention_bias": True}, True, True, False),
    ],
)
def test_biases_are_where_transformers_puts_them(
    model_type: str, keys: dict[str, Any], qkv: bool, output: bool, mlp: bool
) -> None:
    """Qwen2 has biases that its config never mentions; a decoder without them loads and answers nonsense."""
    config = read(model_type, **keys)
    assert (config.attention_bias, config.attention_output_bias, config.mlp_bias) == (qkv, output, mlp)


def test_qwen_ignores_its_sliding_window_unless_told_to_use_it() -> None:
    """Every Qwen2 config carries `sliding_window`, and almost none means it."""
    assert [read("qwen2", sliding_window=8).window(layer) for layer in range(4)] == [None] * 4
    used = read("qwen2", sliding_window=8, use_sliding_window=True, max_window_layers=2)
    assert [used.window(layer) for layer in range(4)] == [None, None, 8, 8]


def test_mistral_slides_in_every_layer_and_by_default() -> None:
    assert read("mistral").window(0) == 4096
    assert read("mistral", sliding_window=None).window(0) is None


def test_layer_types_win_over_max_window_layers() -> None:
    types = [SLIDING, FULL, SLIDING, FULL]
    config = read("qwen3", layer_types=types, use_sliding_window=True, sliding_window=8)
    assert [config.window(layer) for layer in range(4)] == [8, None, 8, None]


def test_sliding_layers_without_a_window_are_an_error() -> None:
    with pytest.raises(ModelError, match="sliding_window"):
        read("qwen3", layer_types=[SLIDING] * 4)


def test_qwen3_heads_are_128_wide_unless_stated() -> None:
    """hidden_size / heads is wrong for Qwen3."""
    assert read("qwen3").head_dim == 128
    assert read("qwen2").head_dim == 8


@pytest.mark.parametrize(
    "key, value",
    [
        ("num_hidden_layers", 0),
        ("num_key_value_heads", 3),
        ("hidden_size", "big"),
        ("head_dim", 7),
        ("rms_norm_eps", -1.0),
        ("rope_theta", 0.5),
        ("eos_token_id", "two"),
        ("tie_word_embeddings", "yes"),
    ],
)
def test_an_impossible_value_is_named_with_its_key(key: str, value: Any) -> None:
    with pytest.raises(ModelError, match=key):
        read("llama", **{key: value})


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_is_written_reads_back_the_same(model_type: str) -> None:
    keys: dict[str, Any] = {
        "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "rms_norm_eps": 1e-5,
        "eos_token_id": [1, 2], "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True,
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, "beta_fast": 16.0},
    }  # fmt: skip
    config = read(model_type, **keys)
    written = config.to_hf(dtype="bfloat16")
    assert ModelConfig.from_hf(written) == config
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 1e6
    assert written["torch_dtype"] == written["dtype"] == "bfloat16"


def test_parameters_are_counted_exactly() -> None:
    """The figure of the real model; a tied head counts once."""
    config = ModelConfig.from_hf({
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    })  # fmt: skip
    assert config.num_parameters == 134_515_008
