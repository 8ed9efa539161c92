"""Encoding people's text so that no control token can ever come out of it.

Knows how the `tokenizers` package describes a tokenizer; does not know which tokens are control tokens, or templates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import tokenizers

from model_foundry.errors import DataError

# Two noncharacters, which Unicode keeps out of interchanged text. Strings that begin so belong to us alone.
RESERVED = "\U0010fffe\U0010ffff"


class PlainEncoder:
    """A copy of a tokenizer in which the control tokens carry names no text can spell.

    Ids stay what they are. A sentinel token in front of a text makes the rest behave as in the middle of a
    conversation, where SentencePiece-like tokenizers put no space before the first word.
    """

    def __init__(self, backend: tokenizers.Tokenizer, control: frozenset[str]) -> None:
        description = json.loads(backend.to_str())
        self._unknown_id, self._unknown = _unknown_token(backend, description["model"])
        # A character outside the vocabulary gives the unknown token, written or not.
        self._control_ids = frozenset(backend.token_to_id(text) for text in control) - {self._unknown_id}
        description = _hide_tokens(description, control)
        self._backend = tokenizers.Tokenizer.from_str(json.dumps(description, ensure_ascii=False))
        self._sentinel = RESERVED + "start"
        sentinel = tokenizers.AddedToken(self._sentinel, special=True, normalized=False)
        self._backend.add_special_tokens([sentinel])

    def encode(self, text: str, *, first: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and character offsets of `text`; `first` when it begins the conversation.

        Raises:
            DataError: the text holds the reserved characters, or a control id came out all the same.
        """
        if RESERVED in text:
            raise DataError(
                "the text holds the characters U+10FFFE U+10FFFF, which are not for text and are used internally",
                hint="Remove them",
            )
        if first:
            encoding = self._backend.encode(text, add_special_tokens=False)
            ids, offsets = encoding.ids, encoding.offsets
        else:
            encoding = self._backend.encode(self._sentinel + text, add_special_tokens=False)
            shift = len(self._sentinel)
            ids = encoding.ids[1:]
            offsets = [(start - shift, end - shift) for start, end in encoding.offsets[1:]]
        if not self._control_ids.isdisjoint(ids):
            raise DataError("this tokenizer makes a control token out of plain text", hint="Report this tokenizer")
        return ids, offsets

    def is_unknown(self, token_id: int, text: str) -> bool:
        """Whether `token_id` is the unknown token and stands for characters of `text`, not for its own name."""
        return token_id == self._unknown_id and self._unknown not in text


def _hide_tokens(description: dict[str, Any], control: frozenset[str]) -> dict[str, Any]:
    """Rename `control` in a tokenizer description. Renaming, not removing, because ids are given by order."""
    names = {text: f"{RESERVED}{index}" for index, text in enumerate(sorted(control))}
    for token in description["added_tokens"]:
        if token["content"] in names:
            token.update(content=names[token["content"]], normalized=False, lstrip=False, rstrip=False)
    model = description["model"]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(piece, piece): index for piece, index in vocab.items()}
    elif isinstance(vocab, list):
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if not _touches(merge, names)]
    return description


def _touches(merge: str | list[str], names: Mapping[str, str]) -> bool:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left in names or right in names or left + right in names


def _unknown_token(backend: tokenizers.Tokenizer, model: Mapping[str, Any]) -> tuple[int | None, str]:
    """Id and name of the token for what the vocabulary lacks: Unigram gives the id, other models the name."""
    if model.get("unk_id") is not None:
        return model["unk_id"], backend.id_to_token(model["unk_id"]) or ""
    name = model.get("unk_token")
    return (backend.token_to_id(name), name) if name else (None, "")
