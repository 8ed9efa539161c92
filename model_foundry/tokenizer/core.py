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
from typing import Any

import tokenizers

from model_foundry.errors import DataError, ModelError
from model_foundry.tokenizer.folder import (
    NAMED_TOKENS,
    NO_MAX_LENGTH,
    OWN_KEY,
    TokenizerFiles,
    read_files,
    write_files,
    write_folder,
)
from model_foundry.tokenizer.padding import Batch, Side, pad, truncate
from model_foundry.tokenizer.plain import BackendEncoder, PlainEncoder, TextEncoder, unknown_token
from model_foundry.tokenizer.pre_tokenizers import ggml_pre
from model_foundry.tokenizer.sentencepiece import SentencePieceEncoder
from model_foundry.tokenizer.sentencepiece_file import PieceType, SentencePieceModel

Span = tuple[int, int]


class Tokenizer:
    """A tokenizer with its special tokens by name.

    Args:
        backend: the `tokenizers` object; truncation and padding are switched off.
        named: special tokens by role, `bos_token` to `mask_token`; absent roles are left out.
        chat_template: the model's own Jinja template, if it has one.
        config: other fields of tokenizer_config.json, which are written again when the tokenizer is saved.
        sentencepiece: the model that decides about the ids; `backend` is then only what tokenizer.json can say of it.
        space_everywhere: of that model, see `SentencePieceEncoder`.

    Raises:
        ModelError: the rules of the SentencePiece model are damaged.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        named: Mapping[str, str] | None = None,
        chat_template: str | None = None,
        config: Mapping[str, Any] | None = None,
        sentencepiece: SentencePieceModel | None = None,
        space_everywhere: bool = False,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.chat_template = chat_template
        self.named = {role: text for role, text in (named or {}).items() if role in NAMED_TOKENS}
        self.config = dict(config or {})
        self.sentencepiece = sentencepiece
        self._space_everywhere = space_everywhere
        # As transformers does: a token named in the configuration is a special token even if tokenizer.json forgot it.
        missing = [text for text in self.named.values() if text not in self._added_by_text()]
        if missing:
            backend.add_special_tokens(missing)
        self._added = self._added_by_text()
        self._plain: dict[frozenset[str], TextEncoder] = {}
        if sentencepiece is not None:
            _ = self._parsing  # damage is found now

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read a Hugging Face folder, or a SentencePiece `.model` file (also in such a folder, without tokenizer.json).

        Raises:
            ModelError: a file is missing or cannot be read.
        """
        files = read_files(Path(path))
        return cls(
            files.backend,
            named=files.named,
            chat_template=files.chat_template,
            config=files.config,
            sentencepiece=files.sentencepiece,
            space_everywhere=files.space_everywhere,
        )

    def save(self, folder: Path) -> None:
        """Write a folder of its own, all of it or nothing; a tokenizer that is there is replaced.

        The folder holds tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja, for
        transformers too; and tokenizer.model, which then counts for us, where that decides about the ids.

        Raises:
            DataError: the folder holds other things as well. OSError: it cannot be written.
        """
        write_folder(Path(folder), self._files)

    def save_into(self, folder: Path) -> None:
        """Write the same files into a folder that is there, a model's say.

        Raises:
            OSError: a file cannot be written.
        """
        write_files(Path(folder), self._files)

    # -- text to ids and back --------------------------------------------------------------------------------------

    def encode(
        self, text: str, *, add_special: bool = False, parse_special: bool = False, first: bool = True
    ) -> list[int]:
        """Token ids of `text`.

        Args:
            text: what to encode.
            add_special: add the tokens the tokenizer puts around a text, such as BOS.
            parse_special: read control tokens written in the text as such; by default they are plain text.
            first: it is the beginning; false: it goes on from text before it (with `parse_special` it must begin).

        Raises:
            DataError: the text holds the two characters kept for our own use, or half a character.
        """
        before, after = self._special_frame if add_special else ((), ())
        return [*before, *self._encoder(parse_special).encode(text, first=first)[0], *after]

    def encode_batch(
        self, texts: Iterable[str], *, add_special: bool = False, parse_special: bool = False
    ) -> list[list[int]]:
        """Ids of each text, in their order: `encode` one by one, but on all cores.

        Raises:
            DataError: as `encode`.
        """
        before, after = self._special_frame if add_special else ((), ())
        rows = self._encoder(parse_special).encode_batch(list(texts))
        return [[*before, *row, *after] for row in rows] if before or after else rows

    def encode_padded(
        self,
        texts: Iterable[str],
        *,
        max_length: int | None = None,
        length: int | None = None,
        multiple_of: int = 1,
        add_special: bool = False,
        parse_special: bool = False,
        cut: Side = "right",
        fill: Side = "right",
        pad_id: int | None = None,
    ) -> Batch:
        """Texts as one rectangle of ids with its mask.

        Args:
            texts: B texts.
            max_length: longer rows are cut to this, on the side `cut`; special tokens around a text stay.
            length, multiple_of, fill: as `padding.pad`.
            add_special, parse_special: as `encode`.
            pad_id: what rows are filled with; default the tokenizer's padding token.

        Raises:
            DataError: the tokenizer names no padding token, the lengths do not fit, or as `encode`.
        """
        pad_id = self.pad_id if pad_id is None else pad_id
        if pad_id is None:
            raise DataError("this tokenizer names no padding token", hint="Say which token to fill with: pad_id=…")
        frame = self._special_frame if add_special else ([], [])
        rows = self.encode_batch(texts, parse_special=parse_special)
        limit = max((len(row) for row in rows), default=0) + len(frame[0]) + len(frame[1])
        limit = limit if max_length is None else max_length
        try:
            framed = [truncate(row, limit, frame=frame, side=cut) for row in rows]
            full = len(frame[0]) + len(frame[1])
            lost = [len(row) + full - len(kept) for row, kept in zip(rows, framed, strict=True)]
            return pad(framed, pad_id=pad_id, length=length, multiple_of=multiple_of, side=fill, num_cut=lost)
        except ValueError as error:
            raise DataError(str(error), hint="Give another length") from error

    def scan(self, text: str) -> tuple[list[int], list[Span]]:
        """Ids and character offsets of a text in which control tokens are read as such, as a template writes it.

        Raises:
            DataError: as `encode`.
        """
        return self._parsing.encode(text, first=True)

    def decode(self, ids: Sequence[int] | Iterable[int], *, skip_special: bool = False) -> str:
        """Text of token ids; `skip_special` leaves special tokens out."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def decode_batch(self, rows: Iterable[Iterable[int]], *, skip_special: bool = False) -> list[str]:
        """Text of each row of ids, in their order."""
        return self.backend.decode_batch([[int(i) for i in row] for row in rows], skip_special_tokens=skip_special)

    # -- what it is ------------------------------------------------------------------------------------------------

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

    @cached_property
    def unknown_id(self) -> int | None:
        """The token for what the vocabulary lacks; byte-level vocabularies lack nothing and have none."""
        return unknown_token(self.backend, json.loads(self.backend.to_str())["model"])[0]

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Every added token and its id."""
        return {text: token_id for text, (token_id, _) in self._added.items()}

    @cached_property
    def adds_bos(self) -> bool:
        """Whether the tokenizer itself puts BOS before a text."""
        before, _ = self._special_frame
        return self.bos_id is not None and self.bos_id in before

    @property
    def max_length(self) -> int | None:
        """The longest text in tokens that its model takes, if the files say so."""
        length = self.config.get("model_max_length")
        return int(length) if isinstance(length, (int, float)) and 0 < length < NO_MAX_LENGTH else None

    @cached_property
    def ggml_pre(self) -> str | None:
        """What llama.cpp calls the way this tokenizer cuts text into words: the GGUF field `tokenizer.ggml.pre`.

        None where llama.cpp has no name for it; for SentencePiece models it needs none.
        """
        return None if self.sentencepiece is not None else ggml_pre(self.backend)

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether each token is some bytes, so that every text can be written."""
        return isinstance(self.backend.decoder, tokenizers.decoders.ByteLevel)

    @cached_property
    def max_chars_per_token(self) -> int | None:
        """No token stands for more characters than this; None where that cannot be known.

        It is known for byte-level vocabularies, where each token is its bytes. NFC normalisation, the only one
        allowed for, makes at most one character of four.
        """
        description = json.loads(self.backend.to_str())
        normalizer = description["normalizer"]
        takes_spaces = any(token["lstrip"] or token["rstrip"] for token in description["added_tokens"])
        if not self.is_byte_level or takes_spaces or (normalizer is not None and normalizer["type"] != "NFC"):
            return None
        longest = max(len(piece) for piece in self.backend.get_vocab(with_added_tokens=True))
        return longest if normalizer is None else 4 * longest

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the vocabulary, rules and named tokens; independent of how the files are written."""
        content = self.backend.to_str() + json.dumps(self.named, sort_keys=True)
        if self.sentencepiece is not None:
            content += self.sentencepiece.sha256
        return hashlib.sha256(content.encode("utf-8")).hexdigest()

    def control_tokens(self, template: str | None = None) -> frozenset[str]:
        """The added tokens that structure a conversation, which text must not be able to write.

        These are the special ones, and the others that the template writes (Qwen's <think>, say). Ordinary added
        tokens, such as Gemma's runs of newlines or HTML tags, are text.
        """
        return self._control_tokens(template if template is not None else self.chat_template or "")

    def is_special(self, text: str) -> bool:
        return text in self._added and self._added[text][1]

    def plain(self, control: frozenset[str]) -> TextEncoder:
        """An encoder for which the `control` tokens do not exist. Built on first use, then kept."""
        if control not in self._plain:
            model = self.sentencepiece
            if model is None:
                self._plain[control] = PlainEncoder(self.backend, control)
            else:
                ordinary = {text: token_id for text, (token_id, special) in self._added.items() if not special}
                symbols = model.of_type(PieceType.USER_DEFINED)
                parsed = {text: token_id for text, token_id in ordinary.items() if text not in control | symbols.keys()}
                self._plain[control] = self._sentencepiece_encoder(model, parsed, hidden=control & symbols.keys())
        return self._plain[control]

    def _encoder(self, parse_special: bool) -> TextEncoder:
        return self._parsing if parse_special else self.plain(self.control_tokens())

    @cached_property
    def _parsing(self) -> TextEncoder:
        model = self.sentencepiece
        if model is None:
            return BackendEncoder(self.backend)
        symbols = model.of_type(PieceType.USER_DEFINED)
        parsed = {text: token_id for text, (token_id, _) in self._added.items() if text not in symbols}
        return self._sentencepiece_encoder(model, parsed)

    def _sentencepiece_encoder(
        self, model: SentencePieceModel, parsed: Mapping[str, int], hidden: frozenset[str] = frozenset()
    ) -> TextEncoder:
        try:
            return SentencePieceEncoder(model, parsed=parsed, hidden=hidden, space_everywhere=self._space_everywhere)
        except ValueError as error:
            raise ModelError(f"the SentencePiece model cannot be used: {error}") from error

    @property
    def _files(self) -> TokenizerFiles:
        own = dict(self.config.get(OWN_KEY) or {})
        if self.ggml_pre is not None:
            own["ggml_pre"] = self.ggml_pre
        config = self.config | ({OWN_KEY: own} if own else {})
        return TokenizerFiles(
            self.backend, self.named, self.chat_template, config, self.sentencepiece, self._space_everywhere
        )

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
