"""A tokenizer as the fields `tokenizer.*` of a GGUF file, as values: whoever writes the file adds them one by one.

Field names and token types are those of llama.cpp (`llama-vocab.cpp`, `gguf-py/gguf/constants.py`). Knows tokenizers;
does not know how a GGUF file is written, or models.

llama.cpp gave the same ids for 4,000 difficult texts, for a trained vocabulary and for SentencePiece models of both
kinds, but for characters that Unicode has had since version 16: its tables and those of `tokenizers` differ in age. It
rewrites no text for BPE models, so those with rules of their own are refused.
"""

from __future__ import annotations

import json
from typing import Any

from model_foundry.errors import ModelError
from model_foundry.tokenizer.core import Tokenizer
from model_foundry.tokenizer.sentencepiece_file import PieceType, SentencePieceModel

_ROLES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


def gguf_fields(tokenizer: Tokenizer, *, num_rows: int | None = None) -> dict[str, Any]:
    """Field name -> value: str, bool, int, bytes, or a list of str, int or float.

    Args:
        tokenizer: what is described.
        num_rows: rows of the model's embedding; rows without a token get names that no text spells.

    Raises:
        ModelError: llama.cpp cannot encode as this tokenizer does, or the embedding has too few rows.
    """
    size = tokenizer.vocab_size
    num_rows = size if num_rows is None else num_rows
    if num_rows < size:
        raise ModelError(f"the embedding has {num_rows:,} rows, but the tokenizer has {size:,} tokens")
    model = tokenizer.sentencepiece
    fields = _byte_level(tokenizer) if model is None else _sentencepiece(tokenizer, model)
    fillers = range(size, num_rows)
    fields["tokenizer.ggml.tokens"] += [f"[PAD{index}]" for index in fillers]
    fields["tokenizer.ggml.token_type"] += [int(PieceType.UNUSED) for _ in fillers]
    if "tokenizer.ggml.scores" in fields:
        fields["tokenizer.ggml.scores"] += [-1000.0 for _ in fillers]
    for name, role in _ROLES.items():
        if role in tokenizer.named:
            fields[f"tokenizer.ggml.{name}_token_id"] = tokenizer.backend.token_to_id(tokenizer.named[role])
    fields["tokenizer.ggml.add_bos_token"] = tokenizer.adds_bos
    fields["tokenizer.ggml.add_eos_token"] = False  # prompts are gone on with, and llama.cpp ends `t5` ones by itself
    if tokenizer.chat_template is not None:
        fields["tokenizer.chat_template"] = tokenizer.chat_template
    return fields


def _byte_level(tokenizer: Tokenizer) -> dict[str, Any]:
    if tokenizer.ggml_pre is None:
        raise ModelError("llama.cpp has no name for the way this tokenizer cuts text into words")
    merges = json.loads(tokenizer.backend.to_str())["model"]["merges"]
    texts = _texts(tokenizer)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": tokenizer.ggml_pre,
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": [_type_of(tokenizer, text) for text in texts],
        "tokenizer.ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
    }


def _sentencepiece(tokenizer: Tokenizer, model: SentencePieceModel) -> dict[str, Any]:
    if model.kind == "unigram" and model.byte_fallback:
        raise ModelError("llama.cpp knows no byte fallback for unigram models: it would give unknown tokens instead")
    if model.kind == "bpe" and (model.charsmap or model.remove_extra_whitespaces):
        what = "llama.cpp rewrites no text for BPE models: this one's rules would be passed over, and ids be others"
        hint = "Train it as Llama's was: normalization_rule_name=identity, remove_extra_whitespaces=false."
        raise ModelError(what, hint=hint)
    texts = _texts(tokenizer)
    added = texts[len(model.pieces) :]
    fields: dict[str, Any] = {
        "tokenizer.ggml.model": "llama" if model.kind == "bpe" else "t5",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.scores": [piece.score for piece in model.pieces] + [-1000.0 for _ in added],
        "tokenizer.ggml.token_type": [int(piece.type) for piece in model.pieces]
        + [_type_of(tokenizer, text) for text in added],
        "tokenizer.ggml.add_space_prefix": model.add_dummy_prefix,
        "tokenizer.ggml.remove_extra_whitespaces": model.remove_extra_whitespaces,
    }
    if model.charsmap and model.kind == "unigram":
        fields["tokenizer.ggml.precompiled_charsmap"] = model.charsmap
    return fields


def _texts(tokenizer: Tokenizer) -> list[str]:
    """Every token by its id; ids that nothing has are named as fillers are."""
    by_id = {token_id: text for text, token_id in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
    return [by_id.get(index, f"[PAD{index}]") for index in range(tokenizer.vocab_size)]


def _type_of(tokenizer: Tokenizer, text: str) -> int:
    if tokenizer.is_special(text):
        return int(PieceType.CONTROL)
    return int(PieceType.USER_DEFINED if text in tokenizer.special_tokens else PieceType.NORMAL)
