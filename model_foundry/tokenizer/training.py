"""A new vocabulary: byte-level BPE learnt from a stream of texts by the `tokenizers` library's own trainer.

Every text can be encoded and comes back byte for byte, for the 256 bytes are in the vocabulary and nothing is
normalised. Words are cut in a way that llama.cpp knows. The same texts in the same order give the same bytes, whatever
the number of threads. Knows texts; does not know files, rows, or chat templates beyond carrying one.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from model_foundry.errors import ConfigError, DataError
from model_foundry.tokenizer.core import Tokenizer
from model_foundry.tokenizer.plain import whole_characters
from model_foundry.tokenizer.pre_tokenizers import PATTERNS, byte_level_words
from model_foundry.tokenizer.special import SpecialTokens

NUM_BYTES = 256
MAX_PIECE_CHARS = 50_000
"""A longer text is handed on in pieces, so that all cores share it. The words are the same."""
_PROGRESS_CHARS = 1 << 20

OnProgress = Callable[["Progress"], None]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far training is.

    Attributes:
        stage: `reading` while texts come in, then `merging`.
        num_texts, num_chars: read so far.
        seconds: since the start.
    """

    stage: str
    num_texts: int
    num_chars: int
    seconds: float


@dataclass(frozen=True, slots=True)
class TrainedTokenizer:
    """A new tokenizer and what became of the request.

    Attributes:
        tokenizer: ready to be saved.
        wanted_size: the size asked for, rounded up.
        num_merges: learnt tokens, beyond the bytes and the special ones.
        num_filling: reserved tokens that only fill the vocabulary up to its round size.
        num_texts, num_empty, num_chars: the corpus; empty texts are passed over.
        seconds: the whole training.
        seconds_merging: what came after the last text was handed over.
    """

    tokenizer: Tokenizer
    wanted_size: int
    num_merges: int
    num_filling: int
    num_texts: int
    num_empty: int
    num_chars: int
    seconds: float
    seconds_merging: float

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def is_short(self) -> bool:
        """Whether the corpus has too few different pairs for the size asked for."""
        return self.vocab_size < self.wanted_size or self.num_filling > 0


def train_tokenizer(
    texts: Iterable[str],
    *,
    vocab_size: int,
    special: SpecialTokens | None = None,
    chat_template: str | None = None,
    round_to: int = 1,
    min_frequency: int = 2,
    max_length: int | None = None,
    words: str = "qwen2",
    on_progress: OnProgress | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> TrainedTokenizer:
    """Learn a vocabulary.

    Args:
        texts: the corpus, read once; memory grows with the number of different words, not with the texts.
        vocab_size: tokens in all: special ones, 256 bytes, merges.
        special: special tokens and their roles; default end of text and padding.
        chat_template: the Jinja source that the tokenizer carries.
        round_to: the size is rounded up to a multiple of this (64 or 128 suit matrix hardware). The additional entries
            are learnt; what the corpus cannot fill becomes reserved special tokens, and is counted.
        min_frequency: a pair seen less often is not merged.
        max_length: the longest text that the model will take, in tokens, for tokenizer_config.json.
        words: how text is cut before pairs are counted, a name in `pre_tokenizers.PATTERNS`.
        on_progress: told about every million characters, and when merging begins.
        clock: seconds.

    Raises:
        ConfigError: the vocabulary does not hold the bytes and the special tokens, or a number is out of range.
        DataError: there is no text, or a text is no proper Unicode.
    """
    special = special or SpecialTokens()
    wanted = _checked_size(vocab_size, special, round_to=round_to, min_frequency=min_frequency, words=words)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = byte_level_words(words)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=wanted,
        min_frequency=min_frequency,
        special_tokens=[tokenizers.AddedToken(text, special=True, normalized=False) for text in special.tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = _Corpus(texts, on_progress, clock)
    backend.train_from_iterator(corpus.pieces(), trainer)
    end = clock()
    num_merges = backend.get_vocab_size() - NUM_BYTES - len(special.tokens)
    num_filling = -backend.get_vocab_size() % round_to
    backend.add_special_tokens([f"<|reserved_{index}|>" for index in range(num_filling)])
    config: dict[str, Any] = {"add_bos_token": False}
    config |= {} if max_length is None else {"model_max_length": max_length}
    return TrainedTokenizer(
        tokenizer=Tokenizer(backend, named=special.named, chat_template=chat_template, config=config),
        wanted_size=wanted,
        num_merges=num_merges,
        num_filling=num_filling,
        num_texts=corpus.num_texts,
        num_empty=corpus.num_empty,
        num_chars=corpus.num_chars,
        seconds=end - corpus.begin,
        seconds_merging=end - corpus.end,
    )


def _checked_size(vocab_size: int, special: SpecialTokens, *, round_to: int, min_frequency: int, words: str) -> int:
    if words not in PATTERNS:
        raise ConfigError(f"there is no way of cutting words '{words}'", hint=f"Choose one of {', '.join(PATTERNS)}")
    if round_to < 1 or min_frequency < 1:
        raise ConfigError(f"rounding to {round_to} or merging from {min_frequency} on: both must be 1 or more")
    least = NUM_BYTES + len(special.tokens)
    if vocab_size < least:
        raise ConfigError(
            f"a vocabulary of {vocab_size} is too small: {NUM_BYTES} bytes and {len(special.tokens)} special tokens"
            f" ({', '.join(special.tokens)}) are {least}",
            hint=f"Give at least {least}, and some thousands more for words",
        )
    return -(-vocab_size // round_to) * round_to


class _Corpus:
    """The texts on their way into the trainer, counted."""

    def __init__(self, texts: Iterable[str], on_progress: OnProgress | None, clock: Callable[[], float]) -> None:
        self._texts = texts
        self._on_progress = on_progress
        self._clock = clock
        self.num_texts = self.num_empty = self.num_chars = 0
        self.begin = self.end = clock()

    def pieces(self) -> Iterator[str]:
        due = _PROGRESS_CHARS
        for text in self._texts:
            self.num_texts += 1
            self.num_empty += not text
            self.num_chars += len(text)
            yield from cut_at_lines(whole_characters(text))
            if self.num_chars >= due:
                due = self.num_chars + _PROGRESS_CHARS
                self._tell("reading")
        if self.num_texts == self.num_empty:
            what = "the corpus holds no text" if not self.num_texts else f"all {self.num_texts:,} texts are empty"
            raise DataError(what, hint="Give files with text to learn from")
        self.end = self._clock()
        self._tell("merging")

    def _tell(self, stage: str) -> None:
        if self._on_progress is not None:
            self._on_progress(Progress(stage, self.num_texts, self.num_chars, self._clock() - self.begin))


_BEFORE_TEXT = re.compile(r"[\r\n](?=\S)")


def cut_at_lines(text: str, *, max_chars: int = MAX_PIECE_CHARS) -> Iterator[str]:
    """A long text in pieces of at least `max_chars`, cut only where no word can reach across: before a line's text."""
    start = 0
    while len(text) - start > max_chars:
        match = _BEFORE_TEXT.search(text, start + max_chars)
        if match is None:
            break
        yield text[start : match.end()]
        start = match.end()
    if start < len(text):
        yield text[start:] if start else text
