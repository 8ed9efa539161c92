"""A block of records to tokens and trained spans, under the policies for what does not fit.

This is what runs in parallel: a block in, arrays and counts out, nothing kept in between. Ids, weights and reasons are
those of `data/tokenise.py`. Knows no files and no bins.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from model_foundry.data.formats import Parsed
from model_foundry.data.rows import BadRows, RowParser
from model_foundry.data.shards.blocks import Block, Section
from model_foundry.data.shards.format import PIECE_SHIFT, Counts
from model_foundry.data.shards.packing import GOES_ON, Segments
from model_foundry.data.shards.plan import PackOptions, separator_of
from model_foundry.data.tokenise import GIANT_ROW_CHARS
from model_foundry.errors import DataError, UnsafeTemplateError
from model_foundry.rendering import Renderer
from model_foundry.rendering.bulk import BulkRenderer, EncodedRow

MAX_NAMED = 10
NOT_ROWS = ("preference", "kto")
Spans = Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class EncodedBlock:
    """What a block became.

    Attributes:
        segments: rows (or pieces of rows) to be packed; for text the documents that begin in this block.
        counts: what became of each record.
        problems: records that cannot be used, by source, where that is an error.
        hint: what helps against the first of them.
    """

    segments: Segments
    counts: Counts
    problems: tuple[tuple[str, str], ...] = ()
    hint: str | None = None


@dataclass(slots=True)
class _Tally:
    """Segments and counts as they come together."""

    num_records: int = 0
    num_rows: int = 0
    num_truncated: int = 0
    num_split: int = 0
    num_escaped: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    first_lost: list[str] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    hint: str | None = None
    ids: list[bytes] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    spans: list[tuple[int, int, int]] = field(default_factory=list)

    def lose(self, source: str, reason: str, detail: str) -> None:
        self.lost[reason] += 1
        if len(self.first_lost) < MAX_NAMED:
            self.first_lost.append(f"{source}: {reason} ({detail})" if detail else f"{source}: {reason}")

    def add(self, row: int, ids: bytes, num_tokens: int, spans: Iterable[tuple[int, int]]) -> None:
        segment = len(self.lengths)
        self.ids.append(ids)
        self.lengths.append(num_tokens)
        self.rows.append(row)
        self.spans += [(segment, first, end) for first, end in spans]

    def finish(self, dtype: np.dtype[Any]) -> EncodedBlock:
        segments = Segments(
            np.frombuffer(b"".join(self.ids), dtype=dtype),
            np.array(self.lengths, dtype=np.int64),
            np.array(self.rows, dtype=np.uint64),
            np.array(self.spans, dtype=np.int64).reshape(-1, 3),
        )
        counts = Counts(
            self.num_records, self.num_rows, self.num_truncated, self.num_split, self.num_escaped,
            dict(self.lost), tuple(self.first_lost),
        )  # fmt: skip
        return EncodedBlock(segments, counts, tuple(self.problems), self.hint)


class _Said(BadRows):
    """Remembers the last problem alone: a block may have hundreds, and each goes its own way."""

    what = ""

    def add(self, source: str, problem: str) -> None:
        self.what = problem


class RowEncoder:
    """Records of one format to rows of at most `max_length` tokens.

    Args:
        format: the rows' format, found out before.

    Raises:
        DataError: rows of this format hold no single conversation. TemplateError: there is no chat template for them.
    """

    def __init__(self, renderer: Renderer, options: PackOptions, *, format: str) -> None:
        if format in NOT_ROWS:
            what = f"rows of the format {format} hold two answers, or bad ones, and are not packed for training"
            raise DataError(what, hint="Convert them with: foundry data convert")
        if format != "text":
            renderer.require_template()
        self._renderer = renderer
        self._bulk = BulkRenderer(renderer, train_on=options.train_on)
        self._options = options
        self._format = format

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._bulk.dtype

    def encode(self, block: Block) -> EncodedBlock:
        """Tokens of a block of records.

        Raises:
            UnsafeTemplateError: the template does what it must not; each row would take seconds to fail.
        """
        tally = _Tally()
        parser, said = RowParser(self._format), _Said()
        ready: list[tuple[int, str, Parsed]] = []
        for row, record in enumerate(block.items, start=block.first_row):
            if isinstance(record, Section):
                raise TypeError("a section is no record")
            tally.num_records += 1
            if (parsed := parser.parse(record, said)) is None:
                self._refuse(tally, record.source, f"not rows of the format {self._format}", said.what)
            elif self._may_fit(tally, record.source, parsed):
                ready.append((row, record.source, parsed))
        for (row, source, _), encoded in zip(ready, self._encoded([parsed for _, _, parsed in ready]), strict=True):
            if isinstance(encoded, DataError):
                what = encoded.what if encoded.where is None else f"{encoded.where}: {encoded.what}"
                self._refuse(tally, source, "refused by the chat template", what, encoded.hint)
            else:
                self._fit(tally, row, source, encoded)
        return tally.finish(self.dtype)

    def _may_fit(self, tally: _Tally, source: str, parsed: Parsed) -> bool:
        """False, and counted, where it is known without encoding that a row is of no use."""
        options = self._options
        has_answer = parsed.text is not None or "assistant" in [message.role for message in parsed.messages]
        if options.train_on != "all" and not has_answer:
            what = "no message has the role assistant, so there is nothing to train on"
            self._refuse(tally, source, "no message has the role assistant", what)
            return False
        try:
            at_least = self._min_tokens(parsed)
        except UnsafeTemplateError:
            raise
        except DataError:
            return True  # it will be refused when it is encoded
        if at_least > options.max_length:
            self._overlong(tally, source, f"at least {at_least:,} tokens")
            return False
        return True

    def _encoded(self, rows: Sequence[Parsed]) -> list[EncodedRow | DataError]:
        """Each row's tokens, or why there are none."""
        if self._format == "text":
            texts = [parsed.text or "" for parsed in rows]
            found = zip(texts, self._bulk.text_all(texts), strict=True)
            return [ids if isinstance(ids, DataError) else self._bulk.framed(text, ids) for text, ids in found]
        return self._bulk.render_all([(parsed.messages, parsed.tools) for parsed in rows])

    def _fit(self, tally: _Tally, row: int, source: str, encoded: EncodedRow) -> None:
        limit, overlength = self._options.max_length, self._options.overlength
        is_long = encoded.num_tokens > limit
        if is_long and overlength in ("drop", "error"):
            self._overlong(tally, source, f"{encoded.num_tokens:,} tokens")
            return
        is_cut = is_long and overlength == "truncate"
        pieces = list(_pieces(encoded, limit, self.dtype.itemsize))[: 1 if is_cut else None]
        if not any(_num_trained(spans) for _, _, spans in pieces):
            after = " once truncated" if is_cut else ""
            tally.lose(source, f"nothing to train on{after}", f"{encoded.num_tokens:,} tokens")
            return
        for piece, (ids, num_tokens, spans) in enumerate(pieces):
            tally.add(row | piece << PIECE_SHIFT, ids, num_tokens, spans)
        tally.num_rows += 1
        tally.num_truncated += is_cut
        tally.num_split += is_long and not is_cut
        tally.num_escaped += encoded.escaped

    def _overlong(self, tally: _Tally, source: str, how_long: str) -> None:
        limit = f"{self._options.max_length:,}"
        if self._options.overlength == "error":
            tally.problems.append((source, f"{how_long}, over max_length {limit}"))
        else:
            tally.lose(source, f"longer than {limit} tokens", how_long)

    def _refuse(self, tally: _Tally, source: str, reason: str, what: str, hint: str | None = None) -> None:
        if self._options.bad_records == "drop":
            tally.lose(source, reason, what)
        else:
            tally.problems.append((source, what))
            tally.hint = tally.hint or hint

    def _min_tokens(self, parsed: Parsed) -> int:
        """A bound that spares encoding a giant row only to lose it; 0 for rows of ordinary size."""
        if self._options.overlength in ("truncate", "split") or _num_chars(parsed) <= GIANT_ROW_CHARS:
            return 0
        text = parsed.text
        if text is None:
            text = self._renderer.text(parsed.messages, tools=parsed.tools)
        return self._renderer.min_tokens(text)


