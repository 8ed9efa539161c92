"""The `architecture` section of a configuration as a value for `models`."""

from __future__ import annotations

from collections.abc import Sequence

from model_foundry.config.architecture import ArchitectureSection
from model_foundry.models.architecture import Architecture, require_vocabulary


def architecture_of(
    section: ArchitectureSection,
    *,
    tokenizer_size: int,
    special_token_ids: Sequence[int] = (),
    bos_token_id: int | None = None,
    eos_token_ids: tuple[int, ...] = (),
    pad_token_id: int | None = None,
) -> Architecture:
    """What the section asks for, with the tokenizer's numbers.

    Args:
        tokenizer_size: the tokenizer's highest token id and one.

    Raises:
        ConfigError: the vocabulary has no place for the tokenizer's tokens.
    """
    vocab_size = tokenizer_size if section.vocab_size is None else section.vocab_size
    require_vocabulary(vocab_size, tokenizer_size=tokenizer_size, special_token_ids=special_token_ids)
    return Architecture(
        architecture=section.architecture,
        vocab_size=vocab_size,
        max_position_embeddings=section.max_position_embeddings,
        num_hidden_layers=section.num_hidden_layers,
        hidden_size=section.hidden_size,
        num_attention_heads=section.num_attention_heads,
        intermediate_size=section.intermediate_size,
        num_key_value_heads=section.num_key_value_heads,
        head_dim=section.head_dim,
        hidden_act=section.hidden_act,
        dropout=section.dropout,
        attention_dropout=section.attention_dropout,
        rope_theta=section.rope_theta,
        rms_norm_eps=section.rms_norm_eps,
        tie_word_embeddings=section.tie_word_embeddings,
        initializer_range=section.initializer_range,
        num_experts=section.num_experts,
        num_experts_per_tok=section.num_experts_per_tok,
        moe_intermediate_size=section.moe_intermediate_size,
        norm_topk_prob=section.norm_topk_prob,
        decoder_sparse_step=section.decoder_sparse_step,
        mlp_only_layers=section.mlp_only_layers,
        router_aux_loss_coef=section.router_aux_loss_coef,
        bos_token_id=bos_token_id,
        eos_token_ids=eos_token_ids,
        pad_token_id=pad_token_id,
    )
