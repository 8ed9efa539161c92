"""A tokenizer's files in a Hugging Face folder: which there are, which one counts, and what each must not say.

Knows file names and their fields; does not know how text is encoded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from model_foundry.errors import ModelError

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What a folder says: the `tokenizers` object, special tokens by role, the model's own chat template."""

    backend: tokenizers.Tokenizer
    named: Mapping[str, str]
    chat_template: str | None


def read_folder(folder: Path) -> TokenizerFiles:
    """Read tokenizer.json, tokenizer_config.json, special_tokens_map.json and the chat template.

    Raises:
        ModelError: a file is missing or cannot be read.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(
            "there is no tokenizer.json here",
            where=str(folder),
            hint="Give a Hugging Face model folder with a fast tokenizer",
        )
    try:
        backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the package raises bare Exception for every malformed file
        raise ModelError(f"the tokenizer cannot be read: {_first_line(error)}", where=str(path)) from error
    config = _read_json(folder / "tokenizer_config.json")
    _add_missing_tokens(backend, config.get("added_tokens_decoder"))
    named = _named_tokens(_read_json(folder / "special_tokens_map.json")) | _named_tokens(config)
    return TokenizerFiles(backend, named, _find_chat_template(folder, config))


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    named = {}
    for role in NAMED_TOKENS:
        value = config.get(role)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str) and text:
            named[role] = text
    return named


def _add_missing_tokens(backend: tokenizers.Tokenizer, added: Any) -> None:
    """Add the tokens that only tokenizer_config.json names, in the order of their ids."""
    if not isinstance(added, dict):
        return
    present = {token.content for token in backend.get_added_tokens_decoder().values()}
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    for _, entry in sorted(added.items(), key=lambda item: int(item[0])):
        if entry["content"] not in present:
            token = tokenizers.AddedToken(entry["content"], **{flag: bool(entry.get(flag, False)) for flag in flags})
            (backend.add_special_tokens if token.special else backend.add_tokens)([token])


def _find_chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The newer chat_template.jinja, or the configuration's key: one template, or a list of named ones."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    value = config.get("chat_template")
    if isinstance(value, list):
        by_name = {entry["name"]: entry["template"] for entry in value}
        return by_name.get("default", next(iter(by_name.values())) if len(by_name) == 1 else None)
    return value if isinstance(value, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"the file is not JSON: {_first_line(error)}", where=str(path)) from error
    if not isinstance(content, dict):
        raise ModelError("a JSON object was expected", where=str(path))
    return content


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