class TextEncoder:
    """Sections of documents to one stream of tokens, a separator behind each document."""

    def __init__(self, renderer: Renderer, options: PackOptions) -> None:
        tokenizer = renderer.tokenizer
        self._bulk = BulkRenderer(renderer)
        self._options = options
        self._between = self._bulk.id_bytes(tokenizer.special_tokens[separator_of(tokenizer, options.separator)])
        starts_with_bos = tokenizer.adds_bos and tokenizer.bos_id is not None
        self._before = self._bulk.id_bytes(tokenizer.bos_id or 0) if starts_with_bos else b""

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._bulk.dtype

    def cut_place(self, text: str) -> int:
        """As `BulkRenderer.cut_place`."""
        return self._bulk.cut_place(text)

    def encode(self, block: Block) -> EncodedBlock:
        """Tokens of a block of sections. Its first segment may go on with a document of the block before."""
        tally = _Tally()
        is_inside = False
        sections = [section for section in block.items if isinstance(section, Section)]
        for section, encoded in zip(sections, self._bulk.text_all([each.text for each in sections]), strict=True):
            tally.num_records += section.is_last
            ids = self._section_ids(tally, section, encoded)
            if not ids:
                continue
            num_tokens = len(ids) // self.dtype.itemsize
            if is_inside and not section.is_first:
                tally.ids.append(ids)
                tally.lengths[-1] += num_tokens
            else:
                tally.add(section.row if section.is_first else GOES_ON, ids, num_tokens, ())
                tally.num_rows += section.is_first
            is_inside = True
        return tally.finish(self.dtype)

    def _section_ids(self, tally: _Tally, section: Section, encoded: bytes | DataError) -> bytes:
        if section.problem is None and not section.text and section.is_first:
            tally.lose(section.source, "empty", "")
            return b""
        problem = encoded.what if isinstance(encoded, DataError) else section.problem
        ids = b"" if isinstance(encoded, DataError) else encoded
        if problem is not None:
            if self._options.bad_records != "drop":
                tally.problems.append((section.source, problem))
                return b""
            tally.lose(section.source, "no text" if section.is_first else "text only at first", problem)
            if section.is_first:
                return b""
        return (self._before if section.is_first else b"") + ids + (self._between if section.is_last else b"")


