"""Text to token ids and back, read from a Hugging Face folder with the `tokenizers` package alone.

Knows which strings are control tokens and how to encode text so that none of them is ever parsed. Does not know
chat templates (it only carries the model's own as a string), models or training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from model_foundry.errors import DataError, ModelError

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# Two noncharacters, which Unicode keeps out of interchanged text. Strings that begin so belong to us alone.
RESERVED = "\U0010fffe\U0010ffff"


class Tokenizer:
    """A tokenizer with its special tokens by name.

    Args:
        backend: the `tokenizers` object; truncation and padding are switched off.
        named: special tokens by role, `bos_token` to `mask_token`; absent roles are left out.
        chat_template: the model's own Jinja template, if it has one.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, *, named: Mapping[str, str] | None = None, chat_template: str | None = None
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.chat_template = chat_template
        self.named = {role: text for role, text in (named or {}).items() if role in NAMED_TOKENS}
        # As transformers does: a token named in the configuration is a special token even if tokenizer.json forgot it.
        missing = [text for text in self.named.values() if text not in self._added_by_text()]
        if missing:
            backend.add_special_tokens(missing)
        self._added = self._added_by_text()
        self._plain: dict[frozenset[str], PlainEncoder] = {}

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read tokenizer.json, tokenizer_config.json, special_tokens_map.json and the chat template of a folder.

        Raises:
            ModelError: a file is missing or cannot be read.
        """
        folder = Path(folder)
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
        return cls(backend, named=named, chat_template=_find_chat_template(folder, config))

    def encode(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Token ids of `text`.

        Args:
            text: what to encode.
            add_special: add the tokens the tokenizer puts around a text, such as BOS.
            parse_special: read control tokens written in the text as such; by default they are plain text.

        Raises:
            DataError: the text holds the two characters kept for our own use.
        """
        if parse_special:
            return self.backend.encode(text, add_special_tokens=add_special).ids
        ids = self.plain(self.control_tokens()).encode(text, first=True)[0]
        if not add_special:
            return ids
        before, after = self._special_frame
        return [*before, *ids, *after]

    def decode(self, ids: Sequence[int] | Iterable[int], *, skip_special: bool = False) -> str:
        """Text of token ids; `skip_special` leaves special tokens out."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included. A model's embedding may have more rows than that."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos_id(self) -> int | None:
        return self._named_id("bos_token")

    @property
    def eos_id(self) -> int | None:
        return self._named_id("eos_token")

    @property
    def pad_id(self) -> int | None:
        return self._named_id("pad_token")

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Every added token and its id."""
        return {text: token_id for text, (token_id, _) in self._added.items()}

    @cached_property
    def adds_bos(self) -> bool:
        """Whether the tokenizer itself puts BOS before a text."""
        before, _ = self._special_frame
        return self.bos_id is not None and self.bos_id in before

    @cached_property
    def max_chars_per_token(self) -> int | None:
        """No token stands for more characters than this; None where that cannot be known.

        It is known for byte-level vocabularies, where each token is its bytes. NFC normalisation, the only one
        allowed for, makes at most one character of four.
        """
        description = json.loads(self.backend.to_str())
        normalizer = description["normalizer"]
        is_byte_level = (description["decoder"] or {}).get("type") == "ByteLevel"
        takes_spaces = any(token["lstrip"] or token["rstrip"] for token in description["added_tokens"])
        if not is_byte_level or takes_spaces or (normalizer is not None and normalizer["type"] != "NFC"):
            return None
        longest = max(len(piece) for piece in self.backend.get_vocab(with_added_tokens=True))
        return longest if normalizer is None else 4 * longest

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the vocabulary, rules and named tokens; independent of how the files are written."""
        content = self.backend.to_str() + json.dumps(self.named, sort_keys=True)
        return hashlib.sha256(content.encode("utf-8")).hexdigest()

    def control_tokens(self, template: str | None = None) -> frozenset[str]:
        """The added tokens that structure a conversation, which text must not be able to write.

        These are the special ones, and the others that the template writes (Qwen's <think>, say). Ordinary added
        tokens, such as Gemma's runs of newlines or HTML tags, are text.
        """
        return self._control_tokens(template if template is not None else self.chat_template or "")

    def is_special(self, text: str) -> bool:
        return text in self._added and self._added[text][1]

    def plain(self, control: frozenset[str]) -> PlainEncoder:
        """An encoder for which the `control` tokens do not exist. Built on first use, then kept."""
        if control not in self._plain:
            self._plain[control] = PlainEncoder(self.backend, control)
        return self._plain[control]

    def _control_tokens(self, template: str) -> frozenset[str]:
        return frozenset(
            text for text, (_, special) in self._added.items() if text.strip() and (special or text in template)
        )

    @cached_property
    def _special_frame(self) -> tuple[list[int], list[int]]:
        """Ids the tokenizer puts before and after a text."""
        bare = self.backend.encode("a", add_special_tokens=False).ids
        framed = self.backend.encode("a", add_special_tokens=True).ids
        for start in range(len(framed) - len(bare) + 1):
            if framed[start : start + len(bare)] == bare:
                return framed[:start], framed[start + len(bare) :]
        return [], []

    def _named_id(self, role: str) -> int | None:
        return self.backend.token_to_id(self.named[role]) if role in self.named else None

    def _added_by_text(self) -> dict[str, tuple[int, bool]]:
        decoder = self.backend.get_added_tokens_decoder()
        return {token.content: (token_id, token.special) for token_id, token in decoder.items()}


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
