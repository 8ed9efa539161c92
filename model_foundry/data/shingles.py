"""Texts as sets of hashed word triples: what two texts have in common, in a form that is quick to compare.

A token is a run of ASCII letters, digits and underscores with the letters of U+0080 to U+07FF (accented Latin, Greek,
Cyrillic, Hebrew, Arabic); every other visible character, and every character from U+0800 on (scripts that put no spaces
between words, emoji), begins a token of its own. Case and white space do not count. A shingle is three tokens in a row;
a text of one or two tokens is one shingle, an empty text has none.

Three tokens suit rows of a chat as well as code: on 1,000 English instruction rows with a share of the words changed,
a similarity of 0.8 finds 97 % (1 % changed), 95 % (2 %) and 73 % (4 %); windows of five tokens find 91, 77 and 40 %.
The most alike of unrelated rows reach 0.13.

Works on many texts at once: one pass of numpy over their bytes. Knows nothing of rows, files or thresholds.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

SHINGLE_TOKENS = 3
# Arrays of a chunk stay small enough to be reused by the allocator instead of being mapped afresh: twice as fast.
CHUNK_BYTES = 1 << 18
_SPACE, _WORD, _GLUE, _SYMBOL = 32, 2, 4, 8
_VECTOR_BYTES = 8
_LONGEST_VECTOR_TOKEN = 128
# Odd 64-bit constants with well mixed bits: the golden ratio, and the primes of xxHash64.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_PRIME_2 = np.uint64(0xC2B2AE3D27D4EB4F)
_PRIME_3 = np.uint64(0x165667B19E3779F9)
_HALF = np.uint64(32)
# Mask of the first n bytes of a little-endian word.
_FIRST_BYTES = np.array([(1 << 8 * count) - 1 for count in range(_VECTOR_BYTES + 1)], np.uint64)


def _fold_table() -> bytes:
    """ASCII to lower case; what str.split calls white space to a space."""
    table = bytearray(range(256))
    for byte in range(128):
        table[byte] = 32 if chr(byte).isspace() else ord(chr(byte).lower())
    return bytes(table)


def _class_table() -> bytes:
    """What a byte does: begins a token always (symbol), unless glue stands before it (word), or never."""
    table = bytearray(256)
    for byte in range(256):
        if byte == 32:
            table[byte] = _SPACE
        elif byte < 0x80:
            table[byte] = _WORD | _GLUE if chr(byte).isalnum() or byte == ord("_") else _SYMBOL
        elif byte < 0xC0:  # goes on with a character
            table[byte] = _GLUE
        else:
            table[byte] = (_WORD | _GLUE) if byte < 0xE0 else (_SYMBOL | _GLUE)
    return bytes(table)


_ASCII = bytes(range(128))
_FOLD, _CLASS = _fold_table(), _class_table()


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of some texts, hashed.

    Attributes:
        hashes: uint64 [tokens of all texts], in order.
        counts: int64 [texts], tokens of each.
        digests: 16 bytes a text, equal where the normalised texts are equal: SHA-256 of them, cut to 128 bits.
    """

    hashes: np.ndarray
    counts: np.ndarray
    digests: list[bytes]


@dataclass(frozen=True, slots=True)
class ShingleSets:
    """The shingles of some texts.

    Attributes:
        keys: uint64 [shingles of all texts], ascending, none twice: the text's number above, 32 bits of hash below.
        sizes: int64 [texts], distinct shingles of each.
    """

    keys: np.ndarray
    sizes: np.ndarray

    @property
    def values(self) -> np.ndarray:
        """uint32: the hashes alone, ascending within each text."""
        return self.keys.astype(np.uint32)


def normalise(text: str) -> str:
    """The text as it is compared for equality: Unicode NFC, case folded, white space collapsed and stripped."""
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    return " ".join(folded.split())


