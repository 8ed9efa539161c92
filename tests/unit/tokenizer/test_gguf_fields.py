"""What a GGUF file says of a tokenizer: as many entries as rows, and the types that keep control tokens out of text."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers

from model_foundry.errors import ModelError
from model_foundry.tokenizer import Tokenizer
from model_foundry.tokenizer.gguf_fields import gguf_fields
from model_foundry.tokenizer.special import special_tokens
from model_foundry.tokenizer.training import train_tokenizer
from tests.conftest import CHATML, CORPUS

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5


def test_a_trained_vocabulary() -> None:
    done = train_tokenizer(CORPUS, vocab_size=300, special=special_tokens(CHATML), chat_template=CHATML)
    fields = gguf_fields(done.tokenizer, num_rows=320)
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "qwen2")
    assert (len(tokens), len(set(tokens)), len(types)) == (320, 320, 320)
    assert types == [CONTROL] * 4 + [NORMAL] * 296 + [UNUSED] * 20
    assert len(fields["tokenizer.ggml.merges"]) == done.num_merges
    assert all(left + right in tokens for left, right in map(str.split, fields["tokenizer.ggml.merges"]))
    assert tokens[fields["tokenizer.ggml.eos_token_id"]] == "<|endoftext|>"
    assert tokens[fields["tokenizer.ggml.padding_token_id"]] == "<|pad|>"
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.chat_template"] == CHATML


def test_added_tokens_that_are_not_special_are_not_control(chatml_folder: Path) -> None:
    """As control tokens they would vanish from what a server prints: <think>, say."""
    tokenizer = Tokenizer.load(chatml_folder)
    types = gguf_fields(tokenizer)["tokenizer.ggml.token_type"]
    assert types[tokenizer.special_tokens["<think>"]] == USER_DEFINED
    assert types[tokenizer.special_tokens["<|im_end|>"]] == CONTROL


@pytest.mark.parametrize(("kind", "name"), [("bpe", "llama"), ("unigram", "t5")])
def test_a_sentencepiece_model(kind: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "a.model").write_bytes(trained(kind, **(PLAIN if kind == "bpe" else {})))
    tokenizer = Tokenizer.load(tmp_path / "a.model")
    fields = gguf_fields(tokenizer)
    assert fields["tokenizer.ggml.add_eos_token"] is False  # of a `t5` vocabulary llama.cpp would end every prompt
    assert fields["tokenizer.ggml.model"] == name
    assert len(fields["tokenizer.ggml.scores"]) == len(fields["tokenizer.ggml.tokens"]) == tokenizer.vocab_size
    assert fields["tokenizer.ggml.token_type"][:4] == [UNKNOWN, CONTROL, CONTROL, USER_DEFINED]
    assert ("tokenizer.ggml.precompiled_charsmap" in fields) == (kind == "unigram")
    assert fields["tokenizer.ggml.unknown_token_id"] == 0


def test_what_llama_cpp_would_encode_otherwise_is_refused(tmp_path: Path) -> None:
    own_words = tokenizers.Tokenizer(tokenizers.models.BPE())
    own_words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    own_words.decoder = tokenizers.decoders.ByteLevel()
    with pytest.raises(ModelError, match="no name"):
        gguf_fields(Tokenizer(own_words))
    (tmp_path / "a.model").write_bytes(trained("unigram", byte_fallback=True))
    with pytest.raises(ModelError, match="byte fallback"):
        gguf_fields(Tokenizer.load(tmp_path / "a.model"))


@pytest.mark.parametrize("rule", [{"normalization_rule_name": "nmt_nfkc"}, {"remove_extra_whitespaces": True}])
def test_rules_that_llama_cpp_passes_over_are_refused(rule: dict[str, Any], tmp_path: Path) -> None:
    """Two spaces, or a ligature, had other ids in the GGUF; the checks' prompts hold neither."""
    (tmp_path / "a.model").write_bytes(trained("bpe", **(PLAIN | rule)))
    with pytest.raises(ModelError, match="rewrites no text for BPE models"):
        gguf_fields(Tokenizer.load(tmp_path / "a.model"))


def test_too_few_rows_are_refused(chatml_folder: Path) -> None:
    with pytest.raises(ModelError, match="10 rows"):
        gguf_fields(Tokenizer.load(chatml_folder), num_rows=10)


PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


def trained(kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter(CORPUS[0].splitlines() * 4), model_writer=file, model_type=kind, vocab_size=350,
        minloglevel=2, hard_vocab_limit=False, user_defined_symbols=["<sep>"], **options,
    )  # fmt: skip
    return file.getvalue()
