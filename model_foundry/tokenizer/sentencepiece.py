"""Text to ids exactly as SentencePiece does it, with the models of the `tokenizers` package.

White space and normalisation are done here, as in google/sentencepiece's `normalizer.cc`; `tokenizers` then sees text
that is normalised already, and finds the pieces. Its own normalisers cannot say all of it: see `charsmap`. What they
can say is in `sentencepiece_backend`, for programs that read nothing but tokenizer.json.

Equal to SentencePiece 0.2.3, but for one thing: where two divisions of a text by a unigram model have equal scores, as
`a aaa` and `aaa a` do, SentencePiece takes the one that its rounding (float32, summed from the beginning) favours.
Knows one model; does not know files, templates, or which tokens structure a conversation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from model_foundry.tokenizer.charsmap import CharsMap
from model_foundry.tokenizer.plain import encodable
from model_foundry.tokenizer.sentencepiece_backend import SPACE, pieces_backend
from model_foundry.tokenizer.sentencepiece_file import PieceType, SentencePieceModel

Span = tuple[int, int]


class Part(NamedTuple):
    """What original[start:end] became; `is_rule` where a rule wrote it, else it stands character for character."""

    text: str
    start: int
    end: int
    is_rule: bool


@dataclass(frozen=True)
class NormalisedText:
    """A text as the model sees it, and where each of its characters comes from."""

    text: str
    parts: tuple[Part, ...]

    def originals(self, spans: Sequence[Span]) -> list[Span]:
        """Where spans of the normalised text lie in the original."""
        if not self.text:
            return [(0, 0)] * len(spans)
        starts, ends = self._places
        firsts = np.array([start for start, _ in spans], dtype=np.int64)
        lasts = np.maximum(np.array([end for _, end in spans], dtype=np.int64) - 1, firsts)
        return list(zip(starts[firsts].tolist(), ends[lasts].tolist(), strict=True))

    @cached_property
    def _places(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 [characters], twice: where each character of the normalised text begins and ends in the original."""
        starts, ends = [], []
        for text, start, end, is_rule in self.parts:
            if is_rule:
                starts.append(np.full(len(text), start, dtype=np.int64))
                ends.append(np.full(len(text), end, dtype=np.int64))
            else:
                starts.append(np.arange(start, end, dtype=np.int64))
                ends.append(np.arange(start + 1, end + 1, dtype=np.int64))
        return np.concatenate(starts), np.concatenate(ends)


class SentencePieceNormalizer:
    """What SentencePiece does to a text before it looks for pieces.

    Args:
        model: whose rules.
        kept: the user-defined symbols, which stay as they are.

    Raises:
        ValueError: the rules are damaged.
    """

    def __init__(self, model: SentencePieceModel, kept: frozenset[str]) -> None:
        self._map = CharsMap(model.charsmap, kept)
        self._adds_space = model.add_dummy_prefix
        self._removes_spaces = model.remove_extra_whitespaces

    def apply(self, text: str, *, add_space: bool) -> NormalisedText:
        """`text` normalised; with `add_space` the model may put its space in front."""
        parts = list(self._parts(text))
        if self._removes_spaces:
            parts = list(_without_extra_spaces(parts))
        if add_space and self._adds_space and text:
            start = parts[0].start if parts else 0
            parts.insert(0, Part(" ", start, start, True))
        whole = "".join([part.text for part in parts]).replace(" ", SPACE)
        return NormalisedText(whole.rstrip(SPACE) if self._removes_spaces else whole, tuple(parts))

    def _parts(self, text: str) -> Iterator[Part]:
        done = 0
        for start, end, replacement in self._map.find(text):
            if start > done:
                yield Part(text[done:start], done, start, False)
            yield Part(replacement, start, end, True)
            done = end
        if done < len(text):
            yield Part(text[done:], done, len(text), False)


def _without_extra_spaces(parts: Sequence[Part]) -> Iterator[Part]:
    """Drops spaces at the beginning and after another space. What a rule wrote is shortened on its left only."""
    after_space = True
    for text, start, end, is_rule in parts:
        kept = text.lstrip(" ") if after_space else text
        if not kept:
            continue
        after_space = kept.endswith(" ")
        if is_rule:
            yield Part(kept, start, end, True)
            continue
        start = end - len(kept)
        done = 0
        for match in re.finditer(" {2,}", kept):
            yield Part(kept[done : match.start() + 1], start + done, start + match.start() + 1, False)
            done = match.end()
        if done < len(kept):
            yield Part(kept[done:], start + done, end, False)