def _folded(text: str) -> bytes:
    """What `normalise` does beyond ASCII; the rest is done for many texts at once. White space is not collapsed yet."""
    text = unicodedata.normalize("NFC", text)
    data = text.encode("utf-8", "surrogatepass")
    # Most texts with such characters have dashes and quotes only: nothing in them has a case.
    beyond = data.translate(None, _ASCII).decode("utf-8", "surrogatepass")
    spaces = {character for character in beyond if character.isspace()} if beyond.split() != [beyond] else set()
    if not spaces and beyond.casefold() == beyond:
        return data
    for space in spaces:
        text = text.replace(space, " ")
    return unicodedata.normalize("NFC", text.casefold()).encode("utf-8", "surrogatepass")


def text_chunks(
    texts: Iterable[str], *, num_bytes: int = CHUNK_BYTES, on_progress: Callable[[int], None] | None = None
) -> Iterator[list[str]]:
    """Lists of texts of about `num_bytes` characters; a longer text is a list of its own."""
    chunk: list[str] = []
    held = num_done = 0
    for text in texts:
        chunk.append(text)
        held += len(text)
        if held >= num_bytes:
            yield chunk
            num_done += len(chunk)
            if on_progress is not None:
                on_progress(num_done)
            chunk, held = [], 0
    if chunk:
        yield chunk


def hash_tokens(texts: Sequence[str]) -> Tokens:
    """Normalise and tokenise texts. The bytes of all of them are read at once, so give chunks (see `text_chunks`)."""
    parts = [text.encode() if text.isascii() else _folded(text) for text in texts]
    ends = np.cumsum(np.fromiter(map(len, parts), np.int64, len(parts)) + 1)
    data, ends = _collapse(b"\n".join([*parts, b""]).translate(_FOLD), ends)
    starts, lengths = _token_places(data)
    return Tokens(_hash_spans(data, starts, lengths), _counts_within(starts, ends), _digests(data, ends))


def shingle_sets(tokens: Tokens, *, seed: int, wanted: np.ndarray | None = None) -> ShingleSets:
    """Shingles of the texts, numbered from 0.

    Args:
        wanted: bool [texts], which texts to take, all where it is None. The others are left out of the numbering.
    """
    hashes, counts = tokens.hashes, tokens.counts
    if wanted is not None and not wanted.all():
        hashes, counts = hashes[np.repeat(wanted, counts)], counts[wanted]
    mixed, num_windows = _windows(hashes, counts)
    with np.errstate(over="ignore"):
        mixed += np.uint64((seed * 0x9E3779B97F4A7C15 + 0x27D4EB2F165667C5) & 0xFFFFFFFFFFFFFFFF)
    mixed ^= mixed >> np.uint64(31)
    mixed *= _PRIME_3
    mixed >>= _HALF
    mixed |= np.repeat(np.arange(len(counts), dtype=np.uint64) << _HALF, num_windows)
    mixed.sort()
    keys = mixed[_first_of_run(mixed)]
    bounds = np.searchsorted(keys, np.arange(len(counts) + 1, dtype=np.uint64) << _HALF)
    return ShingleSets(keys, np.diff(bounds))


def _first_of_run(ascending: np.ndarray) -> np.ndarray:
    """bool: where a value differs from the one before it."""
    first = np.ones(len(ascending), bool)
    np.not_equal(ascending[1:], ascending[:-1], out=first[1:])
    return first