def first_format(records: Iterable[Any], wanted: str) -> str:
    """The format that the first usable record decides.

    Raises:
        DataError: it cannot be told, or there are no records.
    """
    parser, bad = RowParser(wanted), BadRows()
    if wanted != "auto":
        return wanted
    num_records = 0
    for record in records:
        num_records += 1
        parser.parse(record, bad)
        if parser.format != "auto":
            return parser.format
        if num_records >= 1000:
            break
    bad.raise_if_any(num_rows=num_records, path=None)
    raise DataError("the input holds no rows", hint="Put one JSON object on each line")


def _pieces(encoded: EncodedRow, limit: int, size: int) -> Iterable[tuple[bytes, int, Spans]]:
    """The row cut every `limit` tokens: ids, length and trained spans of each piece."""
    if encoded.num_tokens <= limit:
        yield encoded.ids, encoded.num_tokens, encoded.trained
        return
    for start in range(0, encoded.num_tokens, limit):
        end = min(start + limit, encoded.num_tokens)
        spans = [(max(first, start) - start, min(last, end) - start) for first, last in encoded.trained]
        yield encoded.ids[start * size : end * size], end - start, [span for span in spans if span[0] < span[1]]


def _num_trained(spans: Spans) -> int:
    """Trained tokens but the row's first, which nothing comes before."""
    return sum(end - max(first, 1) for first, end in spans if end > 1)


def _num_chars(parsed: Parsed) -> int:
    if parsed.text is not None:
        return len(parsed.text)
    return sum([len(message.content) for message in parsed.messages])
