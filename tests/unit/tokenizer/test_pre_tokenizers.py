"""How words are cut is recognised by its rules, and means what llama.cpp means by the name."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from model_foundry.tokenizer import Tokenizer
from model_foundry.tokenizer.pre_tokenizers import byte_level_words, ggml_pre

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def backend(pre_tokenizer: object, *, ignore_merges: bool = False) -> tokenizers.Tokenizer:
    result = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    result.pre_tokenizer = pre_tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    result.decoder = decoders.ByteLevel()
    return result


def split(pattern: str) -> object:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"), BYTES])


@pytest.mark.parametrize(
    ("name", "pre_tokenizer"),
    [
        ("qwen2", byte_level_words("qwen2")),
        ("qwen2", split(QWEN)),
        ("gpt-2", pre_tokenizers.ByteLevel(add_prefix_space=False)),
        ("smollm", pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )),
        (None, split(r"\p{L}+|.")),
        (None, pre_tokenizers.ByteLevel(add_prefix_space=True)),
        (None, pre_tokenizers.Whitespace()),
        (None, None),
        (None, split(LLAMA)),
    ],
)  # fmt: skip
def test_the_name_llama_cpp_knows(name: str | None, pre_tokenizer: object) -> None:
    assert ggml_pre(backend(pre_tokenizer)) == name


def test_llama_takes_whole_words_first() -> None:
    """llama.cpp looks a word up before it merges for `llama-bpe` and only for it: a vocabulary must do the same."""
    assert ggml_pre(backend(split(LLAMA), ignore_merges=True)) == "llama-bpe"
    assert ggml_pre(backend(split(QWEN), ignore_merges=True)) is None


def test_words_of_qwen2() -> None:
    words = [text for text, _ in byte_level_words("qwen2").pre_tokenize_str("Don't say\n\n  x=12 !\u017f'\u017f")]
    plain = [bytes(tokenizers.decoders.ByteLevel().decode([word]), "utf-8").decode() for word in words]
    assert plain == ["Don", "'t", " say", "\n\n", " ", " x", "=", "1", "2", " !", "\u017f", "'\u017f"]


def test_tokenizers_say_it_of_themselves(chatml_folder: Path, sentencepiece_folder: Path) -> None:
    assert Tokenizer.load(chatml_folder).ggml_pre == "gpt-2"
    assert Tokenizer.load(sentencepiece_folder).ggml_pre is None
