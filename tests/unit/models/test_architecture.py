"""From a shape to a config.json and an exact number of parameters, before anything is allocated."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model_foundry.errors import ConfigError, ModelError
from model_foundry.models.architecture import (
    Architecture,
    count_parameters,
    gpt2_shapes,
    require_vocabulary,
    to_config,
    to_model_config,
)
from model_foundry.models.config import ModelConfig
from model_foundry.models.decoder import expected_shapes
from model_foundry.models.initialise import fresh_tensors


@st.composite
def shapes(draw: st.DrawFn) -> Architecture:
    kind: Any = draw(st.sampled_from(["llama", "qwen3", "qwen3_moe", "gpt2"]))
    groups, keys, head_dim = (draw(st.integers(1, 3)) for _ in range(3))
    heads, own_width = groups * keys, draw(st.booleans()) and kind != "gpt2"
    experts = draw(st.integers(1, 5)) if kind == "qwen3_moe" else None
    return Architecture(
        architecture=kind,
        vocab_size=draw(st.integers(3, 90)),
        max_position_embeddings=draw(st.integers(4, 40)),
        num_hidden_layers=draw(st.integers(1, 5)),
        hidden_size=draw(st.integers(1, 9)) if own_width else heads * head_dim * 2,
        num_attention_heads=heads,
        intermediate_size=draw(st.none() | st.integers(1, 30)),
        num_key_value_heads=heads if kind == "gpt2" else keys,
        head_dim=2 * head_dim if own_width else None,
        tie_word_embeddings=draw(st.booleans()),
        num_experts=experts,
        num_experts_per_tok=draw(st.integers(1, experts or 1)),
        moe_intermediate_size=draw(st.none() | st.integers(1, 9)),
        decoder_sparse_step=draw(st.integers(1, 3)),
        mlp_only_layers=draw(st.sampled_from([(), (0,), (1, 2)])),
    )


@given(shapes())
def test_parameters_are_counted_before_anything_is_made(shape: Architecture) -> None:
    config = to_config(shape)
    listed = gpt2_shapes(config) if shape.architecture == "gpt2" else expected_shapes(ModelConfig.from_hf(config))
    made = {name: tuple(tensor.shape) for name, tensor in fresh_tensors(config, seed=0)}
    assert made == listed
    assert count_parameters(config) == sum(math.prod(size) for size in listed.values())


@given(shapes())
def test_what_is_written_is_read_back_the_same(shape: Architecture) -> None:
    """A key that is not written comes back as the family's default: another model, of the same name."""
    if shape.architecture != "gpt2":
        assert ModelConfig.from_hf(to_config(shape)) == to_model_config(shape)


def test_inner_widths_where_none_is_asked_for() -> None:
    def inner(kind: Any, width: int) -> int:
        return Architecture(kind, 10, 8, 1, width, 1).inner

    assert [inner("llama", width) for width in (256, 576, 768)] == [704, 1536, 2048]
    assert inner("gpt2", 768) == 3072


def shape(kind: Any = "llama", **changes: Any) -> Architecture:
    return Architecture(kind, **{
        "vocab_size": 60, "max_position_embeddings": 32, "num_hidden_layers": 3, "hidden_size": 64,
        "num_attention_heads": 4, **changes,
    })  # fmt: skip


MIXTURE: dict[str, Any] = {"num_experts": 3, "decoder_sparse_step": 2}


@pytest.mark.parametrize("kind, changes", [("llama", {}), ("qwen3_moe", MIXTURE), ("gpt2", {})])
def test_fresh_weights_are_a_function_of_the_seed_and_their_name(kind: str, changes: dict[str, Any]) -> None:
    """Drawn from one stream, a layer more would change every weight after it, and so would the order of making."""
    first = dict(fresh_tensors(to_config(shape(kind, **changes)), seed=1))
    deeper = dict(fresh_tensors(to_config(shape(kind, **changes, num_hidden_layers=5)), seed=1))
    other = dict(fresh_tensors(to_config(shape(kind, **changes)), seed=2))
    torch.rand(7)
    assert all(torch.equal(tensor, again) for tensor, again in zip(first.values(), dict(
        fresh_tensors(to_config(shape(kind, **changes)), seed=1)).values(), strict=True))  # fmt: skip
    ends = ("o_proj.weight", "down_proj.weight", "c_proj.weight")
    for name, tensor in first.items():
        # The ends of blocks are scaled by the depth; their direction stays.
        ratio = math.sqrt(5 / 3) if name.endswith(ends) else 1.0
        assert torch.allclose(tensor, deeper[name] * ratio, rtol=1e-6), name
        if tensor.ndim == 2:
            assert not torch.equal(tensor, other[name])
    matrices = [tensor for tensor in first.values() if tensor.ndim == 2]
    assert len({tensor.flatten()[:8].numpy().tobytes() for tensor in matrices}) == len(matrices), "two are the same"


def test_fresh_weights_have_the_deviation_asked_for() -> None:
    tensors = dict(fresh_tensors(to_config(shape(initializer_range=0.05, num_hidden_layers=8)), seed=0))
    layer = "model.layers.3."
    assert float(tensors[f"{layer}self_attn.q_proj.weight"].std()) == pytest.approx(0.05, rel=0.05)
    assert float(tensors[f"{layer}mlp.up_proj.weight"].std()) == pytest.approx(0.05, rel=0.05)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        assert float(tensors[f"{layer}{name}.weight"].std()) == pytest.approx(0.05 / 4, rel=0.05)
    assert torch.equal(tensors[f"{layer}input_layernorm.weight"], torch.ones(64))


def test_the_balance_is_trained_where_its_factor_is_not_zero() -> None:
    on, off = to_config(shape("qwen3_moe", **MIXTURE)), to_config(shape("qwen3_moe", **MIXTURE, router_aux_loss_coef=0))
    assert (on["output_router_logits"], off["output_router_logits"]) == (True, False)
    assert on["num_experts"] == on["num_local_experts"] == 3


@pytest.mark.parametrize("vocab_size, specials, word", [(5, (0, 3, 7, 9), "2 special tokens"), (11, (0, 3), "12")])
def test_a_vocabulary_without_room_for_the_tokenizer_is_refused(vocab_size: int, specials: Any, word: str) -> None:
    with pytest.raises(ConfigError, match=word) as error:
        require_vocabulary(vocab_size, tokenizer_size=12, special_token_ids=specials)
    assert error.value.where == "model.vocab_size"
    require_vocabulary(12, tokenizer_size=12, special_token_ids=specials)


def test_numbers_that_do_not_go_together_are_refused_without_a_section_as_well() -> None:
    with pytest.raises(ModelError, match="num_key_value_heads"):
        to_config(shape(num_key_value_heads=3))
    with pytest.raises(ModelError, match="num_experts_per_tok"):
        to_config(shape("qwen3_moe", num_experts=2, num_experts_per_tok=4))


def test_the_parameters_of_an_unknown_kind_are_not_guessed() -> None:
    with pytest.raises(ModelError, match="mamba"):
        count_parameters({"model_type": "mamba"})
