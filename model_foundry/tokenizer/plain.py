"""Encoding people's text so that no control token can ever come out of it.

Knows how the `tokenizers` package describes a tokenizer; does not know which tokens are control tokens, or templates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import tokenizers

from model_foundry.errors import DataError

# Two noncharacters, which Unicode keeps out of interchanged text. Strings that begin so belong to us alone.
RESERVED = "\U0010fffe\U0010ffff"


def encodable(text: str) -> str:
    """`text` itself.

    Raises:
        DataError: it holds the reserved characters, or half a character (a surrogate without its other half).
    """
    if RESERVED in text:
        raise DataError(
            "the text holds the characters U+10FFFE U+10FFFF, which are not for text and are used internally",
            hint="Remove them",
        )
    return whole_characters(text)


def whole_characters(text: str) -> str:
    """`text` itself.

    Raises:
        DataError: it holds half a character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        what = f"character {error.start + 1:,} of the text is half a character (U+{ord(text[error.start]):04X})"
        raise DataError(what, hint="Remove it, or read the text as UTF-16 first") from error
    return text


class TextEncoder(Protocol):
    """Text to ids, with the character offsets of each; `first` where the text begins a conversation."""

    def encode(self, text: str, *, first: bool) -> tuple[list[int], list[tuple[int, int]]]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def is_unknown(self, token_id: int, text: str) -> bool: ...


class BackendEncoder:
    """What the tokenizer's own files say: every added token in the text is read as such."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend

    @cached_property
    def _unknown(self) -> tuple[int | None, str]:
        return unknown_token(self._backend, json.loads(self._backend.to_str())["model"])

    def encode(self, text: str, *, first: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and character offsets; `first` must be true, for text in the middle cannot be told from a beginning."""
        encoding = self._backend.encode(whole_characters(text), add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, in their order."""
        whole = [whole_characters(text) for text in texts]
        return [encoding.ids for encoding in self._backend.encode_batch_fast(whole, add_special_tokens=False)]

    def is_unknown(self, token_id: int, text: str) -> bool:
        """Whether `token_id` is the unknown token and stands for characters of `text`, not for its own name."""
        return token_id == self._unknown[0] and self._unknown[1] not in text


class PlainEncoder:
    """A copy of a tokenizer in which the control tokens carry names no text can spell.

    Ids stay what they are. A sentinel token in front of a text makes the rest behave as in the middle of a
    conversation, where SentencePiece-like tokenizers put no space before the first word.
    """

    def __init__(self, backend: tokenizers.Tokenizer, control: frozenset[str]) -> None:
        description = json.loads(backend.to_str())
        self._unknown_id, self._unknown = unknown_token(backend, description["model"])
        # A character outside the vocabulary gives the unknown token, written or not.
        self._control_ids = frozenset(backend.token_to_id(text) for text in control) - {self._unknown_id}
        description = _hide_tokens(description, control)
        self._backend = tokenizers.Tokenizer.from_str(json.dumps(description, ensure_ascii=False))
        self._sentinel = RESERVED + "start"
        sentinel = tokenizers.AddedToken(self._sentinel, special=True, normalized=False)
        self._backend.add_special_tokens([sentinel])

    @property
    def model(self) -> Any:
        """The `tokenizers` model: pieces to ids, once a text has been cut."""
        return self._backend.model

    def encode(self, text: str, *, first: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and character offsets of `text`; `first` when it begins the conversation.

        Raises:
            DataError: the text holds the reserved characters, or a control id came out all the same.
        """
        text = encodable(text)
        if first:
            encoding = self._backend.encode(text, add_special_tokens=False)
            ids, offsets = encoding.ids, encoding.offsets
        else:
            encoding = self._backend.encode(self._sentinel + text, add_special_tokens=False)
            shift = len(self._sentinel)
            ids = encoding.ids[1:]
            offsets = [(start - shift, end - shift) for start, end in encoding.offsets[1:]]
        self._check(ids)
        return ids, offsets

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, in their order; as `encode` with `first`.

        Raises:
            DataError: as `encode`.
        """
        whole = [encodable(text) for text in texts]
        rows = [encoding.ids for encoding in self._backend.encode_batch_fast(whole, add_special_tokens=False)]
        for row in rows:
            self._check(row)
        return rows

    def is_unknown(self, token_id: int, text: str) -> bool:
        """Whether `token_id` is the unknown token and stands for characters of `text`, not for its own name."""
        return token_id == self._unknown_id and self._unknown not in text

    def _check(self, ids: Sequence[int]) -> None:
        if not self._control_ids.isdisjoint(ids):
            raise DataError("this tokenizer makes a control token out of plain text", hint="Report this tokenizer")


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


def unknown_token(backend: tokenizers.Tokenizer, model: Mapping[str, Any]) -> tuple[int | None, str]:
    """Id and name of the token for what the vocabulary lacks: Unigram gives the id, other models the name."""
    if model.get("unk_id") is not None:
        return model["unk_id"], backend.id_to_token(model["unk_id"]) or ""
    name = model.get("unk_token")
    return (backend.token_to_id(name), name) if name else (None, "")