class SentencePieceEncoder:
    """Ids and places of a text's pieces.

    Args:
        model: the model.
        parsed: strings that are read as a token wherever they stand, with their ids: what the model itself does not
            read, such as its control pieces and tokens that were added to it later.
        hidden: user-defined symbols that are to be plain text.
        space_everywhere: the model's space is put in front of the text after each of these too, not only at the
            beginning (what transformers calls `legacy`).

    Raises:
        ValueError: the model's rules are damaged.
    """

    def __init__(
        self,
        model: SentencePieceModel,
        *,
        parsed: Mapping[str, int] | None = None,
        hidden: frozenset[str] = frozenset(),
        space_everywhere: bool = False,
    ) -> None:
        self._parsed = dict(parsed or {})
        by_length = sorted(self._parsed, key=len, reverse=True)
        self._cut = re.compile(f"({'|'.join(map(re.escape, by_length))})") if by_length else None
        self._normalizer = SentencePieceNormalizer(model, frozenset(model.of_type(PieceType.USER_DEFINED)) - hidden)
        self._backend = pieces_backend(model, hidden)
        self._unknown_id = model.unknown_id
        self._unknown = model.pieces[model.unknown_id].text
        self._byte_ids = model.byte_ids
        self._space_everywhere = space_everywhere

    def encode(self, text: str, *, first: bool) -> tuple[list[int], list[Span]]:
        """Ids and character offsets of `text`; `first` when it begins the conversation.

        Raises:
            DataError: the text holds the two characters kept for our own use, or half a character.
        """
        ids: list[int] = []
        offsets: list[Span] = []
        for start, section in self._sections(encodable(text)):
            if (token_id := self._parsed.get(section)) is not None:
                ids.append(token_id)
                offsets.append((start, start + len(section)))
                continue
            normalised = self._normalise(section, first=first and start == 0)
            encoding = self._backend.encode(normalised.text, add_special_tokens=False)
            section_ids, spans = self._with_bytes(normalised.text, encoding.ids, encoding.offsets)
            ids += section_ids
            offsets += [(start + a, start + b) for a, b in normalised.originals(spans)]
        return ids, offsets

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, in their order, on all cores; as `encode` with `first`."""
        rows: list[list[int | None]] = []  # None stands for the ids of the next piece of plain text
        plain: list[str] = []
        for text in texts:
            rows.append([])
            for start, section in self._sections(encodable(text)):
                token_id = self._parsed.get(section)
                rows[-1].append(token_id)
                if token_id is None:
                    plain.append(self._normalise(section, first=start == 0).text)
        done = self._backend.encode_batch(plain, add_special_tokens=False)
        pieces = (self._with_bytes(text, one.ids, one.offsets)[0] for text, one in zip(plain, done, strict=True))
        return [[id for entry in row for id in (next(pieces) if entry is None else (entry,))] for row in rows]

    def is_unknown(self, token_id: int, text: str) -> bool:
        """Whether `token_id` is the unknown token and stands for characters of `text`, not for its own name."""
        return token_id == self._unknown_id and self._unknown not in text

    def _sections(self, text: str) -> Iterator[tuple[int, str]]:
        """The text cut before and after each token that is parsed."""
        place = 0
        for section in [text] if self._cut is None else self._cut.split(text):
            if section:
                yield place, section
            place += len(section)

    def _normalise(self, section: str, *, first: bool) -> NormalisedText:
        return self._normalizer.apply(section, add_space=first or self._space_everywhere)

    def _with_bytes(self, text: str, ids: list[int], spans: Sequence[Span]) -> tuple[list[int], Sequence[Span]]:
        """Unknown pieces as their bytes, where the model falls back on these."""
        if not self._byte_ids or self._unknown_id not in ids:
            return ids, spans
        new_ids: list[int] = []
        new_spans: list[Span] = []
        for token_id, (start, end) in zip(ids, spans, strict=True):
            if token_id != self._unknown_id:
                new_ids.append(token_id)
                new_spans.append((start, end))
                continue
            for place in range(start, end):
                as_bytes = text[place].encode()
                new_ids += [self._byte_ids[byte] for byte in as_bytes]
                new_spans += [(place, place + 1)] * len(as_bytes)
        return new_ids, new_spans
