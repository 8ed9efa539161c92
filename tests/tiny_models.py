"""Small random models of every kind, as Hugging Face folders with a tokenizer, made in milliseconds.

Weights are drawn so that everything matters: biases and norms are not zero and one as a fresh model has them, attention
is not uniform, logits spread over several units. A bias left out would go unnoticed on freshly initialised weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from model_foundry.models.config import ModelConfig
from model_foundry.models.decoder import expected_shapes
from model_foundry.models.folder import write_model_folder
from model_foundry.types import Datum, Pair

VOCAB_SIZE = 260
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    "bos_token_id": 0, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
_FOUR_LAYERS = {"num_hidden_layers": 4}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 64, "rope_theta": 1e4}  # fmt: skip
_YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}

NATIVE: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True, "num_attention_heads": 8,
                   "num_key_value_heads": 2, "head_dim": 10},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
    "llama-one-head": {"model_type": "llama", "num_key_value_heads": 4},
    "llama-rope-llama3": {"model_type": "llama", "rope_parameters": _LLAMA3},
    "llama-rope-linear": {"model_type": "llama",
                          "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}},
    "llama-rope-yarn": {"model_type": "llama", "rope_parameters": _YARN},
    "llama-rope-yarn-mscale": {"model_type": "llama", "rope_parameters": _YARN | {
        "mscale": 1.3, "mscale_all_dim": 0.7, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}},
    "mistral": {"model_type": "mistral", "sliding_window": 7},
    "mistral-full": {"model_type": "mistral", "sliding_window": None, "head_dim": 12},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-sliding": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9,
                      "max_window_layers": 1, **_FOUR_LAYERS},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "qwen3-sliding": {"model_type": "qwen3", "head_dim": 16, "use_sliding_window": True, "sliding_window": 11,
                      "attention_bias": True, "layer_types": ["sliding_attention", "full_attention"] * 2,
                      **_FOUR_LAYERS},
    "qwen3-moe": {"model_type": "qwen3_moe", "head_dim": 8, "num_experts": 6, "num_experts_per_tok": 2,
                  "moe_intermediate_size": 12, "norm_topk_prob": True},
    "qwen3-moe-mixed": {"model_type": "qwen3_moe", "head_dim": 16, "num_experts": 5, "num_experts_per_tok": 3,
                        "moe_intermediate_size": 20, "decoder_sparse_step": 2, "use_sliding_window": True,
                        "sliding_window": 9, "attention_bias": True, **_FOUR_LAYERS},
}  # fmt: skip
"""Kinds the native decoder computes, as `config.json` spells them."""

FOREIGN: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 2, "n_head": 4,
             "n_positions": 256, "bos_token_id": 0, "eos_token_id": 2},
    "gemma": {**_SHAPE, "model_type": "gemma", "head_dim": 8, "tie_word_embeddings": True},
    "mixtral": {**_SHAPE, "model_type": "mixtral", "num_local_experts": 4},
}  # fmt: skip
"""Kinds that run through transformers."""


def config_of(kind: str) -> dict[str, Any]:
    """The `config.json` of a kind."""
    if kind in FOREIGN:
        return dict(FOREIGN[kind])
    return {**_SHAPE, **NATIVE[kind]}


def write_tiny_model(folder: Path, kind: str = "llama", *, seed: int = 0, **changes: Any) -> Path:
    """A folder of a native kind, written without transformers.

    Args:
        changes: keys of `config.json` to set otherwise.
    """
    config = config_of(kind) | changes
    generator = torch.Generator().manual_seed(seed)
    shapes = expected_shapes(ModelConfig.from_hf(config))
    tensors = {name: _draw(name, shape, generator) for name, shape in shapes.items()}
    tokenizer = write_tokenizer(folder.parent / f"{folder.name}-tokenizer")
    write_model_folder(folder, config | {"dtype": "float32"}, tensors.items(), tokenizer_from=tokenizer)
    return folder


def write_with_transformers(folder: Path, kind: str, *, seed: int = 0, **changes: Any) -> Path:
    """A folder of any kind as transformers itself writes it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    keys = config_of(kind) | changes
    config = AutoConfig.for_model(keys.pop("model_type"), **keys)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = _draw(name, tuple(parameter.shape), generator)
            # Gemma's norms multiply by one more than their weight.
            parameter.copy_(drawn - 1 if kind == "gemma" and drawn.ndim == 1 else drawn)
    model.save_pretrained(folder)
    return write_tokenizer(folder)


def write_tokenizer(folder: Path) -> Path:
    """Byte-level, no merges: `SPECIALS`, then one token a byte."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*SPECIALS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIALS[2], "pad_token": SPECIALS[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return 0.3 * noise if name.endswith("bias") else 1.0 + 0.3 * noise
    if "embed" in name or "wte" in name or "wpe" in name:
        return noise * 0.5
    return noise / math.sqrt(shape[-1])


def random_rows(lengths: Sequence[int], *, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> list[torch.Tensor]:
    """Rows of random tokens, int64 [T_i]."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab_size, (length,), generator=generator) for length in lengths]


def random_data(lengths: Sequence[int], *, seed: int = 0, share_due: float = 0.6) -> list[Datum]:
    """Rows of so many input tokens with weights that differ, `share_due` of them not zero."""
    rng = np.random.default_rng(seed)
    data = []
    for length in lengths:
        ids = rng.integers(3, VOCAB_SIZE, size=length + 1)
        weights = rng.uniform(0.2, 1.5, size=length + 1) * (rng.uniform(size=length + 1) < share_due)
        data.append(Datum.from_row(ids, weights))
    return data


def random_pairs(shapes: Sequence[tuple[int, int, int]], *, seed: int = 0) -> list[Pair]:
    """Pairs of (shared, better, worse) tokens, all of both answers' due with weight one."""
    made = []
    for number, (shared, *sizes) in enumerate(shapes):
        both = [
            random_data([shared + size], seed=seed + 10 * number + at, share_due=1.0)[0]
            for at, size in enumerate(sizes)
        ]
        rows = []
        for datum in both:
            tokens, weights = datum.tokens.copy(), np.ones(datum.num_tokens, dtype=np.float32)
            tokens[:shared], weights[:shared] = both[0].tokens[:shared], 0.0
            targets = np.concatenate([tokens[1:], datum.loss_inputs["target_tokens"][-1:]])
            inputs = {"target_tokens": targets, "weights": weights}
            rows.append(Datum(tokens, inputs))
        made.append(Pair(*rows))
    return made


def random_comparisons(shapes: Sequence[tuple[int, int, int]], *, seed: int = 0) -> list[Datum]:
    """Such pairs as rows with two branches, beside a reference that is sure of every token to the same degree."""
    return [
        replace(row, loss_inputs={**row.loss_inputs, "logprobs": row.loss_inputs["weights"] * -3})
        for row in (pair.joined() for pair in random_pairs(shapes, seed=seed))
    ]