def _windows(hashes: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A hash for every window of SHINGLE_TOKENS, and how many windows each text has."""
    num_windows = np.where(counts >= SHINGLE_TOKENS, counts - SHINGLE_TOKENS + 1, np.minimum(counts, 1))
    mixed = hashes.copy()
    for offset in range(1, SHINGLE_TOKENS):
        mixed[: len(hashes) - offset] *= _GOLDEN
        mixed[: len(hashes) - offset] += hashes[offset:]
    starts = np.cumsum(counts) - counts
    one, two = starts[counts == 1], starts[counts == 2]
    mixed[one] = hashes[one] * _GOLDEN
    mixed[two] = hashes[two] * _PRIME_2 + hashes[two + 1]
    # Windows that would run into the next text are left out.
    keep = np.ones(len(hashes), bool)
    ends = starts + counts
    for back in range(1, SHINGLE_TOKENS):
        keep[ends[counts > back] - back] = False
    return mixed[keep], num_windows


def _collapse(data: bytes, ends: np.ndarray) -> tuple[bytes, np.ndarray]:
    """One space for a run of them, none at a text's start: every text that is not empty then ends in one space.

    Args:
        ends: int64 [texts], where each text ends, its separator (a space by now) included.
    """
    spaces = np.frombuffer(data, np.uint8) == 32
    doubled = spaces.copy()
    doubled[1:] &= spaces[:-1]
    if not doubled.any():
        return data, ends
    dropped = np.flatnonzero(doubled)
    return np.frombuffer(data, np.uint8)[~doubled].tobytes(), ends - np.searchsorted(dropped, ends)


def _token_places(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Where each token starts, and how many bytes it has; white space is collapsed."""
    classes = np.frombuffer(data.translate(_CLASS), np.uint8)
    # A glue bit of the byte before, shifted onto the bit of a word, takes it away; a symbol's bit stays.
    blocked = np.empty_like(classes)
    blocked[:1] = 0
    np.right_shift(classes[:-1], 1, out=blocked[1:])
    blocked &= _WORD
    begins = classes & ~blocked
    begins &= _WORD | _SYMBOL
    starts = np.flatnonzero(begins.astype(bool))
    nexts = np.empty_like(starts)
    nexts[:-1] = starts[1:]
    nexts[-1:] = len(data)
    lengths = nexts - starts
    nexts -= 1
    lengths -= (classes == _SPACE).view(np.uint8)[nexts]
    return starts, lengths


def _counts_within(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    return np.diff(np.searchsorted(starts, ends), prepend=0)


def _hash_spans(data: bytes, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """64 bits for each span: up to 8 bytes without a collision, more by eights, very long ones by SHA-256."""
    words = np.frombuffer(data + bytes(2 * _VECTOR_BYTES + -len(data) % _VECTOR_BYTES), "<u8")
    hashes = _load(words, starts, lengths)
    hashes ^= hashes >> _HALF
    hashes *= _GOLDEN
    longer = np.flatnonzero(lengths > _VECTOR_BYTES)
    for offset in range(_VECTOR_BYTES, _LONGEST_VECTOR_TOKEN, _VECTOR_BYTES):
        if not len(longer):
            break
        more = _load(words, starts[longer] + offset, lengths[longer] - offset)
        before = hashes[longer]
        hashes[longer] = ((before ^ (before >> np.uint64(29))) + more) * _PRIME_2
        longer = longer[lengths[longer] > offset + _VECTOR_BYTES]
    for index in longer.tolist():
        span = data[starts[index] : starts[index] + lengths[index]]
        hashes[index] = int.from_bytes(hashlib.sha256(span).digest()[:8], "little")
    return hashes


def _load(words: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The first 8 bytes (or `lengths`) from each place, as a little-endian number."""
    places = starts >> 3
    shifts = ((starts & 7) << 3).astype(np.uint64)
    loaded = words[places] >> shifts
    places += 1
    np.subtract(np.uint64(63), shifts, out=shifts)
    loaded |= (words[places] << shifts) << np.uint64(1)
    loaded &= _FIRST_BYTES[np.minimum(lengths, _VECTOR_BYTES)]
    return loaded


def _digests(data: bytes, ends: np.ndarray) -> list[bytes]:
    starts = np.append(0, ends)[: len(ends)]
    # Without the space at the end; an empty text has none.
    spans = zip(starts.tolist(), np.maximum(starts, ends - 1).tolist(), strict=True)
    sha256 = hashlib.sha256
    return [sha256(data[start:end]).digest()[:16] for start, end in spans]
