"""How well a tokenizer fits a text it was not made from: how short it gets, and whether it comes back.

Knows tokenizers and texts; does not know files or how a report is printed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from model_foundry.errors import DataError
from model_foundry.tokenizer.core import Tokenizer

_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_BATCH_TEXTS = 256
_BATCH_CHARS = 4_000_000
_CONTEXT_CHARS = 20
NUM_LONGEST = 10


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A text and where it comes from."""

    source: str
    text: str


@dataclass(frozen=True, slots=True)
class Difference:
    """The first place where a text does not come back.

    Attributes:
        source: which text.
        byte: offset in its UTF-8 bytes, from 0.
        expected, got: the text around the place, and what stands there instead.
    """

    source: str
    byte: int
    expected: str
    got: str


@dataclass(frozen=True, slots=True)
class LongToken:
    """A long token of the vocabulary, and how often the held-out text holds it."""

    token_id: int
    text: str
    count: int


@dataclass(frozen=True, slots=True)
class Quality:
    """What was measured.

    Attributes:
        num_texts, num_bytes, num_chars, num_words, num_tokens: of the held-out text; words are what white space parts.
        vocab_size: tokens in all.
        num_used: different tokens that occurred.
        num_unknown: unknown tokens that occurred.
        num_single: tokens that stand for one character or less.
        num_changed: texts that did not come back byte for byte.
        first_difference: where the first of these differs, or None.
        longest: the longest tokens of the vocabulary, special ones left out.
    """

    num_texts: int
    num_bytes: int
    num_chars: int
    num_words: int
    num_tokens: int
    vocab_size: int
    num_used: int
    num_unknown: int
    num_single: int
    num_changed: int
    first_difference: Difference | None
    longest: tuple[LongToken, ...]

    @property
    def bytes_per_token(self) -> float:
        return self.num_bytes / self.num_tokens

    @property
    def tokens_per_word(self) -> float:
        return self.num_tokens / max(1, self.num_words)

    @property
    def coverage(self) -> float:
        """Share of the vocabulary that occurred."""
        return self.num_used / self.vocab_size

    @property
    def single_share(self) -> float:
        """Share of the tokens that stand for one character or less."""
        return self.num_single / self.num_tokens


def measure(tokenizer: Tokenizer, texts: Iterable[HeldOut]) -> Quality:
    """Encode every text, decode it again, and count. Memory grows with the vocabulary, not with the texts.

    Raises:
        DataError: there is no text in them, or one cannot be encoded.
    """
    counts: Counter[int] = Counter()
    num_texts = num_bytes = num_chars = num_words = num_changed = 0
    first: Difference | None = None
    for batch in _batches(texts):
        rows = tokenizer.encode_batch([each.text for each in batch])
        for held_out, row, back in zip(batch, rows, tokenizer.decode_batch(rows), strict=True):
            counts.update(row)
            num_texts += 1
            num_bytes += len(held_out.text.encode())
            num_chars += len(held_out.text)
            num_words += len(held_out.text.split())
            if back != held_out.text:
                num_changed += 1
                first = first or _difference(held_out, back)
    if not counts:
        raise DataError("there is no text to measure on", hint="Give a file with text that the tokenizer has not seen")
    unknown = tokenizer.unknown_id
    return Quality(
        num_texts=num_texts,
        num_bytes=num_bytes,
        num_chars=num_chars,
        num_words=num_words,
        num_tokens=counts.total(),
        vocab_size=tokenizer.vocab_size,
        num_used=len(counts),
        num_unknown=0 if unknown is None else counts[unknown],
        num_single=sum(count for token_id, count in counts.items() if _is_single(tokenizer, token_id)),
        num_changed=num_changed,
        first_difference=first,
        longest=_longest(tokenizer, counts),
    )


def _batches(texts: Iterable[HeldOut]) -> Iterator[list[HeldOut]]:
    batch: list[HeldOut] = []
    num_chars = 0
    for held_out in texts:
        batch.append(held_out)
        num_chars += len(held_out.text)
        if len(batch) >= _BATCH_TEXTS or num_chars >= _BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


def _difference(held_out: HeldOut, back: str) -> Difference:
    text = held_out.text
    place = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back)))
    start, end = max(0, place - _CONTEXT_CHARS), place + _CONTEXT_CHARS
    return Difference(held_out.source, len(text[:place].encode()), text[start:end], back[start:end])


def _is_single(tokenizer: Tokenizer, token_id: int) -> bool:
    """One character, or one byte of it (which decodes as U+FFFD)."""
    piece = tokenizer.backend.id_to_token(token_id) or ""
    if tokenizer.is_byte_level:
        return len(tokenizer.decode([token_id])) <= 1
    return len(piece) <= 1 or _BYTE_PIECE.fullmatch(piece) is not None


def _longest(tokenizer: Tokenizer, counts: Counter[int]) -> tuple[LongToken, ...]:
    special = set(tokenizer.special_tokens.values())
    ids = [token_id for token_id in tokenizer.backend.get_vocab().values() if token_id not in special]
    pieces = {token_id: tokenizer.backend.id_to_token(token_id) or "" for token_id in ids}
    by_length = sorted(ids, key=lambda token_id: (-len(pieces[token_id]), token_id))
    return tuple(LongToken(each, tokenizer.decode([each]), counts[each]) for each in islice(by_length, NUM_LONGEST))
