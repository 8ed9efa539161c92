"""A model to be made from nothing: from a shape to a `config.json`, the names and sizes of its weights, their number.

Arithmetic only: it allocates nothing, and does not know torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from model_foundry.errors import ConfigError, ModelError
from model_foundry.models.config import FAMILIES, FULL, ModelConfig
from model_foundry.models.mixture import MixtureConfig

INNER_MULTIPLE = 64


@dataclass(frozen=True, slots=True)
class Architecture:
    """A shape as a person asks for it; None takes what the architecture usually has. Fields as in `config.json`."""

    architecture: Literal["llama", "qwen3", "qwen3_moe", "gpt2"]
    vocab_size: int
    max_position_embeddings: int
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    intermediate_size: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str | None = None
    dropout: float = 0.0
    attention_dropout: float = 0.0
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    num_experts: int | None = None
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    norm_topk_prob: bool = True
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    router_aux_loss_coef: float = 0.001
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    @property
    def inner(self) -> int:
        """Inner width of the MLP: four times the width for GPT-2, two thirds of that where it has a gate."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        if self.architecture == "gpt2":
            return 4 * self.hidden_size
        return INNER_MULTIPLE * math.ceil(8 * self.hidden_size / 3 / INNER_MULTIPLE)


def to_config(shape: Architecture) -> dict[str, Any]:
    """The `config.json` of a shape, complete; read back through `ModelConfig.from_hf` where that knows the kind.

    Raises:
        ModelError: the numbers do not go together.
    """
    if shape.architecture == "gpt2":
        return _gpt2_config(shape)
    config = to_model_config(shape).to_hf()
    ModelConfig.from_hf(config, where="architecture")
    return config


def to_model_config(shape: Architecture) -> ModelConfig:
    """A shape of the Llama family as the native decoder's configuration."""
    kind, heads = shape.architecture, shape.num_attention_heads
    if kind not in FAMILIES:
        raise ModelError(f"{kind} is not an architecture of the native decoder", where="model.architecture")
    experts = None
    if kind == "qwen3_moe" and shape.num_experts:
        experts = MixtureConfig(
            num_experts=shape.num_experts,
            num_experts_per_tok=shape.num_experts_per_tok,
            moe_intermediate_size=shape.moe_intermediate_size or max(1, shape.inner // shape.num_experts_per_tok),
            norm_topk_prob=shape.norm_topk_prob,
            decoder_sparse_step=shape.decoder_sparse_step,
            mlp_only_layers=shape.mlp_only_layers,
            router_aux_loss_coef=shape.router_aux_loss_coef,
            output_router_logits=shape.router_aux_loss_coef > 0,
        )
    return ModelConfig(
        architecture=kind,
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=shape.num_key_value_heads or heads,
        head_dim=shape.head_dim or shape.hidden_size // heads,
        max_position_embeddings=shape.max_position_embeddings,
        rms_norm_eps=shape.rms_norm_eps,
        rope_theta=shape.rope_theta,
        tie_word_embeddings=shape.tie_word_embeddings,
        qk_norm=FAMILIES[kind].qk_norm,
        layer_types=(FULL,) * shape.num_hidden_layers,
        hidden_act=shape.hidden_act or "silu",
        bos_token_id=shape.bos_token_id,
        eos_token_ids=shape.eos_token_ids,
        pad_token_id=shape.pad_token_id,
        initializer_range=shape.initializer_range,
        attention_dropout=shape.attention_dropout,
        dropout=shape.dropout,
        experts=experts,
    )


def _gpt2_config(shape: Architecture) -> dict[str, Any]:
    eos = shape.eos_token_ids
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": shape.vocab_size,
        "n_positions": shape.max_position_embeddings,
        "n_embd": shape.hidden_size,
        "n_layer": shape.num_hidden_layers,
        "n_head": shape.num_attention_heads,
        "n_inner": shape.inner,
        "activation_function": shape.hidden_act or "gelu_new",
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "summary_first_dropout": 0.0,
        "layer_norm_epsilon": shape.rms_norm_eps,
        "initializer_range": shape.initializer_range,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "bos_token_id": shape.bos_token_id,
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
        "pad_token_id": shape.pad_token_id,
        "use_cache": True,
    }


def require_vocabulary(vocab_size: int, *, tokenizer_size: int, special_token_ids: Sequence[int]) -> None:
    """Refuse a vocabulary that has no place for what the tokenizer gives.

    Args:
        tokenizer_size: the tokenizer's highest token id and one.

    Raises:
        ConfigError: it is smaller than the special tokens, or than the tokenizer.
    """
    where, hint = "model.vocab_size", f"Leave it out, or set it to at least {tokenizer_size}."
    beyond = sorted(token for token in special_token_ids if token >= vocab_size)
    if beyond:
        what = f"{vocab_size:,} leaves out {len(beyond)} special tokens of the tokenizer, {beyond[0]} first"
        raise ConfigError(what, where=where, hint=hint)
    if tokenizer_size > vocab_size:
        what = f"{vocab_size:,} is less than the tokenizer's {tokenizer_size:,} tokens"
        raise ConfigError(what, where=where, hint=hint)


def count_parameters(config: Mapping[str, Any]) -> int:
    """Parameters by a parsed `config.json` alone, exact; tied ones once.

    Raises:
        ModelError: a kind whose weights are not known here.
    """
    if config.get("model_type") == "gpt2":
        return sum(math.prod(size) for size in gpt2_shapes(config).values())
    return ModelConfig.from_hf(config).num_parameters


def gpt2_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a GPT-2 by its Hugging Face name; matrices are stored [in, out]."""
    width, inner = config["n_embd"], config.get("n_inner") or 4 * config["n_embd"]
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (config["vocab_size"], width),
        "transformer.wpe.weight": (config["n_positions"], width),
    }
    matrices = {
        "attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width),
        "mlp.c_fc": (width, inner), "mlp.c_proj": (inner, width),
    }  # fmt: skip
    for layer in range(config["n_layer"]):
        prefix = f"transformer.h.{layer}."
        for name in ("ln_1", "ln_2"):
            shapes |= {f"{prefix}{name}.weight": (width,), f"{prefix}{name}.bias": (width,)}
        for name, size in matrices.items():
            shapes |= {f"{prefix}{name}.weight": size, f"{prefix}{name}.bias": (size[1],)}
    shapes |= {"transformer.ln_f.weight": (width,), "transformer.ln_f.bias": (width,)}
    if not config.get("tie_word_embeddings", True):
        shapes["lm_head.weight"] = (config["vocab_size"], width)
    return shapes
