"""Text to token ids and back, with the `tokenizers` package alone.

Knows which strings are control tokens and how to encode text so that none of them is ever parsed. Does not know
chat templates (it only carries the model's own as a string), models or training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers

from model_foundry.tokenizer.folder import NAMED_TOKENS, read_folder
from model_foundry.tokenizer.plain import PlainEncoder


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
        files = read_folder(Path(folder))
        return cls(files.backend, named=files.named, chat_template=files.chat_template)

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
