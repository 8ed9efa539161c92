"""How text is cut into words before byte-level BPE, and what llama.cpp calls each way.

llama.cpp knows a fixed list of ways (`tokenizer.ggml.pre` in a GGUF file; `llm_tokenizer_bpe` in its llama-vocab.cpp).
Its own converter finds the name by a hash over the ids of a test sentence, which only published vocabularies can have;
a new vocabulary has to be recognised by its rules instead, as here. Knows rules; knows no vocabulary.
"""

from __future__ import annotations

import json
from typing import Any

import tokenizers
from tokenizers import pre_tokenizers

# Written as llama.cpp writes them: `(?i:'s)` would also match the long s (ſ), which llama.cpp does not.
_CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS: dict[str, str] = {
    "qwen2": _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST,
    "llama-bpe": _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST,
}
"""llama.cpp's name -> the pattern of words. Digits stand alone in the first, in threes in the second."""

_IGNORE_CASE = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAKES_WHOLE_WORDS = {"llama-bpe"}  # a word that is in the vocabulary is never put together from merges


def byte_level_words(name: str) -> pre_tokenizers.PreTokenizer:
    """The pre-tokenizer of this name: words by its pattern, then their bytes, each written as one character.

    A word never reaches over a line break into text behind it, so a text cut there gives the same words.
    """
    split = pre_tokenizers.Split(tokenizers.Regex(PATTERNS[name]), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def ggml_pre(backend: tokenizers.Tokenizer) -> str | None:
    """llama.cpp's name for how a tokenizer cuts words, or None where it has none of those known here.

    Normalisation is not looked at: llama.cpp has none, so a tokenizer that normalises (Qwen's NFC) gives other ids
    there on text that is not normalised yet.
    """
    description = json.loads(backend.to_str())
    model = description["model"]
    if model["type"] != "BPE" or (description["decoder"] or {}).get("type") != "ByteLevel":
        return None
    name = _name(_steps(description["pre_tokenizer"]))
    return name if bool(model.get("ignore_merges")) == (name in _TAKES_WHOLE_WORDS) else None


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    return pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]


def _name(steps: list[dict[str, Any]]) -> str | None:
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    kinds = [step["type"] for step in steps]
    if steps[-1].get("use_regex", True):
        digits = kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]
        return "smollm" if digits else "gpt-2" if kinds == ["ByteLevel"] else None
    if kinds != ["Split", "ByteLevel"] or steps[0]["behavior"] != "Isolated" or steps[0]["invert"]:
        return None
    pattern = str(steps[0]["pattern"].get("Regex")).replace(_IGNORE_CASE, _CONTRACTIONS)
    return next((name for name, known in PATTERNS.items() if known == pattern), None)
