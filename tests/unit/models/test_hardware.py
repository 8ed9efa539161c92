"""What training takes and where it fits, by config.json alone: Qwen3-Coder-30B-A3B-Instruct as the example."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model_foundry.config.load import load_config
from model_foundry.config.schema import TrainConfig
from model_foundry.errors import ModelError
from model_foundry.models.config import ModelConfig
from model_foundry.models.hardware import DEVICES, GB, parameters_by_part, ways_to_train
from model_foundry.models.memory import base_bytes, num_adapter_parameters
from model_foundry.recipes.shape_plan import config_without_weights, plan_of_config, shape_facts, shape_text
from model_foundry.types import LoraConfig

QWEN3_CODER_30B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 5472, "max_position_embeddings": 262144, "max_window_layers": 28,
    "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True,
    "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
    "num_key_value_heads": 4, "output_router_logits": False, "qkv_bias": False, "rms_norm_eps": 1e-6,
    "rope_scaling": None, "rope_theta": 10000000, "router_aux_loss_coef": 0.0, "shared_expert_intermediate_size": 0,
    "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
    "use_qk_norm": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
SHAPE = ModelConfig.from_hf(QWEN3_CODER_30B)
ROWS = (2048,)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "coder").mkdir()
    (tmp_path / "coder" / "config.json").write_text(json.dumps(QWEN3_CODER_30B))
    return tmp_path / "coder"


def test_its_parameters_are_those_that_its_makers_name() -> None:
    """30.5 billion, 3.3 billion of them active."""
    assert SHAPE.num_parameters == 30_532_122_624
    assert SHAPE.num_active_parameters == 3_353_032_704
    parts = parameters_by_part(SHAPE)
    assert sum(parts.values()) == SHAPE.num_parameters
    assert parts["experts"] == 48 * 128 * 3 * 2048 * 768
    assert parts["routers"] == 48 * 128 * 2048
    assert parts["head"] == parts["embedding"] == 151936 * 2048
    assert "mlp" not in parts


def test_weights_take_two_bytes_or_a_little_more_than_half_a_byte() -> None:
    assert base_bytes(SHAPE, dtype_bytes=2) == 2 * SHAPE.num_parameters
    packed = base_bytes(SHAPE, dtype_bytes=2, packed=True)
    dense = SHAPE.num_parameters - parameters_by_part(SHAPE)["experts"] - parameters_by_part(SHAPE)["attention"]
    assert packed == pytest.approx(2 * dense + (SHAPE.num_parameters - dense) * 4.127 / 8, rel=1e-3)
    assert 16.0 * GB < packed < 17.5 * GB


def test_ways_to_train_it_and_where_they_fit() -> None:
    ways = {way.name: way for way in ways_to_train(SHAPE, rows=ROWS, lora=LoraConfig())}
    assert list(ways) == [
        "bf16 LoRA r=16 on every linear layer", "bf16 LoRA r=16 on attention alone",
        "nf4 QLoRA r=16 on every linear layer", "nf4 QLoRA r=16 on attention alone", "every weight",
    ]  # fmt: skip
    assert ways["bf16 LoRA r=16 on every linear layer"].num_trained == num_adapter_parameters(SHAPE, LoraConfig())
    assert ways["every weight"].num_trained == SHAPE.num_parameters
    device = {each.name: each for each in DEVICES}
    fits = {name: [each for each in device if (way.spare_bytes(device[each]) or -1) > 0] for name, way in ways.items()}
    assert fits["nf4 QLoRA r=16 on attention alone"][0] == "24 GB GPU"
    assert fits["nf4 QLoRA r=16 on every linear layer"][0] == "48 GB GPU"
    assert fits["bf16 LoRA r=16 on every linear layer"] == ["80 GB GPU", "141 GB GPU", "192 GB GPU", "Apple 128 GB"]
    assert fits["every weight"] == []
    assert ways["nf4 QLoRA r=16 on attention alone"].spare_bytes(device["Apple 128 GB"]) is None
    # Sixteen bytes a weight: the weights, their gradients and two moments, all float32.
    memory = ways["every weight"].memory
    assert memory.weights + memory.gradients + memory.optimizer == 16 * SHAPE.num_parameters


def test_a_dense_model_has_one_adapter_of_each_kind() -> None:
    dense = ModelConfig.from_hf({
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "vocab_size": 100,
    })  # fmt: skip
    names = [way.name for way in ways_to_train(dense, rows=ROWS, lora=LoraConfig(r=8))]
    assert names == ["bf16 LoRA r=8", "nf4 QLoRA r=8", "every weight"]
    assert dense.num_active_parameters == dense.num_parameters


def test_the_text_names_what_it_assumes_and_what_does_not_fit(folder: Path) -> None:
    facts = shape_facts(folder)
    assert facts == json.loads(json.dumps(facts))
    text = shape_text(facts)
    for part in ("30,532,122,624", "3,353,032,704", "no step was measured", "one row of 2,048", "n/a", "Apple 128 GB"):
        assert part in text
    spare = facts["ways"][3]["spare_bytes"]["24 GB GPU"]
    assert f"{spare / 1e9:+,.1f}" in text


def test_the_plan_of_a_run_takes_its_adapter_and_batch(folder: Path) -> None:
    def plan(*overrides: str) -> dict[str, Any]:
        config = load_config(TrainConfig, path=None, overrides=[f"model.name={folder}", *overrides]).config
        made = plan_of_config(config)
        assert made is not None
        return made

    attention = plan("lora.r=4", "lora.target_modules=[q_proj,v_proj]")
    assert attention["ways"][0]["trained_parameters"] == 48 * 4 * (2048 + 4096 + 2048 + 512)
    router = plan("lora.r=4", "lora.target_modules=[gate]")
    assert router["ways"][0]["trained_parameters"] == 48 * 4 * (2048 + 128)
    experts = plan("lora.r=4", r"lora.target_modules=.*experts\.\d+\.up_proj")
    assert experts["ways"][0]["trained_parameters"] == 48 * 128 * 4 * (2048 + 768)
    wide = plan("data.max_length=4096", "training.batch_size=2", "training.gradient_checkpointing=true")
    assert (wide["rows"], wide["gradient_checkpointing"]) == ([4096, 4096], True)
    with pytest.raises(ModelError, match="qproj"):
        plan("lora.target_modules=[qproj]")


def test_a_folder_with_weights_is_not_planned_from_its_config(folder: Path, tmp_path: Path) -> None:
    """It is measured instead."""
    assert config_without_weights(str(folder)) == folder / "config.json"
    assert config_without_weights(str(folder / "config.json")) == folder / "config.json"
    assert config_without_weights("smollm2-135m-instruct") is None
    assert config_without_weights(str(tmp_path)) is None
    (folder / "model-00001-of-00016.safetensors").write_bytes(b"")
    assert config_without_weights(str(folder)) is None


def test_a_kind_that_is_not_ours_is_refused_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ModelError, match="mamba"):
        shape_facts(tmp_path / "config.json")
